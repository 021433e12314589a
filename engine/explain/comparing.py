"""Two networks side by side: the same image and the same object, and what each of them looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.explain.explaining import Chooser, ExplainOptions, Explanation, explain, letterboxed
from engine.explain.figures import Panel, ShownImage, chosen_extents, grid_figure, influence_titles
from models.analysis.explained_targets import LOG_ODDS, Target, counterparts
from models.model import Model
from utils.errors import UserError, nearest
from utils.types import Detections, Predictions


def explain_as(first: Explanation, other: Model, options: ExplainOptions, *, quantity: str = "score") -> Explanation:
    """Explains the objects of one network's explanation in another network.

    Each object's counterpart is the other network's candidate with the largest score · IoU with it, of the class of the same name. Only
    maps are made: the other network's attention modules are of other rows, and no figure shows them.

    Raises:
        UserError: the other network does not know one of the classes, or one of the two is for whole images and the other for objects.
    """
    if other.task.whole_image != first.task.whole_image:
        raise UserError(
            f"--compare: a network of the task {first.task.name!r} beside one of {other.task.name!r} has nothing in common with it"
        )
    boxed = letterboxed(first.image, other, options.hw)
    here, there = first.placement.letterbox, boxed
    boxes = first.trace.predictions.boxes[0, first.target.candidates].detach().cpu()
    original = (boxes - here.pad_xy[0].repeat(2)) / here.scale_xy[0].repeat(2)
    moved = original * torch.tensor(there.scale_xy * 2) + torch.tensor(there.pad_xy * 2)
    classes = [class_of(first.names[label], other.names) for label in first.target.classes.tolist()]
    quantity = LOG_ODDS if first.task.whole_image else quantity
    return explain(other, first.image, replace(options, modules=False), choose=counterpart_chooser(moved, classes, quantity=quantity))


def counterpart_chooser(boxes_xyxy: Tensor, classes: Sequence[int], *, quantity: str) -> Chooser:
    """Finds objects, in px of the network's input, among its predictions."""

    def choose(predictions: Predictions, found: Detections) -> tuple[Target, Tensor]:
        device = predictions.boxes.device
        labels = torch.tensor(classes, device=device, dtype=torch.long)
        whole = quantity == LOG_ODDS
        candidates, likeness = counterparts(boxes_xyxy.to(device), labels, predictions.map(lambda t: t.detach()), whole_image=whole)
        best = f", best score{' · IoU' * (not whole)} {float(likeness.max()):.2f}" if len(likeness) else ""
        text = f"the same {len(candidates)} {'class(es)' if whole else 'object(s)'}{best}"
        return Target(candidates, labels, quantity, text), torch.zeros(0, dtype=torch.long)

    return choose


def class_of(name: str, names: Sequence[str]) -> int:
    """The number of a class by its name.

    Raises:
        UserError: it is unknown; names the nearest.
    """
    if name not in names:
        hint = nearest(name, names) or f"it knows {', '.join(list(names)[:8])}"
        raise UserError(f"the other network has no class {name!r}; {hint}")
    return list(names).index(name)


def compare_figure(pair: Sequence[Explanation], labels: Sequence[str], method: str) -> Any:
    """A row of panels for each of two explanations: all rows together, then each row."""
    shown = ShownImage.of(pair[0])
    columns = 1 + max(len(one.titles) for one in pair)
    boxes = chosen_extents(pair[0])
    panels: list[Panel] = []
    for one, label in zip(pair, labels):
        row = [shown.map_panel(one.planes[method], f"{label}: all rows", boxes=boxes)]
        row += [shown.map_panel(one.row_plane(method, number), title) for number, title in influence_titles(one, method)]
        panels += row + [_nothing] * (columns - len(row))
    return grid_figure(panels, title=f"{method}: {pair[0].target.text}", aspect=shown.aspect, columns=columns)


def _nothing(figure: Any, axes: Any) -> None:
    axes.axis("off")
