"""A training of a study and its files: the run folder, how far it is, and the record that is made of it.

Beside what train.py writes, a run folder holds ``study_run.json`` (what was to be trained), ``train.log``, and at its end either
``study_metrics.json`` (of the weights that are compared) or ``study_failed.json`` (the reason).
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.logging.cost import COST_FILE
from engine.study.records import Cost, RunRecord, Status, Stop
from engine.study.run_outputs import STUDY_FAILED, STUDY_METRICS, STUDY_RUN, stated_settings
from models.checkpoints.checkpoint import load_checkpoint, previous_of
from utils import distributed
from utils.errors import UserError
from utils.files import atomic_write
from utils.reading.limits import MIB
from utils.reading.text_files import decode, read_bytes
from utils.run_folders import RunLock

JOB_FILE, METRICS_FILE, FAILED_FILE, LOG_FILE = STUDY_RUN, STUDY_METRICS, STUDY_FAILED, "train.log"
MAX_FILE_BYTES = 64 << 20
# Flags that change nothing of what is trained; network and recipe are compared by their content, not by their paths.
MAY_CHANGE = ("cfg", "hyp", "workers", "device", "project", "plugins", "cache", "noplots", "plots", "logger")


@dataclass(frozen=True)
class Job:
    """A training: a variant with one seed.

    Attributes:
        folder: its run folder.
        flags: of train.py, name -> value.
        recipe: values of the hyper-parameters.
        network: hash of the network's rows.
        compare: ``last`` or ``best``: the weights that are compared.
        control_of: the variants whose capacity control it is.
        files: sha256 -> path of the plugins that its network uses and of the weights that it starts from.
    """

    variant: str
    seed: int
    folder: Path
    flags: Mapping[str, Any]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    network: str = ""
    compare: str = "last"
    control_of: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.variant} seed {self.seed}"

    @property
    def epochs(self) -> int:
        return int(self.flags["epochs"])

    @property
    def last(self) -> Path:
        return self.folder / "weights" / "last.pt"


def network_hash(rows: Any) -> str:
    """Identifies a network by the content of its YAML."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def file_hash(path: str | Path) -> str:
    """The sha256 of a file; empty where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(MIB):
                digest.update(block)
    except OSError:
        return ""
    return digest.hexdigest()


def prepare(job: Job) -> None:
    """Makes the run folder with its ``study_run.json``. One in which nothing was trained yet holds no other run, and begins anew.

    Raises:
        UserError: the folder holds a run that was trained otherwise, or that another process trains; names what differs.
    """
    path = job.folder / JOB_FILE
    content = _content(job)
    if path.is_file():
        before = read_json(path)
        if before == content:
            return
        if _differing(before, content):
            refuse_others(job)
            with RunLock() as lock:  # a training that a killed study left would write its own saves
                lock.take(job.folder, job=distributed.job_id())
                for save in _saves(job):  # of the network before its first step
                    save.unlink(missing_ok=True)
    job.folder.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def refuse_others(job: Job) -> None:
    """Refuses a run folder of something else, and changes nothing.

    Raises:
        UserError: the folder holds a run that was trained otherwise; names what differs.
    """
    path = job.folder / JOB_FILE
    if path.is_file() and (differing := _differing(read_json(path), _content(job))) and _is_begun(job):
        raise UserError(f"{job.folder}: was trained with {differing}; give another --name, or remove the folder")


def _content(job: Job) -> dict[str, Any]:
    content = {"variant": job.variant, "seed": job.seed, "network": job.network, "flags": dict(job.flags), "hyp": dict(job.recipe),
               "control_of": list(job.control_of), "files": dict(job.files)}  # fmt: skip
    return json.loads(json.dumps(content))  # type: ignore[no-any-return]  # as it will be read again


def _is_begun(job: Job) -> bool:
    """Whether anything was trained; train.py saves before its first step too."""
    return epochs_done(job) > 0 or (job.folder / METRICS_FILE).is_file() or any(_is_trained_save(path) for path in _saves(job))


def _saves(job: Job) -> list[Path]:
    return [path for path in (job.last, previous_of(job.last)) if path.is_file()]


def _is_trained_save(path: Path) -> bool:
    """Whether a save is of a network after its first step; a damaged one may be."""
    try:
        checkpoint = load_checkpoint(path)
    except UserError:
        return True
    return checkpoint.training is None or checkpoint.epoch > 0 or bool(checkpoint.training.get("batch"))


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What makes a former run another one, such as ``epochs 20, now 30``; empty if nothing does."""
    for part in ("flags", "hyp"):
        old, new = before.get(part, {}), now[part]
        for key in sorted({*old, *new}):
            if key not in MAY_CHANGE and old.get(key) != new.get(key):
                return f"{key} {old.get(key)}, now {new.get(key)}"
    if before.get("network") != now["network"]:
        return "another network of this name"
    return _differing_file(before.get("files", now["files"]), now["files"])  # older versions noted none


