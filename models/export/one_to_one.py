"""Files of networks with a one-to-one branch: an output (B, 300, 6 or more) of detections, best score first, without suppression.

What a task has of the whole image, such as prototypes, follows as further outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.analysis.compare import PredictionDifference, absolute_difference
from models.model import Model
from tasks import Task
from utils.nms import MOST_UNIQUE, select_best
from utils.types import Predictions

ROWS = MOST_UNIQUE  # of the output, whatever the image shows and however small it is


def outputs_of(task: Task) -> dict[str, Mapping[int, str]]:
    """Names and free axes of the outputs: the rows, and what ``task`` has of the whole image, under the names of its own files."""
    return {"output0": {0: "batch"}} | {output.name: output.axes for output in task.outputs[1 : 1 + len(task.shared_fields)]}


class OneToOneNetwork(nn.Module):
    """A deployed Model whose main branch is one-to-one, and its best predictions as rows.

    Args:
        detector: already deployed.
    """

    def __init__(self, detector: Model) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(B, ch, H, W) in 0-1 to (B, ROWS, ·), as the task lays rows out; those behind the last candidate are zero.

        Maps of the whole image follow, where the task has some.
        """
        predictions = self.detector.head.decode(self.detector(images))
        found = select_best(_padded(predictions.scores), count=ROWS)
        boxes = _chosen(predictions.boxes, found.candidate)
        fields = {name: _chosen(values, found.candidate) for name, values in predictions.fields.items()}
        rows = self.detector.task.to_rows(boxes, found.scores[..., None], found.classes[..., None].to(boxes.dtype), fields)
        as_many = F.pad(torch.ones_like(predictions.scores[0, :, 0]), (0, ROWS))[:ROWS]  # as there are candidates, as without padding
        rows = rows * as_many[:, None]
        return (rows, *(predictions.shared[name] for name in self.detector.task.shared_fields)) if predictions.shared else rows


def _padded(values: Tensor) -> Tensor:
    """Values (B, N, ·) with ROWS more candidates, so that there are as many candidates as rows at any size."""
    return F.pad(values, (0, 0, 0, ROWS))


def _chosen(values: Tensor, candidate: Tensor) -> Tensor:
    """The values (B, K, ·) of candidates (B, K)."""
    return _padded(values).gather(1, candidate[..., None].expand(-1, -1, values.shape[2]))


def selection_difference(candidates: Predictions, got: Predictions) -> PredictionDifference:
    """How far detections are from the best of torch's candidates.

    Scores are compared rank by rank, and each detection with the candidate that is nearest in place and score, since of equal scores
    either may be chosen.

    Args:
        candidates: of the network, all of them.
        got: of the file, from :meth:`tasks.base.Task.from_rows`.
    """
    ranked = F.pad(select_best(candidates.scores, count=ROWS).scores, (0, ROWS))[:, :ROWS]
    scores = absolute_difference(ranked, got.scores.amax(dim=2))
    worst = 0.0
    for boxes, per_class, found, best in zip(candidates.boxes, candidates.scores, got.boxes, got.scores):
        valid = best.amax(dim=1) > 0
        score, label = best[valid].max(dim=1)
        px = (found[valid][:, None] - boxes[None]).abs().amax(dim=2)  # (K, N)
        cost = px + (score[:, None] - per_class.T[label]).abs()
        worst = max(worst, float(cost.nan_to_num(nan=torch.inf).amin(dim=1).max()) if len(cost) else 0.0)
    return PredictionDifference(worst, scores)
