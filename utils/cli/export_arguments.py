"""The command line of export.py: flags as YOLO users type them, to an ExportConfig."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from utils.cli.command import Command
from utils.cli.flags import flag, validate_flags
from utils.cli.sizes import height_and_width
from utils.errors import UserError
from utils.sizes import MAX_SIDE_PX

MAX_TOPK = 100_000  # the outputs of a file have so many rows


@dataclass(frozen=True)
class ExportConfig:
    """The flags of export.py."""

    weights: str = flag("", "checkpoint (default: the newest run's best.pt)", metavar="PT")
    download: bool = flag(False, "fetch published weights that are not on disk")
    include: tuple[str, ...] = flag(("torchscript", "onnx"), "formats, listed below", metavar="FORMAT")
    imgsz: tuple[int, ...] | None = flag(
        None, "height and width, or one side (default: 640, 224 to classify)", aliases=("--img", "--img-size"), metavar="PX", least=1,
        most=MAX_SIDE_PX,
    )  # fmt: skip
    batch_size: int = flag(1, "images per call, unless dynamic", least=1)
    dynamic: bool = flag(False, "batch, height and width stay free")
    simplify: bool = flag(False, "ONNX: simplify the graph (needs onnxslim or onnx-simplifier)")
    opset: int = flag(17, "ONNX: operator set")
    nms: bool = flag(
        False, "ONNX: suppression inside, as --include onnx_end2end; of YOLOv10 and YOLO26 the one-to-many branch", aliases=("--end2end",)
    )
    topk_all: int = flag(100, "suppression inside: most detections per image", least=1, most=MAX_TOPK)
    iou_thres: float = flag(0.45, "suppression inside: overlap above which the box of lower score is dropped", least=0, most=1)
    conf_thres: float = flag(0.25, "suppression inside: lowest score", least=0, most=1)
    tolerance: tuple[float, ...] | None = flag(
        None, "allowed differences from torch, in px and in score (default: 0.001 0.0001, or four times torch's own rounding)",
        metavar="X",
    )  # fmt: skip
    plugins: tuple[str, ...] = flag((), "Python files of yours with modules or export formats", metavar="FILE")

    def __post_init__(self) -> None:
        validate_flags(self)
        if self.imgsz is not None:
            object.__setattr__(self, "imgsz", height_and_width(self.imgsz))
        if not self.include:
            raise UserError("--include: at least one format is needed, such as onnx")


COMMAND = Command(
    ExportConfig,
    prog="export.py",
    description="Exports a checkpoint.",
    refused={
        "--int8": "quantisation is not built; export onnx and quantise the file with onnxruntime.quantization",
        "--half": "exports are float32; export onnx and convert the file with onnxconverter-common, or run the .pt with detect.py --half",
        "--keras": "there is no TensorFlow export; export onnx and convert the file with onnx2tf",
        "--optimize": "there is no mobile optimisation; leave it out",
        "--workspace": "TensorRT is not called from here; export onnx and give trtexec --memPoolSize",
        "--agnostic-nms": "suppression inside a file is within classes; leave it out",
        "--topk-per-class": "one limit holds for all classes together; give --topk-all",
        "--max-wh": "suppression inside a file is an operator that needs no offset; leave it out",
    },
    accepted={
        "--data": "class names come from the weights",
        "--device": "files are made on the CPU and run on any device",
        "--grid": "boxes are always decoded to px",
        "--inplace": "nothing to do",
        "--verbose": "nothing to do",
    },
)


def parse_arguments(argv: Sequence[str] | None = None, *, epilog: str = "") -> ExportConfig:
    """Reads the command line; prefixes such as ``--batch`` and ``--img`` are accepted. ``epilog`` is the end of ``--help``.

    Raises:
        UserError: a flag that is refused by name, or an unusable value.
    """
    return ExportConfig(**COMMAND.read(argv, epilog=epilog))
