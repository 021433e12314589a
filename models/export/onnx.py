"""The format ``onnx``: one graph with the task's outputs, its metadata as properties; run by onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.export.facts import ExportFacts
from models.export.registry import ExportFormat, OpenedFile, register_format
from utils.errors import UserError, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models.export.source import ExportSource

IMAGES = "images"  # name of the input
OPSET_HINT = "give --opset 17, the default, or more"


def write_onnx(source: ExportSource, path: Path) -> None:
    """Writes ``images`` -> the outputs of the source, with names and sizes as metadata properties.

    Raises:
        UserError: the operator set lacks an operator of the network, or the graph is to be simplified and no package for that is installed,
            or simplifying changes the result.
    """
    import onnx

    _trace(source, path)
    proto: Any = onnx.load(path)
    if source.options.simplify:
        proto = _simplified(proto)
    for inner in [output for output in proto.graph.output if output.name in source.candidates]:
        proto.graph.output.remove(inner)  # still computed: expose_candidates makes them outputs again to compare them
    _fix_known_sides(proto, source)
    for key, value in source.facts.to_metadata().items():
        proto.metadata_props.add(key=key, value=value)
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


def _trace(source: ExportSource, path: Path) -> None:
    """Writes the graph of the network."""
    import torch
    from torch.onnx.errors import OnnxExporterError

    axes = {IMAGES: {0: "batch", 2: "height", 3: "width"}, **source.outputs}
    try:
        with _without_printed_graphs():
            torch.onnx.export(
                source.network,
                (source.example,),
                str(path),
                dynamo=False,
                opset_version=source.options.opset,
                input_names=[IMAGES],
                output_names=list(source.outputs),
                dynamic_axes={name: dict(free) for name, free in axes.items() if free} if source.facts.dynamic else None,
            )
    except OnnxExporterError as error:
        raise UserError(f"--opset {source.options.opset}: cannot hold this network ({first_line(error)}); {OPSET_HINT}") from None


@contextmanager
def _without_printed_graphs() -> Iterator[None]:
    """Hides the graph, thousands of lines, that the exporter prints before it raises."""
    import torch

    prints: Any = getattr(torch._C, "_jit_onnx_log", None)
    if prints is None:
        yield
        return
    torch._C._jit_onnx_log = lambda *_: None
    try:
        yield
    finally:
        torch._C._jit_onnx_log = prints


def _fix_known_sides(proto: Any, source: ExportSource) -> None:
    """Writes the sides of the outputs that no input changes, such as 4 + classes, in place of the names that the exporter gives them."""
    import torch

    with torch.no_grad():
        made = source.network(source.example)
    tensors = dict(zip(source.outputs, (made,) if isinstance(made, torch.Tensor) else made, strict=True))
    for output in proto.graph.output:
        free = source.outputs[output.name] if source.facts.dynamic else ()
        for axis, (side, length) in enumerate(zip(output.type.tensor_type.shape.dim, tensors[output.name].shape, strict=True)):
            if axis not in free:
                side.dim_value = length


def open_onnx(path: Path, device: torch.device) -> OpenedFile:
    """Opens a graph with onnxruntime; without its CUDA provider it runs on the CPU.

    Raises:
        UserError: onnxruntime is not installed, or the file is no ONNX model, damaged, or takes other inputs than a batch of images.
    """
    import torch

    from utils.memory import is_out_of_memory

    session = _start_session(path, device)
    entry = session.get_inputs()[0]
    dtype = torch.float16 if "float16" in entry.type else torch.float32
    if len(session.get_inputs()) != 1 or len(entry.shape) != 4:
        raise UserError(f"{path}: takes {[i.shape for i in session.get_inputs()]}; one input (batch, channels, height, width) is needed")

    def run(images: Tensor) -> Sequence[Tensor]:
        try:
            return [torch.from_numpy(array) for array in session.run(None, {entry.name: images.to("cpu", dtype).numpy()})]
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            if is_out_of_memory(error):
                raise
            raise UserError(f"{path}: cannot be run ({first_line(error)})") from None

    facts = ExportFacts.from_metadata(session.get_modelmeta().custom_metadata_map, source=str(path))
    batch, channels, *size = entry.shape
    fixed = all(isinstance(side, int) for side in (batch, *size))  # symbolic sides are text or None
    facts = replace(facts, ch=channels if isinstance(channels, int) else facts.ch, dynamic=not fixed)
    if fixed:
        facts = replace(facts, batch=batch, imgsz=(size[0], size[1]))
    shapes = tuple(tuple(side if isinstance(side, int) else None for side in output.shape) for output in session.get_outputs())
    return OpenedFile(run, facts, shapes)


def _start_session(path: Path, device: torch.device) -> Any:
    """An onnxruntime.InferenceSession."""
    import torch

    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"{path}: needs the package onnxruntime: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only; they come back as exceptions as well
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
        else:
            print(f"{path}: runs on the CPU, because this onnxruntime has no CUDA (pip install onnxruntime-gpu)")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # its exceptions share no base of their own
        raise UserError(f"{path}: not an ONNX model, or a damaged one ({first_line(error)})") from None


def _simplified(proto: Any) -> Any:
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


ONNX = register_format(
    ExportFormat(
        name="onnx",
        suffix=".onnx",
        write=write_onnx,
        open=open_onnx,
        help="one graph, run by onnxruntime and others",
        needs=("onnx", "onnxruntime"),
        with_nms="onnx_end2end",
    )
)
