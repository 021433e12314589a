"""Running exported files: an ONNX or TorchScript export answers ``predict(images)`` like the Model it came from.

An exported network maps ``images`` (B, ch, H, W) in 0-1 to ``output0`` (B, 4 + nc, N): boxes as centre, width, height in px, then scores.
What else a reader has to know (class names, stride, image size) travels in the file: in ONNX as metadata properties, in TorchScript as the
extra file ``config.txt``. Both use the keys that other YOLOs use, so files go both ways.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.boxes import cxcywh_to_xyxy
from utils.errors import UserError
from utils.types import Predictions

SUFFIXES = (".onnx", ".torchscript")
CONFIG_FILE = "config.txt"  # the extra file in a TorchScript archive
Network = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class ExportFacts:
    """What a reader of an exported file has to know besides its graph."""

    names: tuple[str, ...]  # of the classes
    stride: int = 32  # px; with ``dynamic``, sides of images are multiples of it
    imgsz: tuple[int, int] = (640, 640)  # height, width in px
    batch: int = 1
    ch: int = 3
    dynamic: bool = False  # whether other sizes and batches than these may come in
    end2end: bool = False  # whether suppression is inside: four outputs instead of one
    topk: int = 0  # of the suppression inside: detections an image,
    iou: float = 0.0  # overlap above which a box is dropped,
    conf: float = 0.0  # and score above which a box takes part

    def to_metadata(self) -> dict[str, str]:
        """Plain text values, as ONNX wants them; a reader takes them back with a literal parser."""
        values = {**asdict(self), "task": "detect", "names": dict(enumerate(self.names)), "imgsz": list(self.imgsz)}
        values["channels"] = values.pop("ch")
        return {key: str(value) for key, value in values.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], *, source: str) -> ExportFacts:
        """Reads what ``to_metadata`` wrote, or what other programs store under the same keys; missing entries take their defaults.

        Raises:
            UserError: an entry cannot be understood, or the file is of another task.
        """
        values: dict[str, Any] = {key: _literal(value) for key, value in metadata.items()}
        if values.get("task", "detect") != "detect":
            raise UserError(f"{source}: made for the task {values['task']!r}; only detection is supported")
        try:
            names = values.pop("names", {})
            height, width = (imgsz, imgsz) if isinstance(imgsz := values.pop("imgsz", cls.imgsz), int) else imgsz
            plain = {"ch": int(values.get("channels", cls.ch))}
            for key in ("stride", "batch", "dynamic", "end2end", "topk", "iou", "conf"):
                default = getattr(cls, key)
                plain[key] = type(default)(values.get(key, default))
            in_order = [names[k] for k in sorted(names, key=int)] if isinstance(names, dict) else names
            return cls(names=tuple(map(str, in_order)), imgsz=(int(height), int(width)), **plain)
        except (TypeError, ValueError):
            raise UserError(f"{source}: its metadata cannot be understood; export it again with export.py") from None


class ExportedModel:
    """An exported network with the interface that scripts use of a Model.

    Attributes:
        names: class names; ``class0`` … if the file has none.
        nc: number of classes.
        ch: channels of the input.
        stride: px; sides of images should be multiples of it.
        imgsz: height and width it was exported at, px.
        dynamic: whether it takes other sizes (multiples of ``stride``) than ``imgsz``.
    """

    def __init__(self, network: Network, facts: ExportFacts, path: Path) -> None:
        self.network, self.facts, self.path = network, facts, path

    @property
    def names(self) -> tuple[str, ...]:
        return self.facts.names

    @property
    def nc(self) -> int:
        return len(self.facts.names)

    @property
    def ch(self) -> int:
        return self.facts.ch

    @property
    def stride(self) -> int:
        return self.facts.stride

    @property
    def imgsz(self) -> tuple[int, int]:
        return self.facts.imgsz

    @property
    def dynamic(self) -> bool:
        return self.facts.dynamic

    @torch.no_grad()
    def predict(self, images: Tensor) -> Predictions:
        """Boxes (B, N, 4) xyxy px and scores (B, N, nc) for images (B, ch, H, W) in 0-1, on the images' device.

        A file of fixed batch size is run as often as it takes, the last time with blank images beside the rest. A file with suppression
        inside gives its detections as predictions whose other scores are zero, so that suppressing them again changes nothing.

        Raises:
            UserError: the size is not one that the file takes, or what comes out is no detection.
        """
        self._check_size(images)
        found = [self._run(part) for part in (images.split(self.facts.batch) if not self.dynamic else (images,))]
        return Predictions(*(torch.cat(parts) for parts in zip(*found)))

    def _check_size(self, images: Tensor) -> None:
        channels, height, width = images.shape[1:]
        if channels != self.ch:
            raise UserError(f"{self.path}: takes images of {self.ch} channels, not {channels}")
        if not self.dynamic and (height, width) != self.imgsz:
            only = f"--imgsz {self.imgsz[0]} {self.imgsz[1]}"
            raise UserError(f"{self.path}: made for one size, not for {height}x{width} px; give {only}, or export it with --dynamic")
        if height % self.stride or width % self.stride:
            raise UserError(f"{self.path}: {height}x{width} px: sides must be multiples of {self.stride}")

    def _run(self, images: Tensor) -> Predictions:
        count = len(images)
        missing = 0 if self.dynamic else self.facts.batch - count
        outputs = [o.to(images.device) for o in self.network(F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)))]
        self._check_outputs(outputs)
        boxes, scores = decode_detections(outputs, self.nc) if self.facts.end2end else _decode_all(outputs[0], self.nc)
        return Predictions(boxes[:count], scores[:count])

    def _check_outputs(self, outputs: Sequence[Tensor]) -> None:
        if self.facts.end2end:
            if len(outputs) != 4:
                raise UserError(f"{self.path}: gives {len(outputs)} outputs, four were to come; export the model again with export.py")
        elif len(outputs) != 1 or outputs[0].ndim != 3 or outputs[0].shape[1] != 4 + self.nc:
            shapes = ", ".join(str(tuple(o.shape)) for o in outputs)
            wanted = f"one output (batch, {4 + self.nc}, boxes) is needed for {self.nc} classes"
            raise UserError(f"{self.path}: gives {shapes}; {wanted}: export the model with export.py")


def load_exported(path: str | Path, *, device: torch.device | str = "cpu") -> ExportedModel:
    """Opens an ``.onnx`` or ``.torchscript`` file.

    Raises:
        UserError: no such file, a damaged or foreign one, or a package that is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: only {' and '.join(SUFFIXES)} exports can be run")
    opened = _open_onnx if path.suffix.lower() == ".onnx" else _open_torchscript
    return ExportedModel(*opened(path, torch.device(device)), path)


