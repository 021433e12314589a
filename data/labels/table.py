"""The labels of one image, and those of a whole data set in a handful of flat arrays: cheap to store, to share and to index."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.labels.problems import Problem
from utils.instances import Instances

UNUSABLE_HW = (0, 0)  # in place of the size of an image that is left out


class ImageLabels(NamedTuple):
    """What one image and its label file contain."""

    hw: tuple[int, int]  # px; UNUSABLE_HW where the image is left out
    has_label_file: bool
    classes: np.ndarray  # (n,) int64
    boxes_cxcywh: np.ndarray  # (n, 4) float32, normalised
    rows: np.ndarray  # (n,) int64, from 1
    points: np.ndarray  # (p, 2) float32, normalised; the corners of all polygons
    counts: np.ndarray  # (n,) int64, points per object
    problems: tuple[Problem, ...] = ()
    keypoints: np.ndarray | None = None  # (n, K, 3) float32 of x, y (normalised) and visibility
    breaks: np.ndarray | None = None  # (p,) bool, where a further ring of an object begins; None where each has one

    @classmethod
    def background(cls, hw: tuple[int, int], *, has_label_file: bool, problems: tuple[Problem, ...] = ()) -> ImageLabels:
        """An image without objects."""
        none = np.zeros(0, np.int64)
        return cls(hw, has_label_file, none, np.zeros((0, 4), np.float32), none, np.zeros((0, 2), np.float32), none, problems)

    @classmethod
    def unusable(cls, *problems: Problem, has_label_file: bool) -> ImageLabels:
        """An image that is left out, and why."""
        return cls.background(UNUSABLE_HW, has_label_file=has_label_file, problems=problems)

    @property
    def is_usable(self) -> bool:
        return self.hw != UNUSABLE_HW

    def select(self, keep: np.ndarray) -> ImageLabels:
        """The objects where ``keep`` (n,) is true."""
        points = np.repeat(keep, self.counts)
        return self._replace(
            classes=self.classes[keep],
            boxes_cxcywh=self.boxes_cxcywh[keep],
            rows=self.rows[keep],
            counts=self.counts[keep],
            points=self.points[points],
            breaks=None if self.breaks is None else self.breaks[points],
            keypoints=None if self.keypoints is None else self.keypoints[keep],
        )


@dataclasses.dataclass(frozen=True)
class LabelTable:
    """The labels of N images with M objects.

    Attributes:
        shapes_hw: (N, 2) int64 height and width of every image in px; zeros for those left out.
        has_label_file: (N,) bool.
        starts: (N + 1,) int64, objects of image i are ``starts[i]:starts[i + 1]``.
        classes: (M,) int64.
        boxes_cxcywh: (M, 4) float32, normalised.
        rows: (M,) int64, row in the label file, from 1.
        point_starts: (M + 1,) int64, polygon of object j is ``point_starts[j]:point_starts[j + 1]`` (empty: only a box).
        points: (P, 2) float32, normalised.
        problems: everything wrong that was found.
        keypoints: (M, K, 3) float32 of x, y (normalised) and visibility; None where the labels have none.
        breaks: (P,) bool, true at the first point of a ring that is not its object's first; None where every object has one.
    """

    shapes_hw: np.ndarray
    has_label_file: np.ndarray
    starts: np.ndarray
    classes: np.ndarray
    boxes_cxcywh: np.ndarray
    rows: np.ndarray
    point_starts: np.ndarray
    points: np.ndarray
    problems: tuple[Problem, ...] = ()
    keypoints: np.ndarray | None = None
    breaks: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.shapes_hw)

    @property
    def usable(self) -> np.ndarray:
        """(N,) bool, false for images that are left out."""
        return self.shapes_hw[:, 0] > 0

    @property
    def counts(self) -> np.ndarray:
        """(N,) int64 objects of each image."""
        return np.diff(self.starts)

    def instances(self, i: int, *, hw: tuple[int, int]) -> Instances:
        """Objects of image i in px of a version of it that is ``hw`` px large."""
        h, w = hw
        start, stop = self.starts[i], self.starts[i + 1]
        cxcywh = self.boxes_cxcywh[start:stop]
        half = cxcywh[:, 2:] / 2
        boxes = np.concatenate((cxcywh[:, :2] - half, cxcywh[:, :2] + half), 1) * np.array((w, h, w, h), np.float32)
        point_starts = self.point_starts[start : stop + 1]
        own = slice(point_starts[0], point_starts[-1])
        points = self.points[own] * np.array((w, h), np.float32)
        breaks = None if self.breaks is None else self.breaks[own]
        keypoints = None if self.keypoints is None else self.keypoints[start:stop] * np.array((w, h, 1), np.float32)
        return Instances(self.classes[start:stop].astype(np.float32), boxes, points, np.diff(point_starts), keypoints, breaks)

    def array(self, i: int) -> np.ndarray:
        """(n, 5) float32 [class, cx, cy, w, h] of image i."""
        part = slice(self.starts[i], self.starts[i + 1])
        return np.concatenate((self.classes[part, None].astype(np.float32), self.boxes_cxcywh[part]), 1)

    def box_sizes_px(self) -> np.ndarray:
        """(M, 2) float64 width and height of all boxes in px of the original images."""
        image_wh = np.repeat(self.shapes_hw[:, ::-1], self.counts, axis=0)
        return self.boxes_cxcywh[:, 2:].astype(np.float64) * image_wh

    def as_one_class(self) -> LabelTable:
        """The same objects, all of class 0."""
        return dataclasses.replace(self, classes=np.zeros_like(self.classes))

    def select(self, keep: np.ndarray) -> LabelTable:
        """The table of the images where ``keep`` (N,) is true."""
        return dataclasses.replace(
            self._with_objects_of(keep), shapes_hw=self.shapes_hw[keep], has_label_file=self.has_label_file[keep],
            starts=_offsets(self.counts[keep]),
        )  # fmt: skip

    def mark_unusable(self, images: np.ndarray, problems: Sequence[Problem]) -> LabelTable:
        """The table with the images where ``images`` (N,) is true left out, and why."""
        return dataclasses.replace(
            self._with_objects_of(~images), shapes_hw=np.where(images[:, None], 0, self.shapes_hw),
            starts=_offsets(np.where(images, 0, self.counts)), problems=(*self.problems, *problems),
        )  # fmt: skip

    def _with_objects_of(self, keep: np.ndarray) -> LabelTable:
        """Only the objects of some images; the caller sets ``starts``."""
        objects = np.repeat(keep, self.counts)
        points = np.repeat(objects, np.diff(self.point_starts))
        return dataclasses.replace(
            self,
            classes=self.classes[objects],
            boxes_cxcywh=self.boxes_cxcywh[objects],
            rows=self.rows[objects],
            point_starts=_offsets(np.diff(self.point_starts)[objects]),
            points=self.points[points],
            keypoints=None if self.keypoints is None else self.keypoints[objects],
            breaks=None if self.breaks is None else self.breaks[points],
        )


def build_table(images: Sequence[ImageLabels]) -> LabelTable:
    """The flat arrays for the labels of single images.

    Raises:
        ValueError: some images with objects have keypoints and others have none.
    """

    def joined(name: str, template: np.ndarray) -> np.ndarray:
        return np.concatenate([template, *(getattr(image, name) for image in images)])

    classes = joined("classes", np.zeros(0, np.int64))
    keypoints = [image.keypoints for image in images if image.keypoints is not None and len(image.classes)]
    if keypoints and sum(map(len, keypoints)) != len(classes):
        raise ValueError("some images have keypoints and others have none; all or none are expected")
    some_breaks = any(image.breaks is not None and image.breaks.any() for image in images)
    breaks = [np.zeros(len(image.points), bool) if image.breaks is None else image.breaks for image in images]
    return LabelTable(
        shapes_hw=np.array([image.hw for image in images], np.int64).reshape(-1, 2),
        has_label_file=np.array([image.has_label_file for image in images], bool),
        starts=_offsets(np.array([len(image.classes) for image in images], np.int64)),
        classes=classes,
        boxes_cxcywh=joined("boxes_cxcywh", np.zeros((0, 4), np.float32)),
        rows=joined("rows", np.zeros(0, np.int64)),
        point_starts=_offsets(joined("counts", np.zeros(0, np.int64))),
        points=joined("points", np.zeros((0, 2), np.float32)),
        problems=tuple(p for image in images for p in image.problems),
        keypoints=np.concatenate(keypoints) if keypoints else None,
        breaks=np.concatenate(breaks) if some_breaks else None,
    )


def breaks_of(sizes: Sequence[Sequence[int]]) -> np.ndarray | None:
    """Where further rings begin (p,), given the points of each ring of each object; None where no object has two."""
    if all(len(rings) < 2 for rings in sizes):
        return None
    breaks = np.zeros(sum(sum(rings) for rings in sizes), bool)
    further = np.array([number > 0 for rings in sizes for number in range(len(rings))], bool)
    starts = _offsets(np.array([size for rings in sizes for size in rings], np.int64))[:-1]
    breaks[starts[further]] = True
    return breaks


def _offsets(counts: np.ndarray) -> np.ndarray:
    """(n + 1,) where each of n runs of ``counts`` elements starts, and where the last one ends."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)))
