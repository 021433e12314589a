"""The command line of export.py: flags as YOLO users type them, to an ExportConfig."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli.flags import add_noted_flags, height_and_width
from utils.errors import UserError

# Flags of other YOLOs' export scripts that are refused: what to write instead.
REFUSED = {
    "--int8": "quantisation is not built; export onnx and quantise the file with onnxruntime.quantization",
    "--half": "exports are float32; export onnx and convert the file with onnxconverter-common, or run the .pt with detect.py --half",
    "--keras": "there is no TensorFlow export; export onnx and convert the file with onnx2tf",
    "--optimize": "there is no mobile optimisation; leave it out",
    "--workspace": "TensorRT is not called from here; export onnx and give trtexec --memPoolSize",
    "--agnostic-nms": "suppression inside a file is within classes; leave it out",
    "--topk-per-class": "one limit holds for all classes together; give --topk-all",
    "--max-wh": "suppression inside a file is an operator that needs no offset; leave it out",
}
# Flags that are accepted because what they ask for is so, or makes no difference.
ACCEPTED = {
    "--data": "class names come from the weights",
    "--device": "files are made on the CPU and run on any device",
    "--grid": "boxes are always decoded to px",
    "--inplace": "nothing to do",
    "--verbose": "nothing to do",
}


@dataclass(frozen=True)
class ExportConfig:
    """The flags of export.py."""

    weights: str = ""  # a checkpoint; empty means the newest run's best.pt
    imgsz: tuple[int, ...] = (640, 640)  # height and width in px, or one side
    batch_size: int = 1
    dynamic: bool = False
    simplify: bool = False
    opset: int = 17
    nms: bool = False  # onnx means onnx_end2end
    topk_all: int = 100
    iou_thres: float = 0.45
    conf_thres: float = 0.25
    include: tuple[str, ...] = ("torchscript", "onnx")
    download: bool = False
    plugins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "imgsz", height_and_width(self.imgsz))
        if not self.include:
            raise UserError("--include: at least one format is needed, such as onnx")
        for name in ("include", "plugins"):
            value = getattr(self, name)
            object.__setattr__(self, name, (str(value),) if isinstance(value, (str, Path)) else tuple(map(str, value)))


def parse_arguments(argv: Sequence[str] | None = None, *, epilog: str = "") -> ExportConfig:
    """Reads the command line; prefixes such as ``--batch`` and ``--img`` are accepted. ``epilog`` is the end of ``--help``.

    Raises:
        UserError: a flag that is refused by name, or an unusable value.
    """
    given = vars(build_parser(epilog).parse_args(argv))
    for flag in given.pop("refused", ()):
        raise UserError(f"{flag}: {REFUSED[flag]}")
    for flag in given.pop("accepted", ()):
        print(f"{flag}: {ACCEPTED[flag]}")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return ExportConfig(**values)


def build_parser(epilog: str = "") -> argparse.ArgumentParser:
    """Flags that are not given are not set, so that ExportConfig's defaults hold."""
    parser = argparse.ArgumentParser(
        prog="export.py",
        description="Exports a checkpoint.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--weights", metavar="PT", help="checkpoint (default: the newest run's best.pt)")
    parser.add_argument("--download", action="store_true", help="fetch published weights that are not on disk")
    parser.add_argument("--include", nargs="+", metavar="FORMAT", help="formats, listed below (default: torchscript onnx)")
    parser.add_argument("--imgsz", "--img", "--img-size", type=int, nargs="+", metavar="PX", help="height and width (default 640 640)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images a call, unless dynamic (default 1)")
    parser.add_argument("--dynamic", action="store_true", help="batch, height and width stay free")
    parser.add_argument("--simplify", action="store_true", help="ONNX: simplify the graph (needs onnxslim or onnx-simplifier)")
    parser.add_argument("--opset", type=int, metavar="N", help="ONNX: operator set (default 17)")
    parser.add_argument("--nms", "--end2end", action="store_true", help="ONNX: suppression inside, as --include onnx_end2end")
    parser.add_argument("--topk-all", type=int, metavar="N", help="suppression inside: detections an image (default 100)")
    parser.add_argument("--iou-thres", type=float, metavar="X", help="suppression inside: overlap that is dropped (default 0.45)")
    parser.add_argument("--conf-thres", type=float, metavar="X", help="suppression inside: least score (default 0.25)")
    parser.add_argument("--plugins", nargs="+", metavar="FILE", help="Python files of yours with modules or export formats")
    for dest, table in (("refused", REFUSED), ("accepted", ACCEPTED)):
        add_noted_flags(parser, table, dest=dest)
    return parser
