"""The project's own checkpoints: tensors and plain values only, so that reading one can never run anything; and the way to read others'.

A file is written beside its final name, flushed to the disk and renamed: whatever happens while saving, the previous one is intact. Every
part of a file carries a checksum that is verified when it is read, so that a truncated file is never accepted.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.build import build_model
from models.checkpoints.foreign import is_safetensors, read_foreign
from models.checkpoints.foreign_modules import Layer, differences
from models.checkpoints.published import missing_weights
from models.checkpoints.sound_weights import check_weights
from models.checkpoints.stored_tensors import materialised
from models.checkpoints.torch_files import read_torch_file
from models.model import Model
from models.spec.registry import load_plugin, loaded_plugins
from utils.errors import UserError, printable
from utils.files import atomic_write
from utils.reading.limits import brief

FORMAT = "yolo-attention checkpoint"
FORMAT_VERSION = 1
VERSION = "0.1.0"
READS = 10  # of a file that is replaced meanwhile
LARGEST_OF_FILE, LEAST_OF_FILE = 8, 50_000_000  # values made while the network of a file is built: times those in it, and besides


@dataclass(frozen=True)
class Checkpoint:
    """Everything a file holds. ``training`` is what a resume needs besides; a finished run's files have none.

    Attributes:
        cfg: the model YAML as a mapping.
        cfg_name: its file name.
        names: class names.
        weights: state dict for validation and export (the moving average).
        plugins: name and sha256 of every plugin file the model needs.
        hyp, config: the recipe and the flags, as plain mappings.
        epoch: finished epochs.
        fitness: of these weights; ``best_fitness`` is the best so far.
        training: state of model, optimizer, scaler, moving average, early stop and random generators.
    """

    cfg: dict[str, Any]
    cfg_name: str
    names: tuple[str, ...]
    weights: dict[str, Tensor]
    plugins: tuple[dict[str, str], ...] = ()
    hyp: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    fitness: float = 0.0
    best_fitness: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] | None = None
    date: str = ""
    version: str = VERSION

    @property
    def nc(self) -> int:
        return len(self.names)

    @property
    def ch(self) -> int:
        """Channels of the images that the network takes."""
        return int(self.cfg.get("ch", 3))

    def without_training_state(self) -> Checkpoint:
        return replace(self, training=None)


@dataclass(frozen=True)
class ForeignCheckpoint(Checkpoint):
    """A checkpoint that another program wrote, with what it records of its network, to check the one that is built for it.

    Attributes:
        strides: px of the input per cell for each level; empty where the file does not say.
        layers: settings of the file's layers by path.
    """

    strides: tuple[float, ...] = ()
    layers: dict[str, Layer] = field(default_factory=dict)


def save_checkpoint(path: str | Path, checkpoint: Checkpoint, *, keep_previous: bool = False) -> None:
    """Writes the file so that ``path`` is at every moment either the previous checkpoint or the new one, complete.

    Args:
        keep_previous: the previous one stays beside it, as ``previous_of(path)``.

    Raises:
        UserError: the disk is full or the folder cannot be written; the previous file is still there.
    """
    path = Path(path)
    content = {f.name: getattr(checkpoint, f.name) for f in fields(Checkpoint)}
    content["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        with atomic_write(path) as partial:
            _write(partial, {"format": FORMAT, "format_version": FORMAT_VERSION, **content})
            if keep_previous:
                _keep_previous(path)
        _sync_folder(path.parent)
    except OSError as error:
        kept = "; the previous one is intact" if path.exists() else ""
        raise UserError(f"{path}: cannot be saved ({error.strerror or error}){kept}") from error


def previous_of(path: Path) -> Path:
    """Where the save before this one lies: ``last.prev.pt`` for ``last.pt``."""
    return path.with_name(f"{path.stem}.prev{path.suffix}")


def load_checkpoint(path: str | Path, *, device: torch.device | str = "cpu") -> Checkpoint:
    """Reads a checkpoint of this project or another, a state dict or safetensors; never runs anything that is in it.

    Raises:
        UserError: no such file (the message names its publisher), a damaged file, one that asks for code, or a newer format.
    """
    path = Path(path)
    for _ in range(READS):
        before = _identity(path)
        try:
            checkpoint = _read_checkpoint(path, device)
        except UserError:
            if _identity(path) == before:
                raise
            continue
        if _identity(path) == before:
            return checkpoint
    raise UserError(f"{path}: is written again and again while it is read; try when the run has ended")


def _identity(path: Path) -> tuple[int, int, int] | None:
    """What changes when a file is replaced, as a training replaces its last.pt; the tensors are read one by one."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _read_checkpoint(path: Path, device: torch.device | str) -> Checkpoint:
    if not path.is_file():
        raise UserError(missing_weights(path) if not path.is_dir() else f"{path}: a folder; give the .pt file in it")
    _refuse_other_files(path)
    held = None if is_safetensors(path) else read_torch_file(path)  # tensors stay in the file
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        return _foreign(path, held)
    version = held.get("format_version")
    if not isinstance(version, int):
        raise UserError(f"{path}: a damaged checkpoint (format_version should be a whole number, got {brief(version)})")
    if version > FORMAT_VERSION:
        raise UserError(f"{path}: format version {version} is newer than this program knows ({FORMAT_VERSION}); update it")
    _verify_checksums(path)
    try:
        return _of_fields(path, materialised(held, device=device))
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(str(path)) else f"{path}: a damaged checkpoint ({error})") from None


