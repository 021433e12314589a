"""Numbers about a map: faithfulness on its image, and its likeness to the map of a network with random weights."""

from __future__ import annotations

from typing import Any

import torch

from engine.explain.comparing import compare_figure
from engine.explain.explaining import Explanation
from models.analysis.faithfulness import Faithfulness, faithfulness, rank_correlation
from models.model import Model

RANDOM = "random order"


def faithfulness_of(model: Model, found: Explanation) -> dict[str, Faithfulness]:
    """Method -> its curves for the objects that are explained, and those of pixels in random order, which a map should beat."""
    target, images = found.target, found.trace.images.detach()
    boxes = found.trace.predictions.boxes[0, target.candidates].detach()
    planes = {method: _input_plane(found, method) for method in found.planes}
    planes[RANDOM] = torch.rand(tuple(images.shape[2:]), generator=torch.Generator().manual_seed(0))
    return {name: faithfulness(model, images, plane, boxes, target.classes) for name, plane in planes.items()}


def faithfulness_lines(model: Model, found: Explanation) -> list[str]:
    """One line a method."""
    if not len(found.target.candidates):
        return []
    return [
        f"{name}: deletion {one.deletion_area:.3f} (lower is better), insertion {one.insertion_area:.3f} (higher is better)"
        for name, one in faithfulness_of(model, found).items()
    ]


def sanity_lines(found: Explanation, random: Explanation) -> list[str]:
    """One line a method: how alike the maps of the network and of one with random weights are."""
    lines = []
    for method in found.planes:
        pair = [torch.from_numpy(one.planes[method][one.placement.seen(one.planes[method].shape)]) for one in (found, random)]
        lines.append(f"{method}: rank correlation with the map of random weights {rank_correlation(*pair):+.2f} (near 0 is sound)")
    return lines


def sanity_figure(found: Explanation, random: Explanation) -> Any:
    """The maps of the first method, of the network and of the one with random weights."""
    return compare_figure((found, random), ("trained", "random weights"), next(iter(found.planes)))


def _input_plane(found: Explanation, method: str) -> torch.Tensor:
    """A map over the network's input; its border, which is no part of the image, comes last."""
    return found.placement.uncropped(torch.from_numpy(found.planes[method]), fill=-1.0)
