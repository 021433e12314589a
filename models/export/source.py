"""What a writer receives: the network to write, an example of its input, its outputs and its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.analysis.tolerance import check_tolerance
from models.export.facts import ExportFacts
from utils.errors import UserError
from utils.sizes import round_up_to_stride

if TYPE_CHECKING:
    from torch import Tensor, nn

OPSETS = (11, 20)  # what torch's TorchScript-based exporter writes


@dataclass(frozen=True)
class ExportOptions:
    """How a file is made; options that only one format has are ignored by the others."""

    imgsz: tuple[int, int] = (640, 640)  # height, width in px
    batch_size: int = 1
    dynamic: bool = False  # batch, height and width of the input are free (sides in multiples of the stride)
    opset: int = 17  # ONNX
    simplify: bool = False  # ONNX, with the package onnxslim or onnx-simplifier
    topk: int = 100  # suppression inside: detections an image
    iou: float = 0.45
    conf: float = 0.25
    tolerance: tuple[float, float] | None = None  # allowed differences from torch in px and in score; None: those of the task

    def validate(self, *, stride: int) -> None:
        """Checks every option, and the image size against the stride of the network in px.

        Raises:
            UserError: an option out of range.
        """
        if any(side < 1 or side % stride for side in self.imgsz):
            height, width = (round_up_to_stride(side, stride) for side in self.imgsz)
            raise UserError(f"--imgsz {self.imgsz[0]} {self.imgsz[1]}: multiples of {stride} are needed, such as {height} {width}")
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: at least 1 is needed")
        if not OPSETS[0] <= self.opset <= OPSETS[1]:
            raise UserError(f"--opset {self.opset}: {OPSETS[0]} to {OPSETS[1]} can be written; 17 is the default")
        if self.topk < 1:
            raise UserError(f"--topk-all {self.topk}: at least 1 is needed")
        for name, value in (("--iou-thres", self.iou), ("--conf-thres", self.conf)):
            if not 0 <= value <= 1:
                raise UserError(f"{name} {value:g}: a number in 0-1 is needed")
        if self.tolerance is not None:
            check_tolerance(self.tolerance)


@dataclass(frozen=True)
class ExportSource:
    """A deployed network, ready to be traced.

    Attributes:
        network: (B, ch, H, W) in 0-1 to the outputs: one tensor, or a tuple of several.
        example: an input of the exported size.
        outputs: names of the outputs in order -> their axes that are free in a dynamic file, and the names of these.
        facts: what goes into the file as metadata.
        options: what the user asked for.
        candidates: which outputs a file leaves out again (see ``ExportFormat.expose_candidates``).
    """

    network: nn.Module
    example: Tensor
    outputs: Mapping[str, Mapping[int, str]]
    facts: ExportFacts
    options: ExportOptions
    candidates: tuple[str, ...] = ()
