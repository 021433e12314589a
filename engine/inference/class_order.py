"""A network whose classes stand in the order of a data set: predictions are compared by class name, not by class number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from utils.types import Predictions

if TYPE_CHECKING:
    from engine.inference.predictor import Network

NUMBERED = ("{}", "class{}", "class {}", "class_{}")  # names that say no more than the class's number


class ReorderedNetwork:
    """A network with the scores of its classes in another order.

    Args:
        network: what is run.
        names: its class names in the order that is wanted.
        order: for each of them, the network's own class number.
    """

    def __init__(self, network: Network, names: Sequence[str], order: Sequence[int]) -> None:
        self.network, self.names, self.order = network, tuple(names), torch.tensor(order)
        self.nc, self.ch, self.stride, self.task = network.nc, network.ch, network.stride, network.task
        self.dynamic = getattr(network, "dynamic", True)
        if not self.dynamic:
            self.imgsz, self.path = network.imgsz, getattr(network, "path", "the network")  # type: ignore[attr-defined]

    @torch.no_grad()
    def predict(self, images: Tensor, *, above: float = 0.0) -> Predictions:
        """Predictions for images (B, ch, H, W) in 0-1; scores (B, N, nc) in the order of ``names``."""
        predictions = self.network.predict(images, above=above)
        self.order = self.order.to(predictions.scores.device)  # moved once
        return predictions.replace(scores=predictions.scores.index_select(-1, self.order))


def in_order_of(network: Network, names: Sequence[str]) -> Network | None:
    """The network with its classes in the order of ``names``, itself where they are; None where these are other names than its own.

    A network or data set whose names are mere numbers (``class0``) goes by number.
    """
    if tuple(network.names) == tuple(names) or is_numbered(network.names) or is_numbered(names):
        return network
    order = class_order(network.names, names)
    if order is None:
        return None
    return network if order == list(range(len(order))) else ReorderedNetwork(network, names, order)


def class_order(own: Sequence[str], wanted: Sequence[str]) -> list[int] | None:
    """For each wanted name its number among the own ones; None where the two are not the same names, each once.

    Letter case counts only where names differ by nothing else.
    """
    for normal in (str.strip, lambda name: name.strip().casefold()):
        place = {normal(name): number for number, name in enumerate(own)}
        order = [place.get(normal(name), -1) for name in wanted]
        if len(place) == len(own) and sorted(order) == list(range(len(own))):
            return order
    return None


def is_numbered(names: Sequence[str]) -> bool:
    """Whether the names are made up from the class numbers, as files without names have them."""
    return any(all(name == form.format(i) for i, name in enumerate(names)) for form in NUMBERED)


def shortened(names: Sequence[str], most: int = 4) -> str:
    """The first class names and how many there are."""
    return f"{len(names)}: {', '.join(names[:most])}{' …' if len(names) > most else ''}"
