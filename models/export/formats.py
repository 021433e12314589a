"""The export formats that can be written and opened, found by name or by file ending, and those of other programs that are refused.

A built-in format is a module of this folder that registers itself, and its line among the imports below.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from models.export import onnx, onnx_end2end, torchscript
from models.export.registry import FORMATS, ExportFormat
from utils.errors import UserError, nearest

BUILTIN = (torchscript.TORCHSCRIPT, onnx.ONNX, onnx_end2end.ONNX_END2END)

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


def find_format(name: str) -> ExportFormat:
    """The format called ``name``.

    Raises:
        UserError: an unknown format, or one that another program makes (the message says which).
    """
    if name in FORMATS:
        return FORMATS[name]
    if name in REFUSED:
        raise UserError(f"--include {name}: {REFUSED[name]}")
    hint = nearest(name, (*FORMATS, *REFUSED))
    raise UserError(f"--include {name}: unknown format{', ' + hint if hint else ''} (known are {', '.join(FORMATS)})")


def format_of_file(path: Path) -> ExportFormat:
    """The format that opens a file, by its ending.

    Raises:
        UserError: no format has this ending.
    """
    for export_format in FORMATS.values():
        if export_format.suffix == path.suffix.lower():
            return export_format
    raise UserError(f"{path}: only {' and '.join(suffixes())} exports can be run")


def suffixes() -> tuple[str, ...]:
    """The endings of exported files."""
    return tuple(dict.fromkeys(export_format.suffix for export_format in FORMATS.values()))


def is_exported(path: str | Path) -> bool:
    """Whether the file is an exported network rather than a checkpoint."""
    return Path(path).suffix.lower() in suffixes()


def formats_to_write(names: Iterable[str], *, nms: bool) -> list[ExportFormat]:
    """The formats of ``--include``, each once; with ``nms`` those with suppression inside, where there is one.

    Raises:
        UserError: a format that is unknown or refused, or ``nms`` where none of them can hold suppression.
    """
    names = tuple(names)
    formats = [find_format(name) for name in names]
    if nms:
        if not any(f.with_nms or f.has_suppression for f in formats):
            able = " or ".join(f.name for f in FORMATS.values() if f.with_nms)
            raise UserError(f"--nms: only {able} files can hold suppression; add {able} to --include {' '.join(names)}")
        formats = [find_format(f.with_nms) if f.with_nms else f for f in formats]
    return list(dict.fromkeys(formats))


def describe_formats() -> str:
    """A line for each format, for ``--help``."""
    lines = (f"  {f.name:<14}{f.path_beside(Path('best.pt')).name}: {f.help}" for f in FORMATS.values())
    return "\n".join(("formats of --include:", *lines))
