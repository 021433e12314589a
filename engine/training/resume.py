"""``--resume``: finds the run, loads its last valid checkpoint, and repairs its weights folder.

Flags given with --resume replace the stored ones where the run stays the same one; any other is refused.
"""

from __future__ import annotations

import os
import sys
from dataclasses import fields
from pathlib import Path

from engine.training.saving import describe_position, remove_partial_files, save_copies
from models.checkpoints.checkpoint import Checkpoint, load_checkpoint, previous_of
from utils.cli.flags import resumable_names, spelling_of
from utils.config import NEWEST, TrainConfig
from utils.errors import UserError


def load_resumed_run(config: TrainConfig) -> tuple[TrainConfig, Checkpoint]:
    """The stored config of the run, with the resumable flags that were given, and its checkpoint.

    Raises:
        UserError: another flag was given, there is nothing to resume, or the run was finished.
    """
    defaults = TrainConfig()
    differing = {f.name for f in fields(config) if f.compare and getattr(config, f.name) != getattr(defaults, f.name)}
    names = [f.name for f in fields(config) if f.name in differing.union(config.given)]
    for name in (n for n in names if n not in resumable_names(TrainConfig)):
        raise UserError(f"{spelling_of(name)} with --resume: would make it another run; leave it out, or train on with --weights")
    path, checkpoint = load_last_valid(find_last_checkpoint(config.resume, config.project))
    if checkpoint.training is None:
        raise UserError(f"{path}: holds no training state (the run was finished, or this is a best.pt); train on with --weights {path}")
    given = {name: getattr(config, name) for name in names if name != "project"}
    given.update(resume=str(path), plugins=config.plugins)  # a path that is stored in a file is never imported
    config = TrainConfig.from_dict(checkpoint.config).replace(**given)
    print(f"Resuming {path} after {describe_position(checkpoint)}")
    return config, checkpoint


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


def _saved_at_ns(weights: Path) -> int:
    """Time of the last save; of the start of the run where there is none."""
    saves = [p.stat().st_mtime_ns for p in weights.glob("*.pt")]
    return max(saves, default=weights.stat().st_mtime_ns)
