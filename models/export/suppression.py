"""Suppression inside an ONNX file: a network whose outputs are detections, by the standard operator NonMaxSuppression."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from models.model import Model

DETECTIONS = ("num_dets", "det_boxes", "det_scores", "det_classes")  # outputs of the file
DECODED = ("boxes", "scores")  # tensors inside, from which they are made


class End2EndNetwork(nn.Module):
    """A deployed Model followed by suppression.

    Args:
        detector: already deployed.
        topk, iou, conf: see Suppression.
    """

    def __init__(self, detector: Model, *, topk: int = 100, iou: float = 0.45, conf: float = 0.25) -> None:
        super().__init__()
        self.detector = detector
        self.suppression = Suppression(topk=topk, iou=iou, conf=conf)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, ch, H, W) in 0-1 to DETECTIONS and then DECODED, as Suppression and the head describe them."""
        boxes, scores = self.detector.head.decode(self.detector(images))
        return (*self.suppression(boxes, scores), boxes, scores)


class Suppression(nn.Module):
    """Suppression within each class, as tensors of a size that does not depend on what is found.

    Args:
        topk: detections an image at the most; also the length of the outputs.
        iou: boxes of one class that overlap a better one by more than this are dropped.
        conf: only scores above this take part.
    """

    def __init__(self, *, topk: int, iou: float, conf: float) -> None:
        super().__init__()
        self.topk, self.iou, self.conf = topk, iou, conf

    def forward(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes (B, N, 4) xyxy px, scores (B, N, nc) to counts (B, 1) int32, boxes (B, topk, 4), scores (B, topk), classes (B, topk) int32.

        Best score first; rows after the count are zero.
        """
        best, classes = scores.max(dim=2)  # (B, N); a box counts for its best class only
        candidates = torch.where(F.one_hot(classes, scores.shape[2]).bool(), scores, torch.zeros_like(scores))
        chosen = _Operator.apply(boxes, candidates.transpose(1, 2), self.topk, self.iou, self.conf)  # (K, 3) image, class, box
        kept = torch.zeros_like(best).index_put((chosen[:, 0], chosen[:, 2]), torch.ones_like(chosen[:, 0], dtype=best.dtype))
        # Room for topk rows even where there are fewer boxes than that.
        best, boxes, classes = F.pad(best * kept, (0, self.topk)), F.pad(boxes, (0, 0, 0, self.topk)), F.pad(classes, (0, self.topk))
        det_scores, index = best.topk(self.topk, dim=1)  # (B, topk)
        valid = det_scores > 0
        det_boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4)) * valid[..., None]
        det_classes = classes.gather(1, index) * valid
        return valid.sum(dim=1, keepdim=True).int(), det_boxes, det_scores, det_classes.int()


class _Operator(torch.autograd.Function):
    """NonMaxSuppression as ONNX defines it: within each image and class, rows of [image, class, box] that are kept."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, most: int, iou: float, conf: float) -> Tensor:
        """Boxes (B, N, 4) xyxy and scores (B, C, N) to (K, 3) int64. For tracing and comparison; the file runs the operator."""
        rows = [torch.zeros(0, 3, dtype=torch.int64, device=boxes.device)]
        for image, label in (scores > conf).any(dim=2).nonzero().tolist():
            above = (scores[image, label] > conf).nonzero().flatten()
            kept = above[nms(boxes[image, above], scores[image, label, above], iou)[:most]]
            rows.append(F.pad(kept[:, None], (2, 0)) + kept.new_tensor([image, label, 0]))
        return torch.cat(rows)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, most: int, iou: float, conf: float) -> Any:
        constants = (
            g.op("Constant", value_t=value) for value in (torch.tensor([most]), torch.tensor([iou]).float(), torch.tensor([conf]).float())
        )
        return g.op("NonMaxSuppression", boxes, scores, *constants)


def telling_threshold(scores: Tensor, *, least: int = 8, most: int = 64) -> float:
    """A confidence that ``least`` to ``most`` boxes of the first image exceed, in the widest gap between two of their scores (B, N, nc)."""
    best = scores[0].amax(dim=1).double().sort(descending=True).values[: most + 1]  # (n,)
    if len(best) < 2:
        return 0.0
    first = min(least - 1, len(best) - 2)
    above, below = best[first:-1], best[first + 1 :]
    widest = int((above - below).argmax())
    return float(above[widest] + below[widest]) / 2


@contextmanager
def probing_copy(path: Path, conf: float) -> Iterator[Path]:
    """A copy of an end-to-end ONNX file with another confidence threshold, and DECODED among its outputs; gone after the block."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    proto = onnx.load(path)
    name = next(node.input[4] for node in proto.graph.node if node.op_type == "NonMaxSuppression")
    value = numpy_helper.from_array(torch.tensor([conf]).float().numpy(), name)
    for node in proto.graph.node:
        if node.op_type == "Constant" and node.output[0] == name:
            node.attribute[0].t.CopyFrom(value)
    for initializer in proto.graph.initializer:
        if initializer.name == name:
            initializer.CopyFrom(value)
    proto.graph.output.extend(helper.make_tensor_value_info(output, TensorProto.FLOAT, None) for output in DECODED)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        onnx.save(proto, copy)
        yield copy
