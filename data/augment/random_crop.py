"""How a classifier's training image is made: a random part of an image at the network's size, mirrored, recoloured, partly erased.

The operations are those of torchvision's v2 transforms, which draw from torch's random numbers; these are seeded for each sample, and the
global generator is left as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.augment.colour import hsv
from data.augment.hyp import AugmentHyp

ASPECT_RATIOS = (3 / 4, 4 / 3)  # of the part that is taken
LEAST_PART = 0.08  # of the area, with scale 1
UNUSED = ("degrees", "translate", "shear", "perspective", "mosaic", "mixup", "copy_paste")


class RandomCrop:
    """Augmentation of one image, as the hyper-parameters say.

    ``scale``: a part of 1 - scale to all of the area; ``fliplr``, ``flipud``; ``auto_augment``, or else ``hsv_*`` as colour jitter; and
    ``erasing``. Images that are not 8-bit RGB or grey get a factor of brightness in place of the colours.

    Args:
        hyp: hyper-parameters.
        side: of the network's input in px.
        channels: of the images.
        dtype: ``np.uint8`` or ``np.uint16``.
    """

    def __init__(self, hyp: AugmentHyp, side: int, *, channels: int = 3, dtype: type[np.generic] = np.uint8) -> None:
        from torchvision.transforms import v2

        self.hyp, self.dtype = hyp, dtype
        self.has_colour = channels == 3 and dtype == np.uint8
        self.geometry = v2.Compose(
            [
                v2.RandomResizedCrop(side, scale=(max(1 - hyp.scale, LEAST_PART), 1.0), ratio=ASPECT_RATIOS, antialias=True),
                v2.RandomHorizontalFlip(hyp.fliplr),
                v2.RandomVerticalFlip(hyp.flipud),
            ]
        )
        self.colour = colour_transform(hyp) if self.has_colour else None
        self.erase = v2.RandomErasing(p=hyp.erasing) if hyp.erasing else None

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """An image (h, w, C) as (side, side, C); ``rng`` alone decides how."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(rng.integers(2**63)))
            planes = self.geometry(as_planes(image))
            if self.colour is not None:
                planes = self.colour(planes)
            if self.erase is not None:
                planes = self.erase(planes)
        out = from_planes(planes, self.dtype)
        return out if self.has_colour else hsv(out, self.hyp, rng)


def colour_transform(hyp: AugmentHyp) -> Callable[[Tensor], Tensor] | None:
    """The policy that ``auto_augment`` names, bilinear where it turns, else colour jitter by ``hsv_*``; None where both are off."""
    from torchvision.transforms import InterpolationMode, v2

    policies: dict[str, Callable[..., Any]] = {"randaugment": v2.RandAugment, "autoaugment": v2.AutoAugment, "augmix": v2.AugMix}
    if hyp.auto_augment in policies:
        return policies[hyp.auto_augment](interpolation=InterpolationMode.BILINEAR)
    if not (hyp.hsv_h or hyp.hsv_s or hyp.hsv_v):
        return None
    return v2.ColorJitter(brightness=hyp.hsv_v, contrast=hyp.hsv_v, saturation=hyp.hsv_s, hue=min(hyp.hsv_h, 0.5))


def as_planes(image: np.ndarray) -> Tensor:
    """(h, w, C) as (C, h, w); 16 bits as float32, which every operation takes."""
    planes = torch.from_numpy(np.ascontiguousarray(image if image.dtype == np.uint8 else image.astype(np.float32)))
    return planes.permute(2, 0, 1)


def from_planes(planes: Tensor, dtype: type[np.generic]) -> np.ndarray:
    """The inverse of ``as_planes``."""
    array = planes.permute(1, 2, 0).contiguous().numpy()
    if dtype == np.uint8:
        return array
    return array.round().clip(0, np.iinfo(np.uint16).max).astype(dtype)


def unused_note(hyp: AugmentHyp) -> str:
    """A line that names the hyper-parameters which move objects within an image, and do nothing to whole images; empty for none."""
    given = [name for name in UNUSED if getattr(hyp, name)]
    return f"{', '.join(given)} of the hyper-parameters: not for images with one class each, left out" if given else ""