# What a field of a file has to be, and how it is said; those that are missing have a default.
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "cfg": (lambda v: isinstance(v, dict), "a table"),
    "cfg_name": (lambda v: isinstance(v, str), "a text"),
    "names": (lambda v: isinstance(v, (tuple, list)) and all(isinstance(n, str) for n in v), "a list of texts"),
    "weights": (lambda v: _is_table_of(v, Tensor), "tensors by name"),
    "plugins": (lambda v: isinstance(v, (tuple, list)) and all(_is_plugin(p) for p in v), "a list of names with their sha256"),
    "hyp": (lambda v: isinstance(v, dict), "a table"),
    "config": (lambda v: isinstance(v, dict), "a table"),
    "epoch": (lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0, "a whole number"),
    "fitness": (lambda v: isinstance(v, (int, float)), "a number"),
    "best_fitness": (lambda v: isinstance(v, (int, float)), "a number"),
    "metrics": (lambda v: _is_table_of(v, (int, float)), "numbers by name"),
    "training": (lambda v: v is None or isinstance(v, dict), "a table or nothing"),
    "date": (lambda v: isinstance(v, str), "a text"),
    "version": (lambda v: isinstance(v, str), "a text"),
}


def _is_table_of(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, kind) for k, v in value.items())


def _is_plugin(value: Any) -> bool:
    return _is_table_of(value, str) and {"name", "sha256"} <= set(value)


def _of_fields(path: Path, content: dict[str, Any]) -> Checkpoint:
    """The checkpoint that a file's entries make; their types are checked, what is within ``training`` when it is used."""
    known = {f.name for f in fields(Checkpoint)}
    held = {name: value for name, value in content.items() if name in known}
    for name, value in held.items():
        is_right, what = FIELDS[name]
        if not is_right(value):
            raise UserError(f"{path}: a damaged checkpoint ({name} should be {what}, got {brief(value)})")
    missing = [name for name in ("cfg", "cfg_name", "names", "weights") if name not in held]
    if missing:
        raise UserError(f"{path}: a damaged checkpoint (it has no {', '.join(missing)})")
    held["names"] = tuple(map(printable, held["names"]))
    return Checkpoint(**held)


def _foreign(path: Path, held: Any) -> ForeignCheckpoint:
    """Another program's file in the terms of this one."""
    found = read_foreign(path, held)
    return ForeignCheckpoint(
        cfg=found.cfg, cfg_name=found.cfg_name, names=found.names, weights=found.weights, strides=found.strides, layers=found.layers
    )


def load_model(path: str | Path, *, device: torch.device | str = "cpu", plugins: Sequence[str | Path] = ()) -> Model:
    """The network of a checkpoint with its weights, in evaluation mode on ``device``. Raises UserError as the two steps inside do."""
    checkpoint = load_checkpoint(path)
    return model_from_checkpoint(checkpoint, plugins=plugins, source=path).to(device)


