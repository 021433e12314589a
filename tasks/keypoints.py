"""What the keypoints of a data set are: how many, how a label gives them, how exactly they can be placed, and which are joined by lines.

Data files, model files and exported files say it under the same keys: ``kpt_shape: [17, 3]``, and where they differ from the usual ones
``kpt_oks_sigmas`` (σ of each keypoint, see utils/metrics/oks.py) and ``skeleton`` (pairs of keypoints, counted from 0).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from utils.errors import UserError
from utils.metrics.oks import default_sigmas
from utils.reading.limits import MAX_KEYPOINTS
from utils.reading.yaml_text import shown

KEYS = ("kpt_shape", "kpt_oks_sigmas", "skeleton")
MOST_LIMBS = 4 * MAX_KEYPOINTS
LARGEST_SIGMA = 10.0
# Of COCO's person: ankles, knees and hips, trunk, shoulders and arms, head.
COCO_SKELETON = (
    (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10), (1, 2), (0, 1), (0, 2),
    (1, 3), (2, 4), (3, 5), (4, 6),
)  # fmt: skip


@dataclass(frozen=True)
class Keypoints:
    """The keypoints of a data set's objects.

    Attributes:
        count: of an object, K.
        values: that a label gives of each, D: 2 for x and y, 3 with visibility.
        sigmas: of each keypoint for OKS; () for the usual ones.
        skeleton: pairs of keypoints that a drawing joins by lines; None for the usual ones.
    """

    count: int
    values: int = 3
    sigmas: tuple[float, ...] = ()
    skeleton: tuple[tuple[int, int], ...] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``kpt_shape``: keypoints of an object, and values of each."""
        return self.count, self.values

    @property
    def oks_sigmas(self) -> tuple[float, ...]:
        """σ of each keypoint: the data set's, else COCO's for its 17, else 1 / K."""
        return self.sigmas or default_sigmas(self.count, self.values)

    @property
    def limbs(self) -> tuple[tuple[int, int], ...]:
        """Pairs that are joined by lines: the data set's, else COCO's for 17 keypoints, else none."""
        if self.skeleton is not None:
            return self.skeleton
        return COCO_SKELETON if self.count == default_count() else ()

    @property
    def settings(self) -> dict[str, Any]:
        """The same as plain values by key; what is usual is left out."""
        found: dict[str, Any] = {"kpt_shape": [self.count, self.values]}
        if self.sigmas:
            found["kpt_oks_sigmas"] = list(self.sigmas)
        if self.skeleton is not None:
            found["skeleton"] = [list(pair) for pair in self.skeleton]
        return found


def default_count() -> int:
    """Keypoints of COCO's person."""
    return 1 + max(max(pair) for pair in COCO_SKELETON)


def read_keypoints(values: Mapping[str, Any], *, source: str) -> Keypoints | None:
    """The keypoints that a data file, a model file or an exported file describes; None where it has no ``kpt_shape``.

    Raises:
        UserError: a value that cannot be; begins with ``source``.
    """
    shape = values.get("kpt_shape")
    if shape is None:
        return None
    whole = isinstance(shape, (list, tuple)) and len(shape) == 2 and all(type(i) is int for i in shape)
    if not whole or not 1 <= shape[0] <= MAX_KEYPOINTS or shape[1] not in (2, 3):
        expected = "keypoints of an object and values of each (2 or 3) are expected: [17, 3]"
        raise UserError(f"{source}: kpt_shape: {shown(shape)}, {expected}")
    count = shape[0]
    return Keypoints(count, shape[1], _sigmas(values.get("kpt_oks_sigmas"), count, source), _skeleton(values, count, source))


def _sigmas(given: Any, count: int, source: str) -> tuple[float, ...]:
    if given is None:
        return ()
    numbers = given if isinstance(given, (list, tuple)) else ()
    fit = len(numbers) == count and all(type(v) in (int, float) and 0 < v <= LARGEST_SIGMA for v in numbers)
    if not fit:
        expected = f"a positive number for each of the {count} keypoints of kpt_shape, at most {LARGEST_SIGMA:g}, is expected"
        raise UserError(f"{source}: kpt_oks_sigmas: {shown(given)}, {expected}")
    return tuple(map(float, numbers))


def _skeleton(values: Mapping[str, Any], count: int, source: str) -> tuple[tuple[int, int], ...] | None:
    given = values.get("skeleton")
    if given is None:
        return None
    pairs = given if isinstance(given, (list, tuple)) and len(given) <= MOST_LIMBS else [None]
    for pair in pairs:
        two = isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(i) is int and 0 <= i < count for i in pair)
        if not two:
            expected = f"pairs of keypoints, counted from 0 to {count - 1}, are expected: [[0, 1], [1, 2]]"
            raise UserError(f"{source}: skeleton: {shown(pair if len(pairs) > 1 else given)}, {expected}")
    return tuple((pair[0], pair[1]) for pair in pairs if pair is not None)
