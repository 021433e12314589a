"""Whether an exported file computes what torch computes: boxes and scores compared separately, on several inputs and sizes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models.analysis.compare import PredictionDifference, matched_difference, prediction_difference
from models.export.facts import ExportFacts
from models.export.model import ExportedModel
from models.export.one_to_one import selection_difference
from models.export.registry import ExportFormat
from models.export.suppression import CANDIDATES, Suppression, decode_detections, threshold_in_widest_gap
from models.model import Model
from tasks import get_task
from utils.types import Predictions

# Logits of a trained network, and the maps of a hardly trained one, can be so large that float32 itself rounds boxes by more than a
# thousandth of a pixel, or scores by more than a ten-thousandth. Then a file may differ from torch by this many times torch's own rounding,
# measured against float64 on the same inputs, and never by more than the limits.
ROUNDINGS, ROUNDING_LIMITS = 4.0, PredictionDifference(boxes_px=1.0, scores=1e-2)


class Agreement(NamedTuple):
    """The largest difference between an exported file and torch over all inputs that were compared, and what is allowed."""

    boxes_px: float
    scores: float
    shapes: tuple[tuple[int, ...], ...]  # of the inputs
    allowed_px: float
    allowed_score: float
    by_rounding: bool = False  # whether torch's own rounding raised what is allowed

    @property
    def holds(self) -> bool:
        return self.boxes_px < self.allowed_px and self.scores < self.allowed_score  # false for NaN

    def __str__(self) -> str:
        sizes = ", ".join("x".join(map(str, shape)) for shape in self.shapes)
        reason = f", by {ROUNDINGS:g} times torch's own rounding" if self.by_rounding else ""
        return (
            f"differs from torch by at most {self.boxes_px:.1e} px and {self.scores:.1e} in score "
            f"(allowed {self.allowed_px:.2g} and {self.allowed_score:.2g}{reason}; inputs {sizes})"
        )


def compare(
    deployed: Model, path: Path, *, facts: ExportFacts, export_format: ExportFormat, tolerance: tuple[float, float] | None = None
) -> Agreement:
    """Runs the file and torch on random images: two of the exported size, and where it is dynamic also two other sizes, one as a batch.

    Args:
        deployed: what was exported.
        path: the file.
        facts: of the export.
        export_format: of the file.
        tolerance: allowed differences in px and in score, instead of those of the task.
    """
    shapes = [(facts.batch, facts.ch, *facts.imgsz)] * 2
    if facts.dynamic:
        shapes += [(2, facts.ch, 5 * facts.stride, 7 * facts.stride), (1, facts.ch, 9 * facts.stride, 3 * facts.stride)]
    inputs = [torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed, shape in enumerate(shapes)]
    compare_inputs = _compare_detections if export_format.has_suppression else _compare_predictions
    found = compare_inputs(deployed, path, facts, export_format, inputs)
    outputs = get_task(facts.task).outputs
    boxes, scores = (min(o.tolerance[part] for o in outputs if part in o.tolerance) for part in ("boxes", "scores"))
    usual = (boxes, scores)
    allowed_px, allowed_score = tolerance or usual
    agreement = Agreement(found.boxes_px, found.scores, tuple(dict.fromkeys(shapes)), allowed_px, allowed_score)
    within = found.boxes_px < ROUNDING_LIMITS.boxes_px and found.scores < ROUNDING_LIMITS.scores
    if tolerance or agreement.holds or not within:
        return agreement
    rounding = _rounding(deployed, inputs)
    allowed_px, allowed_score = (max(least, min(ROUNDINGS * own, most)) for least, own, most in zip(usual, rounding, ROUNDING_LIMITS))
    return agreement._replace(allowed_px=allowed_px, allowed_score=allowed_score, by_rounding=(allowed_px, allowed_score) != usual)


def _rounding(deployed: Model, inputs: list[Tensor]) -> PredictionDifference:
    """The largest differences between torch in float32 and in float64."""
    exact = copy.deepcopy(deployed).double()
    pairs = ((exact.predict(images.double()), deployed.predict(images)) for images in inputs)
    return PredictionDifference.largest(prediction_difference(expected, got) for expected, got in pairs)


def _compare_predictions(
    deployed: Model, path: Path, facts: ExportFacts, export_format: ExportFormat, inputs: list[Tensor]
) -> PredictionDifference:
    exported = _open(path, export_format)
    difference = selection_difference if deployed.head.one_to_one else prediction_difference
    return PredictionDifference.largest(difference(deployed.predict(x), exported.predict(x)) for x in inputs)


def _compare_detections(
    deployed: Model, path: Path, facts: ExportFacts, export_format: ExportFormat, inputs: list[Tensor]
) -> PredictionDifference:
    """Compares the candidates of the file's suppression with torch, and its detections with torch's suppression of the same candidates.

    The two steps are separate because which of two boxes wins can depend on the last bit of a score. The threshold is one that some boxes
    exceed: on noise, none exceeds the usual ones.
    """
    assert export_format.expose_candidates is not None
    nc = len(facts.names)
    conf = threshold_in_widest_gap(deployed.predict(inputs[0]).scores)
    suppress = Suppression(topk=facts.topk, iou=facts.iou, conf=conf)
    found = []
    with export_format.expose_candidates(path, conf) as copied:
        exported = _open(copied, export_format)
        for images in inputs:
            outputs = exported.run(images)
            detections, (boxes, scores) = outputs[: -len(CANDIDATES)], outputs[-len(CANDIDATES) :]
            found.append(prediction_difference(deployed.predict(images), Predictions(boxes, scores)))
            expected = decode_detections(suppress(boxes, scores), nc=nc)
            found.append(matched_difference(expected, decode_detections(detections, nc=nc)))
    return PredictionDifference.largest(found)


def _open(path: Path, export_format: ExportFormat) -> ExportedModel:
    opener = export_format.open_trusted or export_format.open  # this process has just written it
    return ExportedModel(opener(path, torch.device("cpu")), path)
