"""``--resume``: finds the run, takes its folder, loads its last valid checkpoint, and repairs what is derived from it.

Flags given with --resume replace the stored ones where the run stays the same one; any other is refused. The data set may lie elsewhere
if its labels are the same.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from engine.training.saving import describe_position, remove_partial_files, save_copies
from models.checkpoints.checkpoint import Checkpoint, load_checkpoint, previous_of
from utils import distributed
from utils.cli.flags import resumable_names, spelling_of
from utils.config import NEWEST, TrainConfig
from utils.errors import UserError, first_line
from utils.reading.yaml_text import read_yaml
from utils.run_folders import RunLock


def load_resumed_run(config: TrainConfig, lock: RunLock | None = None) -> tuple[TrainConfig, Checkpoint]:
    """The stored config of the run, with the resumable flags that were given, and its checkpoint.

    Args:
        lock: takes the run's folder first, as the process that writes it may be about to finish the run.

    Raises:
        UserError: another flag was given, there is nothing to resume, another process writes the folder, or the run was finished.
    """
    defaults = TrainConfig()
    differing = {f.name for f in fields(config) if f.compare and getattr(config, f.name) != getattr(defaults, f.name)}
    names = [f.name for f in fields(config) if f.name in differing.union(config.given)]
    for name in (n for n in names if n not in resumable_names(TrainConfig)):
        raise UserError(f"{spelling_of(name)} with --resume: would make it another run; leave it out, or train on with --weights")
    path = find_last_checkpoint(config.resume, config.project)
    folder = run_folder_of(path)
    if lock is not None and folder is not None:
        take_folder(folder, lock)
    path, checkpoint = load_last_valid(path)
    if checkpoint.training is None:
        raise UserError(f"{path}: holds no training state (the run was finished, or this is a best.pt); train on with --weights {path}")
    given = {name: getattr(config, name) for name in names if name != "project"}
    given.update(resume=str(path), plugins=config.plugins)  # a path that is stored in a file is never imported
    with restored_from(str(path)):
        if folder is not None and distributed.is_main():
            check_run_files(folder, checkpoint)
        stored = TrainConfig.from_dict(checkpoint.config)
        config = stored.replace(**{"data": data_file(stored.data, checkpoint.training), **given}, given=tuple(given))
        print(f"Resuming {path} after {describe_position(checkpoint)}")
    return config, checkpoint


@contextmanager
def restored_from(source: str) -> Iterator[None]:
    """Within this context an entry of a checkpoint's training state that is missing, or of another type or size, is one line.

    Raises:
        UserError: what was missing or wrong.
    """
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{source}: its training state is damaged ({reason}); train on with --weights {source}") from error


def find_last_checkpoint(given: str, project: str) -> Path:
    """The last.pt of the newest run below ``project``, of the given run folder, or the given file itself.

    Raises:
        UserError: there is no run, or it was stopped before its first save.
    """
    if given == NEWEST:
        folders = [f for f in Path(project).glob("**/weights") if f.is_dir()]
        if not folders:
            raise UserError(f"--resume: no run in {project}; start one without --resume, or give the path of its last.pt")
        return _last_checkpoint(max(folders, key=_saved_at_ns))
    path = Path(given)
    if not path.is_dir():
        return path
    return _last_checkpoint(path if path.name == "weights" else path / "weights")


def load_last_valid(path: Path) -> tuple[Path, Checkpoint]:
    """The checkpoint, or the one before it where the file is damaged or missing; prints a warning then.

    Raises:
        UserError: neither can be read.
    """
    previous = previous_of(path)
    try:
        return path, load_checkpoint(path)
    except UserError as error:
        if not previous.is_file():
            raise
        checkpoint = load_checkpoint(previous)
        print(f"warning: {error}; the save before it is complete: {previous}", file=sys.stderr)
        return previous, checkpoint


def run_folder_of(last: str | Path) -> Path | None:
    """The run folder of a checkpoint that lies in its weights folder; None for one that lies elsewhere."""
    path = Path(last).absolute()
    return path.parent.parent if str(last) and path.parent.name == "weights" and path.parent.is_dir() else None


def take_folder(folder: Path, lock: RunLock) -> None:
    """Takes the run folder on the main rank; the other ranks wait until it has it.

    Raises:
        UserError: another process writes it.
    """

    def take() -> str:
        lock.take(folder, job=distributed.job_id())
        return ""

    distributed.main_rank_decision(take)


def data_file(stored: str, training: Mapping[str, Any]) -> str:
    """The data set's YAML as the run named it, or its absolute path where that names another file from this working directory."""
    absolute = training.get("data", {}).get("file", "")
    return absolute if absolute and Path(absolute).is_file() and Path(stored).resolve() != Path(absolute) else stored


