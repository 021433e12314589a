"""Whether an exported file computes what torch computes: boxes and scores compared separately, on several inputs and sizes."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models.export.end2end import Suppression, probing_copy, telling_threshold
from models.export.runtimes import ExportFacts, decode_detections, load_exported
from models.model import Model
from utils.types import Predictions

BOX_TOLERANCE_PX, SCORE_TOLERANCE = 1e-3, 1e-4
# Logits of a trained network can be so large that float32 itself leaves more than a thousandth of a pixel. Then a file may differ from
# torch by this many times torch's own rounding, measured against float64 on the same inputs, and never by more than the limit.
ROUNDINGS, ROUNDING_LIMIT_PX = 4.0, 1e-2


class Agreement(NamedTuple):
    """The largest difference between an exported file and torch, over all inputs that were tried."""

    boxes_px: float
    scores: float
    shapes: tuple[tuple[int, ...], ...]  # of the inputs
    allowed_px: float = BOX_TOLERANCE_PX

    @property
    def holds(self) -> bool:
        return self.boxes_px < self.allowed_px and self.scores < SCORE_TOLERANCE  # false for NaN

    def __str__(self) -> str:
        sizes = ", ".join("x".join(map(str, shape)) for shape in self.shapes)
        return (
            f"differs from torch by at most {self.boxes_px:.1e} px and {self.scores:.1e} in score "
            f"(allowed {self.allowed_px:.2g}{self._why} and {SCORE_TOLERANCE:g}; inputs {sizes})"
        )

    @property
    def _why(self) -> str:
        return f", {ROUNDINGS:g} times torch's own rounding," if self.allowed_px > BOX_TOLERANCE_PX else ""


def compare(deployed: Model, path: Path, facts: ExportFacts) -> Agreement:
    """Runs the file and torch on random images: two of the exported size, and where it is dynamic also two other sizes, one as a batch."""
    shapes = [(facts.batch, facts.ch, *facts.imgsz)] * 2
    if facts.dynamic:
        shapes += [(2, facts.ch, 5 * facts.stride, 7 * facts.stride), (1, facts.ch, 9 * facts.stride, 3 * facts.stride)]
    inputs = [torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed, shape in enumerate(shapes)]
    differences = _end2end_differences if facts.end2end else _plain_differences
    boxes_px, scores = (max(values) for values in zip(*differences(deployed, path, facts, inputs)))
    agreement = Agreement(boxes_px, scores, tuple(dict.fromkeys(shapes)))
    if BOX_TOLERANCE_PX <= boxes_px < ROUNDING_LIMIT_PX:
        allowed = min(ROUNDINGS * _rounding_px(deployed, inputs), ROUNDING_LIMIT_PX)
        agreement = agreement._replace(allowed_px=max(BOX_TOLERANCE_PX, allowed))
    return agreement


def _rounding_px(deployed: Model, inputs: list[Tensor]) -> float:
    """The largest difference of a coordinate between torch in float32 and in float64, px."""
    exact = copy.deepcopy(deployed).double()
    return max(largest_differences(exact.predict(images.double()), deployed.predict(images))[0] for images in inputs)


def _plain_differences(deployed: Model, path: Path, facts: ExportFacts, inputs: list[Tensor]) -> list[tuple[float, float]]:
    exported = load_exported(path)
    return [largest_differences(deployed.predict(images), exported.predict(images)) for images in inputs]


def _end2end_differences(deployed: Model, path: Path, facts: ExportFacts, inputs: list[Tensor]) -> list[tuple[float, float]]:
    """Compares what goes into the file's suppression with torch, and what comes out of it with torch's suppression of the same.

    The two steps are apart because which of two boxes wins can hang on the last bit of a score. The threshold is one that lets some boxes
    through: noise gives none at the usual ones.
    """
    conf = telling_threshold(deployed.predict(inputs[0]).scores)
    suppress = Suppression(topk=facts.topk, iou=facts.iou, conf=conf)
    found = []
    with probing_copy(path, conf) as probe:
        exported = load_exported(probe)
        for images in inputs:
            *detections, boxes, scores = exported.network(images)
            expected = decode_detections(suppress(boxes, scores), len(facts.names))
            found.append(largest_differences(deployed.predict(images), Predictions(boxes, scores)))
            found.append(_of_detections(expected, decode_detections(detections, len(facts.names))))
    return found


def largest_differences(expected: Predictions, got: Predictions) -> tuple[float, float]:
    """The largest difference of a coordinate in px, and of a score."""
    if expected.boxes.shape != got.boxes.shape or expected.scores.shape != got.scores.shape:
        return math.inf, math.inf
    boxes, scores = (float((e - g).abs().nan_to_num(nan=math.inf).max()) for e, g in zip(expected, got))
    return boxes, scores


def _of_detections(expected: Predictions, got: Predictions) -> tuple[float, float]:
    """The same where each box is matched with the nearest of its class and score: equal scores may come in another order."""
    worst_px, worst_score = 0.0, 0.0
    for boxes_a, scores_a, boxes_b, scores_b in zip(*expected, *got):
        a, b = scores_a.amax(dim=1) > 0, scores_b.amax(dim=1) > 0
        if a.sum() != b.sum():
            return math.inf, math.inf
        if not a.any():
            continue
        px = (boxes_a[a][:, None] - boxes_b[b][None]).abs().amax(dim=2)  # (n, n)
        score = (scores_a[a][:, None] - scores_b[b][None]).abs().amax(dim=2)
        unlike = (px + score).nan_to_num(nan=math.inf)
        for partner, dim in ((unlike.argmin(dim=1, keepdim=True), 1), (unlike.argmin(dim=0, keepdim=True), 0)):
            worst_px = max(worst_px, float(px.gather(dim, partner).max()))
            worst_score = max(worst_score, float(score.gather(dim, partner).max()))
    return worst_px, worst_score
