"""Checkpoints in the pickle layouts of other programs, made without them: empty classes under their import paths hold own tensors."""

from __future__ import annotations

import contextlib
import copy
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from models import build_model
from models.model import Model
from models.spec.config_files import find_config

# Program -> class name -> module; "*" is for classes that are not listed.
LAYOUTS = {
    "yolov5": {"*": "models.common", "Detect": "models.yolo", "Segment": "models.yolo", "Model": "models.yolo.DetectionModel"},
    "yolov5-old": {"*": "models.common", "GhostConv": "models.experimental", "GhostBottleneck": "models.experimental"}
    | {"CrossConv": "models.experimental", "Detect": "models.yolo", "Model": "models.yolo.Model"},
    "yolov7": {"*": "models.common", "IDetect": "models.yolo", "IAuxDetect": "models.yolo", "Detect": "models.yolo"}
    | {"Model": "models.yolo.Model"},
    "yolov9": {"*": "models.common", "Model": "models.yolo.DetectionModel"}
    | dict.fromkeys(("DDetect", "DualDDetect", "Segment", "DSegment", "DualDSegment"), "models.yolo"),
    "ultralytics": {"*": "ultralytics.nn.modules.block", "Detect": "ultralytics.nn.modules.head"}
    | dict.fromkeys(("v10Detect", "Segment", "Segment26", "RTDETRDecoder"), "ultralytics.nn.modules.head")
    | dict.fromkeys(("Conv", "Concat", "DWConv", "RepConv"), "ultralytics.nn.modules.conv")
    | {"Model": "ultralytics.nn.tasks.DetectionModel"},
}
LAYOUTS["yolov10"] = LAYOUTS["ultralytics"] | {"Model": "ultralytics.nn.tasks.YOLOv10DetectionModel"}  # its authors' repository
RENAMED_BLOCKS = {"ultralytics": {"RepConvN": "RepConv"}}  # blocks with another name in a program
# Classes here whose name in other programs is another; those keep the class when they fuse.
CLASS_NAMES = {"AnchorDetect": "Detect", "DetectV9": "Detect", "LightDetect": "Detect", "AreaAttention": "AAttn", "FusedConv": "Conv"}
CLASS_NAMES |= dict.fromkeys(("AnchorSegment", "SegmentV9", "LightSegment"), "Segment") | {"LightEndToEndSegment": "Segment26"}
CLASS_NAMES |= dict.fromkeys(("Prototypes", "NearestPrototypes"), "Proto") | {"FusedPrototypes": "Proto26"}
CLASS_NAMES |= {"YOLOv5Classify": "Classify", "LightPose": "Pose"}
ATTRIBUTES = ("add", "c", "nc", "reg_max")


class Layout:
    """The classes of one program, created on demand."""

    def __init__(self, program: str) -> None:
        self.program, self.made = program, {}

    def of(self, name: str) -> type[nn.Module]:
        """The empty class of this name, importable under the program's path for pickle's sake."""
        table = LAYOUTS[self.program]
        if name == "Model":
            module, _, name = table[name].rpartition(".")
        else:
            name = RENAMED_BLOCKS.get(self.program, {}).get(name, name)
            module = table.get(name, table["*"])
        if (module, name) not in self.made:
            self.made[module, name] = type(name, (nn.Module,), {"__module__": module})
            parts = module.split(".")
            for depth in range(1, len(parts) + 1):
                if (path := ".".join(parts[:depth])) not in sys.modules:
                    sys.modules[path] = types.ModuleType(path)
                    self.added.append(path)
            setattr(sys.modules[module], name, self.made[module, name])
        return self.made[module, name]

    added: list[str]


@contextlib.contextmanager
def layout(program: str) -> Iterator[Layout]:
    """Makes the program's classes importable within the context and removes their modules afterwards."""
    made = Layout(program)
    made.added = []
    try:
        yield made
    finally:
        for path in made.added:
            del sys.modules[path]


def foreign_model(config: str, classes: Layout, *, nc: int = 80, names: Any = None, raw: dict[str, Any] | None = None) -> nn.Module:
    """The network of a config with random weights in the program's classes, with its attribute names."""
    names = names if names is not None else {i: f"thing {i}" for i in range(nc)}
    own = build_model(config, nc=nc)
    randomize_(own)
    return convert_model(own, classes, names=names, raw=raw if raw is not None else raw_yaml(config, nc))


