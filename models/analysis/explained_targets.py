"""What an explanation is of: a number that is made of some candidates of a prediction, the same for every task and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from utils.boxes import box_iou
from utils.errors import UserError
from utils.types import Detections, Predictions

QUANTITIES = ("score", "box", "both")
LOG_ODDS = "log-odds"  # what is taken of the classes of a whole image, whose scores sum to 1
FALLBACK = 10  # best candidates that are explained where nothing is detected
SCORE_WEIGHT = 1e6  # px that a difference of 1 in score is worth when a detection's candidate is looked up


@dataclass(frozen=True)
class Target:
    """Candidates, each with a class, and what is taken of them.

    Attributes:
        candidates: (K,) places among the N of a prediction.
        classes: (K,).
        quantity: the candidates' ``score`` of their class, their ``box`` (width + height, in those of the input), or ``both``; of classes
            of a whole image their ``log-odds``.
        text: what it is, for captions.
    """

    candidates: Tensor
    classes: Tensor
    quantity: str = "score"
    text: str = ""

    def value(self, predictions: Predictions, hw: tuple[int, int]) -> Tensor:
        """The sum over the candidates, a scalar that gradients start from; ``hw`` of the network's input in px."""
        if self.quantity == LOG_ODDS:
            return log_odds(predictions.scores[0].mean(0), self.classes)
        total = predictions.scores.new_zeros(())
        if self.quantity in ("score", "both"):
            total = total + predictions.scores[0, self.candidates, self.classes].sum()
        if self.quantity in ("box", "both"):
            corners = predictions.boxes[0, self.candidates]
            sides = (corners[:, 2:] - corners[:, :2]) / corners.new_tensor((hw[1], hw[0]))
            total = total + sides.sum()
        return total


@dataclass(frozen=True)
class TargetRequest:
    """Which detections are explained.

    Attributes:
        numbers: places among the detections, best score first, from 0; empty for all.
        classes: only detections of these; empty for all.
        quantity: see :class:`Target`.
    """

    numbers: tuple[int, ...] = ()
    classes: tuple[int, ...] = ()
    quantity: str = "score"


def choose_target(predictions: Predictions, found: Detections, request: TargetRequest, names: Sequence[str]) -> tuple[Target, Tensor]:
    """The target, and which of the detections (in px of the input) it is made of.

    Where nothing is detected, or nothing of the classes, the best candidates take their place.

    Raises:
        UserError: a number that no detection has, or one of a class that is not asked for, or a class that the network does not know.
    """
    chosen = torch.arange(len(found))
    check_classes(request.classes, names)
    if request.numbers:
        chosen = _numbered(found, request, names)
    if request.classes:
        of_class = torch.isin(found.classes.cpu(), torch.tensor(request.classes))
        chosen = chosen[of_class[chosen]]
    if len(chosen):
        part = found[chosen.to(found.scores.device)]
        text = _text(part, chosen, request, names)
        return Target(candidates_of(part, predictions), part.classes, request.quantity, text), chosen
    return _best_candidates(predictions, request, names), chosen


def choose_classes(predictions: Predictions, found: Detections, request: TargetRequest, names: Sequence[str]) -> tuple[Target, Tensor]:
    """The same where a detection is a class of the whole image: the best class, the numbers asked for, or the classes asked for.

    Several are explained as one: that the image is one of them.

    Raises:
        UserError: as above, or no class is left beside those that are asked for, as then nothing depends on the image.
    """
    check_classes(request.classes, names)
    scores = predictions.scores[0].detach().mean(0)  # (nc,)
    if request.numbers:
        chosen = _numbered(found, request, names)
        classes = found.classes[chosen.to(found.classes.device)]
    else:
        best = request.classes or (int(scores.argmax()),)
        classes = torch.tensor(list(dict.fromkeys(best)), dtype=torch.long, device=scores.device)
        chosen = torch.isin(found.classes, classes).nonzero().flatten().cpu()
    if len(classes) == len(names):
        raise UserError(f"target: the scores of all {len(names)} classes of the network sum to 1 for every image; choose fewer")
    text = f"{_ranked(classes, scores, found, names)}, by {'its' if len(classes) == 1 else 'their'} {LOG_ODDS}"
    return Target(torch.zeros_like(classes), classes, LOG_ODDS, text), chosen


def log_odds(scores: Tensor, classes: Tensor) -> Tensor:
    """log of the sum of some classes' scores over the sum of all others'; ``scores`` (nc,) sum to 1.

    Of a softmax it is the difference of the logits, which has a gradient where the best score is so near to 1 that it has none itself.
    """
    chosen = torch.zeros_like(scores, dtype=torch.bool).index_fill(0, classes, True)
    least = torch.finfo(scores.dtype).tiny
    ours, others = ((scores * part).sum().clamp(min=least) for part in (chosen, ~chosen))
    return ours.log() - others.log()


