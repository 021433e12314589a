"""Metrics of keypoints beside those of boxes: the same average precision over two similarities, overlap of boxes and OKS.

By the rule ``coco`` the keypoint part equals pycocotools with ``keypoints``: 20 detections of an image and class, objects without labelled
keypoints ignored, medium and large objects apart. The other rules count every object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from utils.metrics.average_precision import Array
from utils.metrics.matching import AREA_RANGES, Objects
from utils.metrics.metrics import CocoCounts, CocoRule, Compared, Metrics
from utils.metrics.oks import KeypointSimilarity, default_sigmas
from utils.metrics.paired import PairedAccumulator, PairedMetrics

MARK = "P"  # of the keypoints' columns, as published
KEYPOINT_STATS = ("AP", "AP50", "AP75", "AP_medium", "AP_large", "AR", "AR50", "AR75", "AR_medium", "AR_large")
MOST_DETECTIONS = 20  # of an image and class
IGNORED_AREA = 10 * AREA_RANGES.max()  # outside every range


class PoseAccumulator(PairedAccumulator):
    """Collects detections and objects with a field ``keypoints`` (n, K, 3) in px.

    Args:
        names: Class names.
        rule: As of :class:`MetricAccumulator`.
        sigmas: Of each keypoint for OKS; () for the usual ones.
    """

    def __init__(self, names: Sequence[str], *, rule: str = "coco", sigmas: Sequence[float] = ()) -> None:
        super().__init__(names, mark=MARK, noun="keypoint", rule=rule, fields=("keypoints",))
        self.sigmas = tuple(sigmas)

    @property
    def coco_kinds(self) -> dict[str, dict[str, Any]]:
        points = self.state()["fields"]["truth"].get("keypoints")
        usual = default_sigmas(points.shape[1]) if points is not None else ()
        return {"bbox": {}, "keypoints": {"sigmas": self.sigmas or usual}}

    def compute(self) -> PairedMetrics:  # type: ignore[override]
        """The metrics of everything that was added, boxes and keypoints."""
        boxes, keypoints = self.measure(super().compared()), self.measure(self.compared())
        return PairedMetrics(Metrics(**boxes), Metrics(**keypoints), self.mark, self.noun)

    def compared(self) -> Compared:
        """The keypoints."""
        dets, truth = self.objects()
        similarity = KeypointSimilarity(self.sigmas, by_box=self.rule == "coco")
        return Compared(_with_extent(dets), self._counted(truth), similarity, KEYPOINT_RULE)

    def _counted(self, truth: Objects) -> Objects:
        """The objects with their area as a field; by COCO's rule those without labelled keypoints have none that counts."""
        area = truth.area
        if self.rule == "coco" and len(area):
            labelled = (truth.fields["keypoints"][..., 2] > 0).any(axis=1)
            area = np.where(labelled, area, IGNORED_AREA)
        return truth._replace(area=area, fields={**truth.fields, "area": truth.area})


def _with_extent(dets: Objects) -> Objects:
    """Detections whose area is that of the extent of their keypoints, by which pycocotools leaves out small and large ones."""
    if not len(dets.image):
        return dets
    xy = dets.fields["keypoints"][..., :2].astype(np.float64)
    return dets._replace(area=(xy.max(axis=1) - xy.min(axis=1)).prod(axis=1))


def _keypoint_stats(counts: CocoCounts) -> dict[str, Array]:
    ap, recall, _ = counts
    values = [part for table in (ap, recall) for part in (table[..., 0], table[:, 0, 0], table[:, 5, 0], table[..., 2], table[..., 3])]
    return dict(zip(KEYPOINT_STATS, values))


KEYPOINT_RULE = CocoRule((MOST_DETECTIONS,), _keypoint_stats)