@torch.no_grad()
def randomize_(model: nn.Module) -> nn.Module:
    """Fills a network with random values that differ from tensor to tensor."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not name.endswith(("anchors", "anchor_grid")) and ".dfl" not in name:
            low, high = (0.5, 1.5) if name.endswith("running_var") else (-0.2, 0.2)
            value.uniform_(low, high, generator=generator)
    return model


def convert_model(own: Model, classes: Layout, *, names: Any, raw: dict[str, Any]) -> nn.Module:
    """A Model in the program's classes, with the attributes that its model object holds besides tensors."""
    model = _empty(classes.of("Model"))
    model.model = _convert_module(own.model, classes)
    model.yaml, model.names, model.save, model.inplace = raw, names, [4, 6, 9], True
    has_strides = own.plans[-1].name != "RTDETRDecoder"  # the file of an RT-DETR has the coarsest alone, and none in the head
    model.stride = torch.tensor(own.strides if has_strides else own.strides[-1:])
    for plan, layer in zip(own.plans, model.model):
        layer.i, layer.f, layer.np = plan.index, list(plan.sources), 0
        layer.type = f"{type(layer).__module__}.{type(layer).__name__}"
    head = model.model[-1]
    if own.plans[-1].name == "v10Detect" or len(getattr(own.head, "kept", ())) > 1:
        head.__class__ = classes.of(own.plans[-1].name)
    if has_strides:
        head.stride = torch.tensor(own.strides)
    head.nc, head.no, head.nl = own.nc, own.nc + 64, len(own.strides)
    if hasattr(own.head, "keypoints"):
        head.kpt_shape = list(own.head.keypoints.shape)
    if own.head.anchor_based:  # grids that inference stores, one of them a view with stride 0
        head.na, head.grid = 3, [torch.zeros(1)] * 3
        if not hasattr(own.head, "anchor_grid"):
            head.anchor_grid = [torch.ones(1, 3, 1, 1, 2).expand(1, 3, 4, 4, 2)] * 3
    return model.eval()


def raw_yaml(config: str, nc: int) -> dict[str, Any]:
    """The YAML as other programs store it: a mapping with the rows as written, classes and channels set."""
    path, scale = find_config(config)
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {**raw, **({"scale": scale} if scale else {}), "nc": nc, "ch": 3, "yaml_file": Path(config).name}


def save_stripped(model: nn.Module, path: Path, *, ema: bool = False, zipped: bool = True, **entries: Any) -> dict[str, torch.Tensor]:
    """Writes the file as the end of a training does: half precision, no optimizer. Returns the state dict that loading must give."""
    kept = copy.deepcopy(model).half()
    empty = {"epoch": -1, "best_fitness": None, "optimizer": None, "updates": None, "date": "2024-01-01"}
    content = {**empty, "model": None if ema else kept, "ema": kept if ema else None, **entries}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return {k: v.float() if v.is_floating_point() else v for k, v in kept.state_dict().items()}


def _convert_module(module: nn.Module, classes: Layout) -> nn.Module:
    """The same module in the program's class; modules of torch.nn keep theirs, and what has the parameters of one becomes it."""
    kind = nn.MultiheadAttention if "in_proj_weight" in module._parameters else type(module)
    plain = next((c for c in kind.__mro__ if c.__module__.startswith("torch.nn.modules")), nn.Module)
    out = _empty(kind if kind is plain else plain if plain is not nn.Module else classes.of(CLASS_NAMES.get(kind.__name__, kind.__name__)))
    if plain is not nn.Module:
        out.__dict__.update({k: v for k, v in module.__dict__.items() if not k.startswith("_")})
    for name in ATTRIBUTES:
        if isinstance(getattr(module, name, None), (bool, int)):
            setattr(out, name, getattr(module, name))
    out._parameters, out._buffers = dict(module._parameters), dict(module._buffers)
    out._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    for name, child in module._modules.items():
        out._modules[name] = None if child is None else _convert_module(child, classes)
        if kind is nn.MultiheadAttention:
            out._modules[name].__class__ = nn.modules.linear.NonDynamicallyQuantizableLinear
    out.training = module.training
    return out


def _empty(cls: type[nn.Module]) -> nn.Module:
    made = cls.__new__(cls)
    nn.Module.__init__(made)
    return made
