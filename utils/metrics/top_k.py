"""How often a classifier is right: the true class is the best (top-1), or among the best five (top-5); and what is taken for what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.text_table import text_table
from utils.types import Columns, Detections

BEST = 5
NOTHING = -1  # in place of a class where fewer than five were given


@dataclass(frozen=True)
class ClassTruth(Columns):
    """The classes of a batch of images; an image without a class has no row."""

    image: Tensor  # (M,) int64, which image of the batch
    classes: Tensor  # (M,) int64
    boxes: Tensor  # (M, 4) float32, the whole original image in its px


@dataclass(frozen=True)
class ClassificationMetrics:
    """Accuracy over a data set.

    Attributes:
        names: of the classes.
        images: of each class (nc,).
        right: images (nc, 2) of each class whose class was the best, and among the best five.
        confusion: (nc, nc) counts, row what was predicted as best, column what was there.
        losses: mean validation loss by part, if measured.
        speed_ms: milliseconds per image and stage.
    """

    names: tuple[str, ...]
    images: NDArray[np.int64]
    right: NDArray[np.int64]
    confusion: NDArray[np.int64]
    losses: Mapping[str, float] = field(default_factory=dict)
    speed_ms: Mapping[str, float] = field(default_factory=dict)

    @property
    def top1(self) -> float:
        """Share of all images whose class was the best."""
        return self._share(0)

    @property
    def top5(self) -> float:
        """Share of all images whose class was among the best five."""
        return self._share(1)

    @property
    def fitness(self) -> float:
        """The mean of both, by which the published training chooses too."""
        return (self.top1 + self.top5) / 2

    @property
    def columns(self) -> Mapping[str, float]:
        return {"metrics/accuracy_top1": self.top1, "metrics/accuracy_top5": self.top5}

    @property
    def headline(self) -> tuple[str, float]:
        return "top-1", self.top1

    @property
    def by_class(self) -> NDArray[np.float64]:
        """(nc, 2) top-1 and top-5 of each class; NaN for a class without images."""
        with np.errstate(invalid="ignore"):
            return self.right / np.where(self.images > 0, self.images, np.nan)[:, None]

    @property
    def class_ap(self) -> Sequence[float]:
        """Top-1 of each class."""
        return tuple(self.by_class[:, 0].tolist())

    @property
    def remarks(self) -> Sequence[str]:
        """A line where top-5 says nothing, as there are five classes or fewer."""
        return [f"top-5 of {len(self.names)} classes is 1 for any model"] if len(self.names) <= BEST else []

    def table(self, *, per_class: bool = True) -> str:
        """A row for all, then one for each class that has images."""
        rows = [("all", int(self.images.sum()), self.top1, self.top5)]
        for c in np.flatnonzero(self.images) if per_class else ():
            rows.append((self.names[c], int(self.images[c]), *self.by_class[c].tolist()))
        lines = [(name, str(images), f"{top1:.3f}", f"{top5:.3f}") for name, images, top1, top5 in rows]
        return text_table([("class", "images", "top-1", "top-5"), *lines], right=range(4))

    def _share(self, column: int) -> float:
        return float(self.right[:, column].sum() / max(int(self.images.sum()), 1))


class TopKMetric:
    """Collects the best classes and the true class of every image.

    Args:
        names: of the classes.
    """

    coco_kinds: Mapping[str, Mapping[str, Any]] = MappingProxyType({})

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.images: list[int | str] = []
        self._predicted: list[NDArray[np.int64]] = []  # (n, BEST) of each batch, best first
        self._true: list[NDArray[np.int64]] = []  # (n,), NOTHING for an image without a class

    def update(self, detections: Sequence[Detections], truth: ClassTruth, *, images: Sequence[int | str]) -> None:
        """Adds a batch. Of an image with several classes the first counts."""
        predicted, true = best_classes(detections), torch.full((len(detections),), NOTHING)
        true[truth.image.flip(0)] = truth.classes.flip(0)
        self._add(list(images), predicted.numpy(), true.numpy())

    def _add(self, images: Sequence[int | str], predicted: NDArray[np.int64], true: NDArray[np.int64]) -> None:
        self.images += images
        self._predicted.append(predicted)
        self._true.append(true)

    def state(self) -> dict[str, Any]:
        predicted, true = self._joined()
        return {"images": list(self.images), "predicted": predicted, "true": true}

    def merge(self, state: Mapping[str, Any]) -> None:
        known = set(self.images)
        new = np.array([image not in known for image in state["images"]], bool)
        self._add([i for i, n in zip(state["images"], new) if n], state["predicted"][new], state["true"][new])

    def compute(self) -> ClassificationMetrics:
        predicted, true = self._joined()
        labelled = true != NOTHING
        return measure(predicted[labelled], true[labelled], self.names)

    def _joined(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        none = np.zeros((0, BEST), np.int64), np.zeros(0, np.int64)
        return np.concatenate([none[0], *self._predicted]), np.concatenate([none[1], *self._true])


def measure(predicted: NDArray[np.int64], true: NDArray[np.int64], names: Sequence[str]) -> ClassificationMetrics:
    """Accuracy of the best classes (n, 5), ``NOTHING`` where there are fewer, of n images with these true classes (n,)."""
    nc = len(names)
    hits = predicted == true[:, None]
    right = np.stack([np.bincount(true[h], minlength=nc) for h in (hits[:, 0], hits.any(1))], axis=1)
    given = predicted[:, 0] != NOTHING
    cells = np.bincount(predicted[given, 0] * nc + true[given], minlength=nc * nc)
    return ClassificationMetrics(tuple(names), np.bincount(true, minlength=nc), right, cells.reshape(nc, nc))


def best_classes(detections: Sequence[Detections]) -> Tensor:
    """(B, 5) the classes of each image's detections, which are best first; ``NOTHING`` where there are fewer."""
    counts = torch.tensor([len(d) for d in detections], dtype=torch.long)
    found = torch.full((len(detections), BEST), NOTHING)
    if not len(detections) or not int(counts.sum()):
        return found
    image = torch.arange(len(detections)).repeat_interleave(counts)
    rank = torch.arange(len(image)) - (counts.cumsum(0) - counts)[image]
    classes, first = torch.cat([d.classes for d in detections]).cpu(), rank < BEST
    found[image[first], rank[first]] = classes[first]
    return found
