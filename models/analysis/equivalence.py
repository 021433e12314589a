"""Whether two networks compute the same: decoded boxes and scores on random images and on real ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from models.analysis.compare import absolute_difference, prediction_difference
from models.heads.base import HeadOutput
from models.model import Model
from utils.errors import UserError
from utils.sizes import round_up_to_stride

SIDE_PX, PAD_GREY = 320, 114
RANDOM = ((1, 1.0), (2, 0.6))  # images, height as a part of the side


class Tolerance(NamedTuple):
    """Allowed differences of raw maps (as part of their largest value), of coordinates in px (the largest, or the mean), and of scores."""

    maps: float
    boxes_px: float
    scores: float
    mean: bool = False


# Folding rounds once to float32. Rounding every weight to float16 moves boxes of places where no object is by whole pixels, since nothing
# has trained them, so there the mean over all places counts.
# Where logits are so large that float32 itself rounds more than FOLDED allows, differences may be this many times that rounding, and never
# more than this many times FOLDED.
ROUNDINGS, MOST_WIDENED = 4.0, 100.0
FOLDED, HALVED = Tolerance(2e-5, 1e-2, 1e-4), Tolerance(5e-2, 0.25, 2e-2, mean=True)


class Difference(NamedTuple):
    """The largest differences of two networks over all images that were compared."""

    maps: float
    boxes_px: float
    scores: float
    random: int
    real: int
    allowed: Tolerance
    rounding: tuple[float, float, float] | None = None  # of the first network in float32, in the same three units; None: not measured

    @property
    def holds(self) -> bool:
        allowed = self.allowed
        return self.maps <= allowed.maps and self.boxes_px <= allowed.boxes_px and self.scores <= allowed.scores  # false for NaN

    def __str__(self) -> str:
        allowed, how = self.allowed, "on average" if self.allowed.mean else "at most"
        why = ""
        if self.rounding and all(ROUNDINGS * own >= found for own, found in zip(self.rounding[1:], (self.boxes_px, self.scores))):
            _, px, score = self.rounding
            why = f"; float32 alone rounds its boxes by {px:.1e} px and scores by {score:.1e}: it is hardly trained, or has diverged"
        return (
            f"raw maps differ by {self.maps:.1e} of their largest value, boxes by {self.boxes_px:.1e} px {how}, "
            f"scores by {self.scores:.1e} "
            f"(allowed {allowed.maps:g}, {allowed.boxes_px:g} px, {allowed.scores:g}) "
            f"on {self.random} random and {self.real} real images{why}"
        )


@torch.no_grad()
def difference(before: Model, after: Model, *, inputs: Sequence[Tensor], allowed: Tolerance, side_px: int = SIDE_PX) -> Difference:
    """Runs both on random images and on ``inputs``, in float64, so that only differences of the weights are measured.

    Args:
        inputs: (1, ch, H, W) each, in 0-1, sides multiples of both strides.
        side_px: of the random images.
    """
    a, b = (copy.deepcopy(model).cpu().double().eval() for model in (before, after))
    random = list(_random_images(before, side_px))
    batches = [*random, *inputs]
    maps, boxes, scores = _largest(_differences(a(x.double()), b(x.double()), a, b, mean=allowed.mean) for x in batches)
    found = Difference(maps, boxes, scores, sum(map(len, random)), len(inputs), allowed)
    if found.holds or allowed != FOLDED:
        return found
    single = copy.deepcopy(before).cpu().float().eval()
    rounding = _largest(_differences(a(x.double()), single(x.float()), a, single, mean=False) for x in batches)
    usual = (allowed.maps, allowed.boxes_px, allowed.scores)
    maps, boxes, scores = (max(least, min(ROUNDINGS * own, MOST_WIDENED * least)) for least, own in zip(usual, rounding))
    return found._replace(allowed=Tolerance(maps, boxes, scores), rounding=rounding)


def _largest(found: Iterable[tuple[float, float, float]]) -> tuple[float, float, float]:
    maps, boxes, scores = (max(values) for values in zip(*found))
    return maps, boxes, scores


def _differences(expected: HeadOutput, got: HeadOutput, before: Model, after: Model, *, mean: bool) -> tuple[float, float, float]:
    """Differences of raw maps (relative), coordinates (px) and scores on one batch; infinite where shapes differ, or one is NaN."""
    if [m.shape for m in expected.main] != [m.shape for m in got.main]:
        return math.inf, math.inf, math.inf
    maps = max(absolute_difference(e, g) / max(absolute_difference(e, torch.zeros_like(e)), 1e-12) for e, g in zip(expected.main, got.main))
    return (maps, *prediction_difference(before.head.decode(expected), after.head.decode(got), mean_boxes=mean))


def _random_images(model: Model, side_px: int) -> Iterable[Tensor]:
    side = round_up_to_stride(side_px, model.stride)
    for seed, (count, part) in enumerate(RANDOM):
        height = max(round(side * part / model.stride), 1) * model.stride
        yield torch.rand(count, model.ch, height, side, generator=torch.Generator().manual_seed(seed))


def read_images(model: Model, paths: Sequence[str | Path], *, side_px: int = SIDE_PX) -> list[Tensor]:
    """Image files as the network takes them, with their longer side scaled to ``side_px``; without any, a drawn one.

    Raises:
        UserError: a file is no image.
    """
    arrays = [_read(Path(path)) for path in paths] or [drawn_image()]
    return [_letterboxed(array, round_up_to_stride(side_px, model.stride), model.ch) for array in arrays]


def drawn_image() -> np.ndarray:
    """Discs and boxes on a gradient with grain, (H, W, 3) uint8: edges, colours and flat places, as photographs have."""
    random = np.random.default_rng(0)
    ramp = np.linspace(40, 200, 400, dtype=np.float32)
    image = np.stack([np.tile(ramp, (300, 1)), np.tile(ramp[::-1], (300, 1)), np.full((300, 400), 120, np.float32)], axis=2)
    image = (image + random.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)
    for _ in range(12):
        x, y, size = (int(v) for v in random.integers((20, 20, 8), (380, 280, 50)))
        colour = tuple(int(v) for v in random.integers(0, 255, 3))
        if size % 2:
            cv2.circle(image, (x, y), size, colour, -1)
        else:
            cv2.rectangle(image, (x, y), (x + size, y + size), colour, -1)
    return image


def _read(path: Path) -> np.ndarray:
    try:
        image = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_COLOR)
    except (OSError, cv2.error) as error:
        raise UserError(f"--images {path}: cannot be read ({error})") from None
    if image is None:
        raise UserError(f"--images {path}: not an image that OpenCV reads")
    return np.ascontiguousarray(image[:, :, ::-1])


def _letterboxed(image: np.ndarray, side: int, channels: int) -> Tensor:
    """(H, W, 3) to (1, channels, side, side) in 0-1, padded with grey."""
    gain = side / max(image.shape[:2])
    height, width = (max(round(n * gain), 1) for n in image.shape[:2])
    canvas = np.full((side, side, 3), PAD_GREY, np.uint8)
    canvas[:height, :width] = cv2.resize(image, (width, height))
    tensor = torch.from_numpy(canvas).permute(2, 0, 1).float().div(255)  # (3, side, side)
    if channels != 3:  # grey, or further channels that repeat the colours
        tensor = tensor.mean(0, keepdim=True) if channels == 1 else tensor.repeat(-(-channels // 3), 1, 1)[:channels]
    return tensor.unsqueeze(0)
