"""Exports: a deployed network traced into a file that other programs run; no file is called done that does not agree with torch."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from models.export.end2end import DECODED, DETECTIONS, End2EndNetwork
from models.export.parity import Agreement, compare
from models.export.runtimes import CONFIG_FILE, ExportFacts, torchscript_warnings
from models.model import Model
from utils.boxes import xyxy_to_cxcywh
from utils.errors import UserError, nearest
from utils.files import atomic_write

OPSETS = (11, 20)  # what torch's TorchScript-based exporter writes
CONVERT = "export onnx and convert the file with"
REFUSED = {
    "openvino": f"needs OpenVINO; {CONVERT} its ovc",
    "engine": f"needs TensorRT and its GPU; {CONVERT} trtexec --onnx=best.onnx --saveEngine=best.engine",
    "coreml": "needs coremltools; export torchscript and convert the file with coremltools.convert",
    "saved_model": f"needs TensorFlow; {CONVERT} onnx2tf",
    "pb": f"needs TensorFlow; {CONVERT} onnx2tf",
    "tflite": f"needs TensorFlow; {CONVERT} onnx2tf",
    "edgetpu": f"needs TensorFlow and edgetpu_compiler; {CONVERT} onnx2tf",
    "tfjs": f"needs TensorFlow; {CONVERT} onnx2tf, then tensorflowjs_converter",
    "paddle": f"needs PaddlePaddle; {CONVERT} x2paddle",
    "ncnn": "needs ncnn; export torchscript and convert the file with pnnx",
}


@dataclass(frozen=True)
class ExportOptions:
    """How a file is made; what only one format has is ignored by the others."""

    imgsz: tuple[int, int] = (640, 640)  # height, width in px
    batch_size: int = 1
    dynamic: bool = False  # batch, height and width of the input are free (sides in multiples of the stride)
    opset: int = 17  # ONNX
    simplify: bool = False  # ONNX, with the package onnxslim or onnx-simplifier
    topk: int = 100  # suppression inside: detections an image
    iou: float = 0.45
    conf: float = 0.25


class ExportedNetwork(nn.Module):
    """A deployed Model as one tensor in, one tensor out.

    Args:
        detector: already deployed.
    """

    def __init__(self, detector: Model) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Tensor:
        """(B, ch, H, W) in 0-1 to (B, 4 + nc, N): centre, width and height in px, then scores."""
        boxes, scores = self.detector.head.decode(self.detector(images))
        return torch.cat((xyxy_to_cxcywh(boxes), scores), dim=2).transpose(1, 2)


def export_model(model: Model, file_format: str, path: Path, options: ExportOptions) -> Agreement:
    """Deploys ``model``, writes it to ``path`` and compares the file with torch; ``path`` only comes to be where they agree.

    Raises:
        UserError: an unknown or refused format, an option out of range, a disk that cannot be written, or a file that disagrees with torch.
    """
    exporter = exporter_for(file_format)
    _check(options, model)
    deployed = model.deploy()
    try:
        with atomic_write(path) as unverified:
            with _expected_warnings(), torch.no_grad():
                facts = exporter(deployed, unverified, options)
            agreement = compare(deployed, unverified, facts)
            if not agreement.holds:
                raise UserError(f"{path}: not written, because the {file_format} export {agreement}")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    return agreement


def exporter_for(file_format: str) -> Exporter:
    """The function that writes a format.

    Raises:
        UserError: an unknown format, or one that is made with another program (it says how).
    """
    if file_format in EXPORTERS:
        return EXPORTERS[file_format]
    if file_format in REFUSED:
        raise UserError(f"--include {file_format}: {REFUSED[file_format]}")
    hint = nearest(file_format, (*EXPORTERS, *REFUSED))
    raise UserError(f"--include {file_format}: unknown format{', ' + hint if hint else ''} (known are {', '.join(EXPORTERS)})")


def output_path(weights: Path, file_format: str) -> Path:
    """Where the export of ``weights`` lies: beside it, such as best.onnx and best-end2end.onnx."""
    endings = {"torchscript": ".torchscript", "onnx": ".onnx", "onnx_end2end": "-end2end.onnx"}
    return weights.with_name(weights.stem + endings[file_format])


def export_torchscript(deployed: Model, path: Path, options: ExportOptions) -> ExportFacts:
    """Traces the network; class names and sizes go into the archive as ``config.txt``."""
    facts = _facts(deployed, options)
    with torchscript_warnings():
        traced = torch.jit.trace(ExportedNetwork(deployed), _example(deployed, options), check_trace=False)  # compare() checks more
        traced.save(str(path), _extra_files={CONFIG_FILE: json.dumps(facts.to_metadata())})
    return facts


def export_onnx(deployed: Model, path: Path, options: ExportOptions) -> ExportFacts:
    """Writes ``images`` -> ``output0``, with class names and sizes as metadata properties."""
    facts = _facts(deployed, options)
    axes = {"images": {0: "batch", 2: "height", 3: "width"}, "output0": {0: "batch", 2: "boxes"}} if options.dynamic else None
    _write_onnx(ExportedNetwork(deployed), path, options, facts=facts, outputs=["output0"], axes=axes)
    return facts


def export_onnx_end2end(deployed: Model, path: Path, options: ExportOptions) -> ExportFacts:
    """Writes ``images`` -> ``num_dets``, ``det_boxes``, ``det_scores``, ``det_classes``: suppression is inside."""
    facts = replace(_facts(deployed, options), end2end=True, topk=options.topk, iou=options.iou, conf=options.conf)
    axes = {"images": {0: "batch", 2: "height", 3: "width"}, **{name: {0: "batch"} for name in DETECTIONS}} if options.dynamic else None
    network = End2EndNetwork(deployed, topk=options.topk, iou=options.iou, conf=options.conf)
    _write_onnx(network, path, options, facts=facts, outputs=[*DETECTIONS, *DECODED], axes=axes)
    return facts


Exporter = Callable[[Model, Path, ExportOptions], ExportFacts]
EXPORTERS: dict[str, Exporter] = {"torchscript": export_torchscript, "onnx": export_onnx, "onnx_end2end": export_onnx_end2end}


Axes = dict[str, dict[int, str]]


def _write_onnx(
    network: nn.Module, path: Path, options: ExportOptions, *, facts: ExportFacts, outputs: list[str], axes: Axes | None
) -> None:
    try:
        import onnx
    except ImportError:
        raise UserError("--include onnx: needs the package onnx: pip install onnx") from None
    torch.onnx.export(
        network,
        (_example(network.detector, options),),
        str(path),
        dynamo=False,
        opset_version=options.opset,
        input_names=["images"],
        output_names=outputs,
        dynamic_axes=axes,
    )
    proto = onnx.load(path)
    if options.simplify:
        proto = _simplified(proto)
    for inner in [output for output in proto.graph.output if output.name in DECODED]:
        proto.graph.output.remove(inner)  # still computed; agreement.py makes them outputs again to compare them
    for key, value in facts.to_metadata().items():
        proto.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


def _simplified(proto: object) -> object:
    """The graph after onnxslim or onnx-simplifier, whichever is installed."""
    try:
        import onnxslim
    except ImportError:
        pass
    else:
        return onnxslim.slim(proto)
    try:
        import onnxsim
    except ImportError:
        raise UserError("--simplify: needs the package onnxslim: pip install onnxslim, or leave --simplify out") from None
    simplified, agrees = onnxsim.simplify(proto)
    if not agrees:
        raise UserError("--simplify: onnx-simplifier changed what the model computes; leave --simplify out")
    return simplified


def _facts(deployed: Model, options: ExportOptions) -> ExportFacts:
    return ExportFacts(
        names=deployed.names,
        stride=deployed.stride,
        imgsz=options.imgsz,
        batch=options.batch_size,
        ch=deployed.ch,
        dynamic=options.dynamic,
    )


def _example(deployed: Model, options: ExportOptions) -> Tensor:
    shape = (options.batch_size, deployed.ch, *options.imgsz)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def _check(options: ExportOptions, model: Model) -> None:
    if any(side < 1 or side % model.stride for side in options.imgsz):
        height, width = (max(math.ceil(side / model.stride), 1) * model.stride for side in options.imgsz)
        raise UserError(f"--imgsz {options.imgsz[0]} {options.imgsz[1]}: multiples of {model.stride} are needed, such as {height} {width}")
    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size}: at least 1 is needed")
    if not OPSETS[0] <= options.opset <= OPSETS[1]:
        raise UserError(f"--opset {options.opset}: {OPSETS[0]} to {OPSETS[1]} can be written; 17 is the default")
    if options.topk < 1:
        raise UserError(f"--topk-all {options.topk}: at least 1 is needed")
    for name, value in (("--iou-thres", options.iou), ("--conf-thres", options.conf)):
        if not 0 <= value <= 1:
            raise UserError(f"{name} {value:g}: a number in 0-1 is needed")


@contextmanager
def _expected_warnings() -> Iterator[None]:
    """Hides what tracing always says, so that anything else is seen.

    Sizes that Python reads while tracing become constants of the file: meant where the size is fixed, and where it is not, compare() runs
    other sizes, which is a test where the warning is only a suspicion.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", message="You are using the legacy TorchScript-based ONNX export", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="Constant folding - Only steps=1", category=UserWarning)  # it is run instead
        warnings.filterwarnings("ignore", message="The feature will be removed", category=DeprecationWarning, module="torch.onnx")
        yield
