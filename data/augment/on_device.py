"""Colour and flips of a whole batch by tensor operations, on the device where it is: what workers otherwise do image by image.

Hue, saturation and value are OpenCV's 8-bit ones, computed with integers, so that both ways give the same image up to one grey level,
which the last step, back to RGB, may differ by: OpenCV cuts floats there, in an order that depends on the processor. Nothing here waits
for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data.augment.colour import HUES
from utils.types import Batch

UNIT = 4096  # 1 in the fixed-point numbers of OpenCV's 8-bit HSV


def finished(batch: Batch) -> Batch:
    """The batch with the colour and the flips that its loader left to the device."""
    if batch.finish is None:
        return batch
    images, finish = batch.images, batch.finish
    if finish.tables is not None:
        images = recoloured(images, finish.tables)
    for axis, chosen in zip((2, 3), finish.flips.unbind(1)):
        images = torch.where(chosen[:, None, None, None], images.flip(axis), images)
    return batch._replace(images=images, finish=None)


def recoloured(images: Tensor, tables: Tensor) -> Tensor:
    """RGB images (B, 3, H, W) uint8, channels-last in memory, with other levels of hue, saturation and value.

    Args:
        images: on any device.
        tables: (B, 3, 256) uint8 for each image and level of hue, saturation and value the one that it becomes.
    """
    changed = [
        table.gather(1, plane.flatten(1).long()).view_as(plane) for table, plane in zip(tables.unbind(1), _rgb_to_hsv(images))
    ]  # fmt: skip
    return torch.stack(_hsv_to_rgb(*changed), dim=-1).permute(0, 3, 1, 2)


def _rgb_to_hsv(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue 0-179, saturation and value 0-255, each (B, H, W) int32, of images (B, 3, H, W) uint8."""
    red, green, blue = (plane.int() for plane in images.unbind(1))
    value = torch.maximum(torch.maximum(red, green), blue)
    spread = value - torch.minimum(torch.minimum(red, green), blue)
    hue = torch.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)  # in sixths of a turn, times the spread
    hue = torch.where(value == red, green - blue, hue)
    hue = (hue * _quotient(UNIT * HUES // 6, spread) + UNIT // 2) >> 12
    saturation = (spread * _quotient(UNIT * 255, value) + UNIT // 2) >> 12
    return torch.where(hue < 0, hue + HUES, hue), saturation, value


def _quotient(dividend: int, divisor: Tensor) -> Tensor:
    """The dividend over integers, rounded; anything for 0, by which only 0 is multiplied."""
    return torch.round(dividend / divisor.clamp(min=1)).int()


def _hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> list[Tensor]:
    """Red, green and blue (B, H, W) uint8 of hue 0-179, saturation and value 0-255."""
    turn, s, v = hue * (6 / HUES), saturation * (1 / 255), value * (1 / 255)
    sector = turn.floor()
    rest = turn - sector
    planes = []
    for first in (0, 4, 2):  # green and blue are red, a third of a turn on
        place = (sector + first) % 6
        missing = ((place == 2) | (place == 3)).to(rest.dtype)  # which part of the saturation is taken off
        missing = torch.where(place == 1, rest, torch.where(place == 4, 1 - rest, missing))
        planes.append((v * torch.addcmul(torch.ones_like(s), s, missing, value=-1) * 255).to(torch.uint8))
    return planes
