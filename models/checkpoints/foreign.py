"""Files of other programs as checkpoints of this one: YOLOv5, v7, v9, v10, v12 and ultralytics, state dicts and safetensors.

A ``.pt`` of those programs holds pickled objects of their classes. They are read as records (``safe_pickle``): the tensors, the YAML, the
class names and the strides are taken out of them, and no code of the file or of those programs ever runs or has to be there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from models.checkpoints.first_release import as_later_release
from models.checkpoints.foreign_modules import Layer, is_module, layers_of, loaded, rows_of, tensors_of, unwrapped
from models.checkpoints.foreign_yaml import plain, translated
from models.checkpoints.recognition import recognised
from models.checkpoints.safe_pickle import Global, Record
from models.checkpoints.torch_files import StoredTensor, read_safetensors, read_torch_file
from models.checkpoints.turbo_release import with_joined_projections
from models.heads.anchor_based import CERTAIN
from models.spec.families import TASK_HEADS, tasks_here
from models.spec.registry import BLOCKS
from utils.errors import UserError, printable
from utils.reading.limits import brief

ENTRIES = ("ema", "model", "state_dict", "model_state_dict", "weights", "net")  # of a network in a file, best first
DEEPEST_ENTRY = 6  # containers around a network
PREFIXES = ("module.", "_orig_mod.", "ema.")
ANCHOR_HEADS = ("Detect", "IDetect", "IAuxDetect", "Segment")
WHOLE_IMAGE_HEADS = ("Classify",)
HEADS_WITHOUT_STRIDES = (*WHOLE_IMAGE_HEADS, "RTDETRDecoder")  # their files say 1, or the coarsest of the levels alone


@dataclass(frozen=True)
class Foreign:
    """What a foreign file holds.

    Attributes:
        weights: tensors by name, as in a state dict.
        cfg: the model YAML in this project's dialect; empty for bare weights.
        cfg_name: a file name for it.
        names: class names; empty where the file has none.
        strides: px of the input per cell for each level; empty where unknown.
        layers: settings that the file records of its layers, to check the network that is built for it.
    """

    weights: dict[str, Tensor]
    cfg: dict[str, Any] = field(default_factory=dict)
    cfg_name: str = ""
    names: tuple[str, ...] = ()
    strides: tuple[float, ...] = ()
    layers: dict[str, Layer] = field(default_factory=dict)


def read_foreign(path: Path, content: Any = None) -> Foreign:
    """Reads a checkpoint of another program, bare weights or safetensors, running nothing of it.

    Args:
        content: what ``read_torch_file`` gave for it, where that is known already.

    Raises:
        UserError: in one line, what the file is instead, what is refused, or which task the network is for.
    """
    try:
        if content is None and is_safetensors(path):
            tensors, notes = read_safetensors(path)
            return _bare(path, tensors, notes)
        network = _find_network(read_torch_file(path) if content is None else content)
        if isinstance(network, Record):
            return _from_module(path, network)
        return _bare(path, network, {})
    except UserError as error:
        message = str(error)
        raise UserError(message if message.startswith(str(path)) else f"{path}: {message}") from None


def is_safetensors(path: Path) -> bool:
    """Whether the file begins as a safetensors file does: a length, then JSON."""
    with open(path, "rb") as file:
        head = file.read(9)
    return head[8:9] == b"{"


def _find_network(content: Any) -> Record | dict[str, StoredTensor]:
    """The network among what a file holds: a pickled module, or a state dict; the moving average where there is one.

    It may lie within a ModelEMA, beside its number of updates, and in the entries of dictionaries, to a few levels.
    """
    for _ in range(DEEPEST_ENTRY):
        if is_module(content):
            return unwrapped(content)
        if isinstance(content, Record) and "ema" in content.state:  # a pickled ModelEMA
            content = content.state["ema"]
        elif isinstance(content, (tuple, list)) and content:  # the average with its number of updates
            content = content[0]
        elif isinstance(content, dict):
            entry = None if _is_state_dict(content) else next((e for name in ENTRIES if _may_hold_network(e := content.get(name))), None)
            if entry is None:
                return _tensors_of(content)
            content = entry
        else:
            break
    raise UserError(f"holds {_what(content)}, not a network")


def _is_state_dict(content: dict[Any, Any]) -> bool:
    return bool(content) and all(isinstance(value, StoredTensor) for value in content.values())


def _may_hold_network(entry: Any) -> bool:
    return isinstance(entry, (Record, tuple, list)) or (isinstance(entry, dict) and bool(entry))


def _tensors_of(content: dict[Any, Any]) -> dict[str, StoredTensor]:
    tensors = {k: v for k, v in content.items() if isinstance(v, StoredTensor)}
    if not tensors:
        known = ", ".join(brief(k, longest=20) for k in list(content)[:8])
        raise UserError(f"holds no network that can be read; its entries are {known or 'none'}")
    return tensors


def _from_module(path: Path, model: Record) -> Foreign:
    """A pickled detection model: its rows, YAML, tensors, names and strides."""
    model = as_later_release(model)
    head = rows_of(model)[-1]
    _refuse_other_tasks(model, head)
    tensors = tensors_of(model)
    whole_image = head.cls.name in WHOLE_IMAGE_HEADS
    if whole_image and not isinstance(model.state.get("yaml"), dict):
        return _without_yaml(path, model, tensors)
    strides = () if head.cls.name in HEADS_WITHOUT_STRIDES else _strides(head) or _strides(model)
    cfg = translated(model, rows_of(model), tensors=tensors, strides=strides)
    folded = _is_folded_implicit(head)
    tensors = {name: t for name, t in tensors.items() if not _is_redundant(name, head, folded=folded)}
    nc = cfg["nc"]
    weights = with_joined_projections(loaded(tensors))
    if _is_v7_single_class(cfg):
        _saturate_class_output(weights, last=len(cfg["backbone"]) + len(cfg["head"]) - 1)
    return Foreign(weights, cfg, _cfg_name(path, model), _names(model, nc), strides, layers_of(model))


def _without_yaml(path: Path, model: Record, tensors: Mapping[str, StoredTensor]) -> Foreign:
    """A classifier of YOLOv5, which is cut out of a detector and keeps no YAML: recognised by its tensors."""
    weights = loaded(tensors)
    cfg, name = recognised(path, {key: tuple(value.shape) for key, value in weights.items()})
    if not cfg:
        raise UserError("a classifier without its YAML, and no published one; give --cfg with a state dict of it instead")
    return Foreign(weights, cfg, name, _names(model, cfg["nc"]), (), layers_of(model))


def _bare(path: Path, tensors: Mapping[str, StoredTensor], notes: Mapping[str, str]) -> Foreign:
    """Tensors alone: the architecture is in the notes of a safetensors file, or is recognised by its names and shapes."""
    weights = with_joined_projections(loaded(_without_prefixes(tensors)))
    if "cfg" in notes:
        try:
            cfg, names = json.loads(notes["cfg"]), json.loads(notes.get("names", "[]"))
        except (ValueError, RecursionError):
            raise UserError("its notes hold no readable cfg or names") from None
        if not isinstance(cfg, dict) or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError("its notes should hold cfg as a table and names as a list of texts")
        return Foreign(weights, plain(cfg), notes.get("cfg_name", f"{path.stem}.yaml"), tuple(map(printable, names)))
    cfg, name = recognised(path, {key: tuple(value.shape) for key, value in weights.items()})
    names = tuple(f"class{i}" for i in range(cfg["nc"])) if cfg else ()
    return Foreign(weights, cfg, name, names)


def _without_prefixes(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Names as a Model has them: what wrappers add in front goes, ``model.`` is there once."""
    named = {str(name): value for name, value in tensors.items()}
    for _ in range(4):
        for prefix in (*PREFIXES, "model."):
            inner = {name.removeprefix(prefix): value for name, value in named.items()}
            is_wrapper = prefix != "model." or any(name.startswith("model.") for name in inner)
            if is_wrapper and len(inner) == len(named) and all(name.startswith(prefix) for name in named):
                named = inner
    if named and all(name.split(".")[0].isdecimal() for name in named):
        named = {f"model.{name}": value for name, value in named.items()}
    return named