def model_from_checkpoint(checkpoint: Checkpoint, *, plugins: Sequence[str | Path] = (), source: str | Path = "checkpoint") -> Model:
    """The network that the checkpoint describes, with its weights, in evaluation mode.

    Args:
        plugins: files that the person running the command names; one stored in a checkpoint is never imported.

    Raises:
        UserError: a plugin is missing, or the weights do not fit the architecture, or are not finite.
    """
    require_plugins(checkpoint, plugins, source=source)
    if not checkpoint.cfg:
        raise UserError(f"{source}: bare weights of a network that is not recognised; train.py takes them with --cfg, other scripts cannot")
    held = sum(weight.numel() for weight in checkpoint.weights.values())
    cfg = {**checkpoint.cfg, "yaml_file": checkpoint.cfg_name}
    try:
        model = build_model(cfg, names=checkpoint.names, most_values=LARGEST_OF_FILE * held + LEAST_OF_FILE)
    except UserError as error:
        raise UserError(f"{source}: its architecture cannot be built: {error}") from None
    check_weights(checkpoint.weights, source)
    try:
        model.load_state_dict(checkpoint.weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{source}: its weights do not fit its own architecture ({reason[:200]})") from None
    if isinstance(checkpoint, ForeignCheckpoint):
        _check_against_file(model, checkpoint, source)
    return model.eval()


def _check_against_file(model: Model, checkpoint: ForeignCheckpoint, source: str | Path) -> None:
    """Refuses a network that would compute something else than the program that wrote the file."""
    if checkpoint.strides and tuple(checkpoint.strides) != tuple(model.strides):
        raise UserError(f"{source}: its strides are {list(checkpoint.strides)}, its architecture gives {list(model.strides)}")
    wrong = differences(checkpoint.layers, model)
    if wrong:
        raise UserError(f"{source}: would not compute what it did where it was made: {wrong[0]} ({len(wrong)} such layers)")


def require_plugins(checkpoint: Checkpoint, plugins: Sequence[str | Path], *, source: str | Path = "checkpoint") -> None:
    """Loads the named plugins and checks that those the checkpoint was made with are there, or named ones of the same file names.

    Raises:
        UserError: one is missing.
    """
    given = [load_plugin(path) for path in plugins]
    loaded = {plugin.sha256 for plugin in loaded_plugins()}
    exact = {needed["sha256"] for needed in checkpoint.plugins} & loaded
    substitutes = [plugin.name for plugin in given if plugin.sha256 not in exact]  # each for one: files in two folders may share a name
    for needed in checkpoint.plugins:
        name, digest = needed["name"], needed["sha256"]
        if digest in exact:
            continue
        if name in substitutes:
            substitutes.remove(name)
            print(f"{source}: was made with another version of {name}; the one given is used")
            continue
        if name in (plugin.name for plugin in given):
            raise UserError(f"{source}: needs another {name}, too (its sha256 begins with {digest[:8]}): add its path to --plugins")
        raise UserError(f"{source}: needs {name} again: add --plugins {name}")


def plugin_records() -> tuple[dict[str, str], ...]:
    """The plugins of this process as a checkpoint stores them."""
    return tuple(asdict(plugin) for plugin in loaded_plugins())


def _keep_previous(path: Path) -> None:
    """Gives the present file a second name, so that it survives being replaced."""
    previous = previous_of(path)
    previous.unlink(missing_ok=True)
    try:
        os.link(path, previous)
    except FileNotFoundError:
        return  # the first save
    except OSError:  # a file system without second names
        os.replace(path, previous)


def _write(path: Path, content: dict[str, Any]) -> None:
    with open(path, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch's writer replaces the system's error by one of its own
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        file.flush()
        os.fsync(file.fileno())


def _verify_checksums(path: Path) -> None:
    """Compares every record with its checksum, which torch's reader does not."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError):
        damaged = path.name
    if damaged:
        raise UserError(f"{path}: a damaged checkpoint ({damaged} is not what was written)")


def _sync_folder(folder: Path) -> None:
    """Makes the rename durable across a power failure, where the system supports that."""
    with contextlib.suppress(OSError, AttributeError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _refuse_other_files(path: Path) -> None:
    """Refuses, by name, files that cannot be checkpoints, from their first bytes."""
    with open(path, "rb") as file:
        head = file.read(64)
    kind = ""
    if not head:
        kind = "an empty file, not a checkpoint"
    elif head.lstrip()[:1] == b"<":
        kind = "a web page, not a checkpoint (a download that went wrong)"
    elif head.startswith(b"version https://git-lfs"):
        kind = "a Git LFS pointer, not the checkpoint itself; fetch the file with git lfs pull"
    elif not head.startswith((b"PK", b"\x80")) and head[8:9] != b"{":
        kind = "not a checkpoint, or a damaged one"
    if kind:
        raise UserError(f"{path}: {kind}")