def check_run_files(folder: Path, checkpoint: Checkpoint) -> None:
    """Compares opt.yaml and results.csv with the checkpoint that they are written from again; warns where one is missing or damaged.

    Raises:
        UserError: opt.yaml is that of another run.
    """
    flags, table = folder / "opt.yaml", folder / "results.csv"
    again = "it is written again from last.pt"
    written: Mapping[str, Any] = {}
    try:
        written = read_yaml(flags)
        if not written:
            _warn(f"{flags}: empty; {again}")
    except UserError as error:
        _warn(f"{error}; {again}")
    fixed = [name for name in checkpoint.config if name in written and name not in resumable_names(TrainConfig)]
    for name in (n for n in fixed if written[n] != checkpoint.config[n]):
        said = f"{name}: {written[name]!r}, the checkpoint {checkpoint.config[name]!r}"
        why = "an edit of it changes nothing, or last.pt is of another run"
        raise UserError(f"{flags}: has {said} ({why}); put back what belongs into this folder")
    if reason := damage_of_table(table, rows=len((checkpoint.training or {}).get("rows", ()))):
        _warn(f"{table}: {reason}; {again}")


def damage_of_table(table: Path, *, rows: int) -> str:
    """What is wrong with a results.csv of so many epochs; empty if nothing is. A killed process may have written one row more or less."""
    try:
        with open(table, newline="", encoding="utf-8") as file:
            found = [[float(value) for value in row.values() if value] for row in csv.DictReader(file, strict=True)]
    except FileNotFoundError:
        return "missing" if rows else ""
    except (OSError, ValueError, TypeError, csv.Error) as error:
        return f"damaged ({' '.join(str(error).split())[:100]})"
    first = 0 if found and found[0] and found[0][0] == 0 else 1  # older runs counted from 0
    if any(not row or row[0] != number for number, row in enumerate(found, first)):
        return "damaged (its epochs do not count from 1)"
    return f"has {len(found)} rows, {rows} are expected" if abs(len(found) - rows) > 1 else ""


def check_classes(names: Sequence[str], checkpoint: Checkpoint, *, source: str) -> None:
    """Refuses a data set with other classes than those of the run."""
    before, now = list(checkpoint.names), list(names)
    if before == now:
        return
    number = next((i for i, (a, b) in enumerate(zip(before, now)) if a != b), min(len(before), len(now)))
    was, found = (repr(n[number]) if number < len(n) else "absent" for n in (before, now))
    raise UserError(f"{source}: class {number} is {found}, in the run to resume it is {was}; train on with --weights if that is meant")


def check_labels(origin: Mapping[str, str], checkpoint: Checkpoint, config: TrainConfig) -> None:
    """Refuses a data set at another place whose labels are not those of the run; warns where those at the same place have changed.

    Args:
        origin: of the loaders.
    """
    assert checkpoint.training is not None
    saved: Mapping[str, str] = checkpoint.training.get("data", {})
    if not saved:
        if "data" in config.given:
            reason = f"{config.resume} was saved by an older version, without a hash of its labels"
            _warn(f"--data {config.data}: {reason}; whether they are the same is not checked")
        return
    changed = [split for split in ("train", "val") if saved.get(split) != origin[split]]
    if not changed:
        return
    what = f"the labels of {' and '.join(changed)}"
    if origin["file"] != saved.get("file"):
        advice = "give the same images and labels, or train on with --weights"
        raise UserError(f"{origin['file']}: {what} are not those that the run was trained with in {saved.get('file')}; {advice}")
    _warn(f"{origin['file']}: {what} have changed since the run was saved, so it is not continued bit for bit")


def repair_weights_folder(weights: Path, used: Path, checkpoint: Checkpoint) -> None:
    """Removes partial files, and saves the copies of last.pt that a killed process did not get to."""
    remove_partial_files(weights)
    last = weights / "last.pt"
    if used.name == previous_of(last).name and used.parent.samefile(weights):
        os.replace(used, last)
    if checkpoint.training and checkpoint.epoch and not checkpoint.training.get("batch"):
        save_copies(weights, checkpoint, period=int(checkpoint.config.get("save_period", -1)))


def _last_checkpoint(weights: Path) -> Path:
    """The last.pt of a weights folder, which may be damaged, or missing where there is the save before it."""
    last = weights / "last.pt"
    if not (last.is_file() or previous_of(last).is_file()):
        hint = "start it again with the same command, or give the last.pt of another run"
        raise UserError(f"--resume: {weights.parent} was stopped before its first save; {hint}")
    return last


def _warn(line: str) -> None:
    if distributed.is_main():
        print(f"warning: {line}", file=sys.stderr)


def _saved_at_ns(weights: Path) -> int:
    """Time of the last save; of the start of the run where there is none."""
    saves = [p.stat().st_mtime_ns for p in weights.glob("*.pt")]
    return max(saves, default=weights.stat().st_mtime_ns)