def check_quantity(quantity: str, *, whole_image: bool, said: str = "quantity") -> None:
    """Refuses an unknown quantity, and boxes of whole images; ``said`` begins the line."""
    if quantity not in QUANTITIES:
        raise UserError(f"{said} {quantity}: one of {', '.join(QUANTITIES)} is expected")
    if whole_image and quantity != "score":
        raise UserError(f"{said} {quantity}: classes of a whole image have no boxes; leave it out, or write score")


def check_classes(wanted: Sequence[int], names: Sequence[str], *, said: str = "classes") -> None:
    """Refuses numbers of classes that the network does not know; ``said`` begins the line."""
    for label in wanted:
        if not 0 <= label < len(names):
            raise UserError(f"{said} {label}: the network knows the classes 0 to {len(names) - 1}")


def candidates_of(found: Detections, predictions: Predictions) -> Tensor:
    """The candidates that detections (n, in px of the input) were made from: those of equal score and box, or the nearest."""
    scores, boxes = predictions.scores[0].detach(), predictions.boxes[0].detach()
    cost = SCORE_WEIGHT * (scores.t()[found.classes] - found.scores[:, None]).abs()  # (n, N)
    cost += (boxes[None] - found.boxes[:, None]).abs().sum(2)
    return cost.argmin(1)


def counterparts(boxes_xyxy: Tensor, classes: Tensor, predictions: Predictions, *, whole_image: bool = False) -> tuple[Tensor, Tensor]:
    """For each object the candidate of another prediction that is most like it: the largest score · IoU, and that product.

    Classes of whole images have no place: the largest score, and that score.

    Args:
        boxes_xyxy: (n, 4) px of the input.
        classes: (n,).
        predictions: of one image.
        whole_image: whether the objects are classes of a whole image, as ``Task.whole_image`` says.

    Returns:
        Candidates (n,) and products (n,).
    """
    likeness = predictions.scores[0].float().t()[classes]  # (n, N)
    if not whole_image:
        likeness = box_iou(boxes_xyxy.float(), predictions.boxes[0].float()) * likeness
    best = likeness.max(1)
    return best.indices, best.values


def _numbered(found: Detections, request: TargetRequest, names: Sequence[str]) -> Tensor:
    """The numbers that are asked for, each once."""
    for number in request.numbers:
        if not 0 <= number < len(found):
            have = f"{len(found)} detections, 0 to {len(found) - 1}" if len(found) else "no detection"
            raise UserError(f"target {number}: the image has {have}")
        label = int(found.classes[number])
        if request.classes and label not in request.classes:
            wanted = ", ".join(names[c] for c in request.classes)
            raise UserError(f"target {number}: is {names[label]}, and the classes asked for are {wanted}; leave one out")
    return torch.tensor(list(dict.fromkeys(request.numbers)))


def _best_candidates(predictions: Predictions, request: TargetRequest, names: Sequence[str]) -> Target:
    scores = predictions.scores[0].detach()  # (N, nc)
    if request.classes:
        scores = scores[:, list(request.classes)]
    values, flat = scores.flatten().topk(min(FALLBACK, scores.numel()))
    places, columns = flat // scores.shape[1], flat % scores.shape[1]
    classes = torch.tensor(request.classes, device=columns.device)[columns] if request.classes else columns
    of = f" of {', '.join(names[c] for c in request.classes)}" if request.classes else ""
    best = f", best {float(values[0]):.3g}" if len(values) else ""
    return Target(places, classes, request.quantity, f"nothing found{of}: the {len(places)} best candidates{best}")


def _ranked(classes: Tensor, scores: Tensor, found: Detections, names: Sequence[str]) -> str:
    """Classes of a whole image with their places among what was found: ``detection 0: cat 0.92``."""
    places = {label: place for place, label in enumerate(found.classes.tolist())}
    below = f"below the {len(found)} best" if len(found) else "below the lowest score"
    told: dict[str, list[str]] = {}
    for label in classes.tolist():
        place = f"detection {places[label]}" if label in places else below
        told.setdefault(place, []).append(f"{names[label]} {float(scores[label]):.2f}")
    return "; ".join(f"{place}: {', '.join(those)}" for place, those in told.items())


def _text(part: Detections, chosen: Tensor, request: TargetRequest, names: Sequence[str]) -> str:
    what = "" if request.quantity == "score" else " (box)" if request.quantity == "box" else " (score and box)"
    if len(part) == 1:
        return f"detection {int(chosen[0])}: {names[int(part.classes[0])]} {float(part.scores[0]):.2f}{what}"
    if request.numbers:
        return f"detections {', '.join(map(str, chosen.tolist()))}{what}"
    of = f" of {', '.join(names[c] for c in request.classes)}" if request.classes else ""
    return f"all {len(part)} detections{of}{what}"