def _open_onnx(path: Path, device: torch.device) -> tuple[Network, ExportFacts]:
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"{path}: needs the package onnxruntime: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only; they come back as exceptions as well
    providers = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        else:
            print(f"{path}: runs on the CPU, because this onnxruntime has no CUDA (pip install onnxruntime-gpu)")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # its exceptions share no base of their own
        raise UserError(f"{path}: not an ONNX model, or a damaged one ({_first_line(error)})") from None
    entry, name = session.get_inputs()[0], str(path)
    dtype = torch.float16 if "float16" in entry.type else torch.float32
    if len(session.get_inputs()) != 1 or len(entry.shape) != 4:
        raise UserError(f"{path}: takes {[i.shape for i in session.get_inputs()]}; one input (batch, channels, height, width) is needed")

    def network(images: Tensor) -> list[Tensor]:
        arrays = session.run(None, {entry.name: images.to("cpu", dtype).numpy()})
        return [torch.from_numpy(array) for array in arrays]

    facts = ExportFacts.from_metadata(session.get_modelmeta().custom_metadata_map, source=name)
    batch, channels, *size = entry.shape
    fixed = all(isinstance(side, int) for side in (batch, *size))  # symbolic sides are text or None
    facts = replace(facts, ch=channels if isinstance(channels, int) else facts.ch, dynamic=not fixed)
    if fixed:
        facts = replace(facts, batch=batch, imgsz=(size[0], size[1]))
    shape = session.get_outputs()[0].shape
    return network, _named(facts, shape[1] - 4 if len(shape) == 3 and isinstance(shape[1], int) else 0, path)


def _open_torchscript(path: Path, device: torch.device) -> tuple[Network, ExportFacts]:
    extra = {CONFIG_FILE: ""}
    try:
        with torchscript_warnings():
            module = torch.jit.load(str(path), map_location=device, _extra_files=extra).eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: not a TorchScript export, or a damaged one ({_first_line(error)})") from None
    try:
        metadata = json.loads(extra[CONFIG_FILE] or "{}")
    except json.JSONDecodeError:
        raise UserError(f"{path}: its {CONFIG_FILE} cannot be understood; export it again with export.py") from None
    if device.type != "cpu":
        move_constants(module, device)
    dtype = next((p.dtype for p in module.parameters()), torch.float32)

    def network(images: Tensor) -> Sequence[Tensor]:
        output = module(images.to(device, dtype))
        return (output,) if isinstance(output, Tensor) else tuple(o for o in output if isinstance(o, Tensor))

    return network, _named(ExportFacts.from_metadata(metadata, source=str(path)), 0, path)


def move_constants(module: torch.jit.ScriptModule, device: torch.device) -> None:
    """Lets the graph make its own tensors (grids of cells) on ``device``; a trace names the device it was made on, loading keeps it."""
    for part in module.modules():
        if not part._c._has_method("forward"):  # type: ignore[attr-defined]
            continue  # a container that the trace never calls
        for node in part.graph.findAllNodes("prim::Constant"):  # type: ignore[attr-defined]
            if node.output().type().kind() == "DeviceObjType":
                node.s_("value", str(device))


def _named(facts: ExportFacts, classes: int, path: Path) -> ExportFacts:
    if facts.names:
        return facts
    if classes < 1:
        raise UserError(f"{path}: holds no class names, so it was not made by export.py; export the model with it")
    return replace(facts, names=tuple(f"class{i}" for i in range(classes)))


def _decode_all(output: Tensor, nc: int) -> Predictions:
    """From the one output (B, 4 + nc, N)."""
    boxes_cxcywh, scores = output.float().transpose(1, 2).split((4, nc), dim=2)  # (B, N, 4), (B, N, nc)
    return Predictions(cxcywh_to_xyxy(boxes_cxcywh), scores)


def decode_detections(outputs: Sequence[Tensor], nc: int) -> Predictions:
    """From num_dets (B, 1), det_boxes (B, K, 4) xyxy px, det_scores (B, K) and det_classes (B, K)."""
    counts, boxes, found, classes = outputs
    valid = torch.arange(found.shape[1], device=found.device)[None] < counts  # (B, K)
    scores = torch.zeros(*found.shape, nc, device=found.device)
    scores.scatter_(2, classes.long().clamp(0, nc - 1)[..., None], (found.float() * valid)[..., None])
    return Predictions(boxes.float(), scores)


@contextmanager
def torchscript_warnings() -> Iterator[None]:
    """Hides the notices that TorchScript is to be replaced: it is what users' files are, and the exporter of choice for now."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`?torch\.jit\.", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"`?torch\.jit\.", category=DeprecationWarning)
        yield


def _literal(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