def _refuse_other_tasks(model: Record, head: Record) -> None:
    kind = head.cls.name
    if kind in TASK_HEADS and kind not in BLOCKS:
        raise UserError(f"a {model.cls.name} that {TASK_HEADS[kind]} (its head is {kind}); {tasks_here()}")


def _strides(module: Record) -> tuple[float, ...]:
    stored = module.state.get("stride")
    if not isinstance(stored, StoredTensor):
        return ()
    return tuple(float(s) for s in stored.load().flatten().tolist())


def _names(model: Record, nc: int) -> tuple[str, ...]:
    found = plain(model.state.get("names"))
    if isinstance(found, dict):
        found = [found[key] for key in sorted(found, key=lambda k: (isinstance(k, str), int(k) if str(k).isdecimal() else 0))]
    if not isinstance(found, (list, tuple)) or len(found) != nc:
        return tuple(f"class{i}" for i in range(nc))
    return tuple(printable(" ".join(str(name).split())) for name in found)


def _cfg_name(path: Path, model: Record) -> str:
    yaml = model.state.get("yaml")
    written = (yaml.get("yaml_file") if isinstance(yaml, dict) else None) or model.state.get("yaml_file")
    stem = Path(str(written).replace("\\", "/")).stem if isinstance(written, str) else path.stem
    return f"{stem[:80]}.yaml"


def _is_redundant(name: str, head: Record, *, folded: bool) -> bool:
    """Buffers of YOLOv5's and YOLOv7's heads that repeat the anchors in px, and implicit layers that are folded already."""
    last = name.split(".")[2:3]
    is_of_head = head.cls.name in ANCHOR_HEADS and len(name.split(".")) >= 3
    repeats = name.endswith(".anchor_grid") and (head.cls.name in ("Detect", "Segment") or folded)
    return is_of_head and (repeats or (folded and last in (["ia"], ["im"], ["m2"])))


def _is_folded_implicit(head: Record) -> bool:
    """Whether YOLOv7's fuse() was applied: it swaps the head's forward and leaves the implicit layers where they are."""
    forward = head.state.get("forward")
    return head.cls.name in ("IDetect", "IAuxDetect") and isinstance(forward, Record) and forward.cls == Global("builtins", "getattr")


def _is_v7_single_class(cfg: Mapping[str, Any]) -> bool:
    """A deployed YOLOv7 of one class: its class output is untrained there, and scores are the objectness alone."""
    rows = [*cfg["backbone"], *cfg["head"]]
    modules = {row[2] for row in rows}
    return cfg["nc"] == 1 and rows[-1][2] == "Detect" and bool(modules & {"MP", "SP", "SPPCSPC", "ReOrg", "DownC"})


def _saturate_class_output(weights: dict[str, Tensor], *, last: int) -> None:
    for name, value in weights.items():
        if name.startswith(f"model.{last}.m."):
            outputs = value.view(-1, 6, *value.shape[1:])  # x, y, w, h, objectness, class
            outputs[:, 5:] = 0.0 if name.endswith("weight") else CERTAIN


def _what(value: Any) -> str:
    return f"a {value.cls}" if isinstance(value, Record) else f"a {type(value).__name__}"