def _differing_file(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Which plugin or initial weights were others; a file that was only moved is the same."""
    gone, new = ([Path(files[digest]).name for digest in files if digest not in rest] for files, rest in ((before, now), (now, before)))
    if shared := next((name for name in new if name in gone), ""):
        return f"another version of {shared}"
    return f"{gone[0]}, now without it" if gone else f"no {new[0]}, now with it" if new else ""


def changed_file(job: Job) -> str:
    """Says which plugin or initial weights have changed since the study began; empty if none has."""
    path = next((path for digest, path in job.files.items() if file_hash(path) != digest), "")
    return f"{path} has changed since the study began; put it back and start the study with --retry, or give another --name" if path else ""


def epochs_done(job: Job) -> int:
    """Epochs in results.csv."""
    return len(read_table(job.folder / "results.csv").get("epoch", ()))


def is_measured(job: Job) -> bool:
    """Whether the training is finished and the weights that are compared are measured."""
    path = job.folder / METRICS_FILE
    return path.is_file() and read_json(path).get("compare") == job.compare


def failure(job: Job) -> str:
    """Why the training failed; empty if it did not."""
    path = job.folder / FAILED_FILE
    return str(read_json(path).get("reason") or "no reason is known") if path.is_file() else ""


def note_failure(job: Job, reason: str) -> None:
    """Writes ``study_failed.json``, which marks the run as failed."""
    job.folder.mkdir(parents=True, exist_ok=True)
    write_json(job.folder / FAILED_FILE, {"reason": reason})


def forget_failure(job: Job) -> None:
    """Removes the mark of :func:`note_failure`, so that the run is trained again."""
    (job.folder / FAILED_FILE).unlink(missing_ok=True)


def is_trained(job: Job) -> bool:
    """Whether train.py has ended this run: its last.pt holds no training state any more."""
    if not job.last.is_file() or (job.folder / METRICS_FILE).is_file():
        return job.last.is_file()
    try:
        return load_checkpoint(job.last).training is None
    except UserError:  # train.py says what is wrong, or takes the save before it
        return False


def can_resume(job: Job) -> bool:
    """Whether the run has a save that train.py resumes with."""
    return bool(_saves(job))


def read_record(job: Job, *, stopped: Stop | None = None) -> RunRecord:
    """What the run left behind so far.

    Args:
        stopped: by the study's rule, whose epoch the metrics are of; None if it was not.
    """
    curves = read_table(job.folder / "results.csv")
    base = RunRecord(
        job.variant, job.seed, Status.PENDING, curves=curves, cost=_training_cost(job), folder=job.folder, settings=_settings(job)
    )  # fmt: skip
    if is_measured(job):
        found = read_json(job.folder / METRICS_FILE)
        keys = ("metrics", "per_class", "per_size", "pr_curves", "image_noise")
        return replace(base, status=Status.FINISHED, **{key: _numbers(found.get(key, {})) for key in keys})
    if reason := failure(job):
        return replace(base, status=Status.FAILED, reason=reason)
    if stopped:
        at = stopped.epoch - 1  # a run may have gone on while the others came so far
        row = {name: values[at] for name, values in curves.items() if name.startswith("metrics/") and at < len(values)}
        return replace(base, status=Status.STOPPED, reason=stopped.reason, metrics=row)
    return base


def _settings(job: Job) -> dict[str, Any]:
    """What the caption of a table states."""
    return stated_settings(job.flags, job.recipe, job.compare, job.control_of)


def _training_cost(job: Job) -> Cost:
    path = job.folder / COST_FILE
    try:
        found = read_json(path) if path.is_file() else {}
        seconds = [float(value) for value in found.get("epoch_seconds", ())]
        peak = found.get("peak_memory_mib")
        return Cost(peak_memory_mib=None if peak is None else float(peak), training_seconds=sum(seconds) if seconds else None)
    except (UserError, TypeError, ValueError):  # it is observed only; a damaged file costs no result
        return Cost()


def read_table(path: Path) -> dict[str, list[float]]:
    """The columns of a results.csv, NaN for an empty cell; empty without a file. A row that is being written is left out."""
    try:
        text = decode(read_bytes(path, most=MAX_FILE_BYTES))
    except UserError:
        return {}
    reader = csv.DictReader(text.splitlines(keepends=True)[: text.count("\n")])
    columns: dict[str, list[float]] = {name.strip(): [] for name in reader.fieldnames or ()}
    for row in reader:
        for name, value in row.items():
            if name is not None and name.strip() in columns:
                columns[name.strip()].append(_number(value))
    return columns


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _numbers(value: Any) -> Any:
    """JSON with null for NaN as numbers."""
    if isinstance(value, dict):
        return {key: _numbers(v) for key, v in value.items()}
    return [_numbers(v) for v in value] if isinstance(value, list) else math.nan if value is None else value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        UserError: missing, too large or damaged.
    """
    try:
        value = json.loads(decode(read_bytes(path, most=MAX_FILE_BYTES)))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: damaged ({reason}); remove it, and what it is made from is measured again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: an object is expected, not {type(value).__name__}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes the file whole; NaN becomes null."""
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(_finite(value), ensure_ascii=False, indent=1, allow_nan=False), encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
