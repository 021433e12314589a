"""Boxes and labels on images, legible at any size."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.types import Detections
from utils.visual.fonts import font_file, text_runs
from utils.visual.names import LONGEST_NAME, short_name

Image = NDArray[np.uint8]
Colour = tuple[int, int, int]
FONT = cv2.FONT_HERSHEY_SIMPLEX
GOLDEN_ANGLE = 0.381966  # of the hue circle: any number of neighbours stay apart
FIRST_HUE = 0.58
CAPITALS = 0.73  # height of capitals in a scalable font of size 1


def viewable(image: NDArray, *, ignored: int | None = None) -> Image:
    """An image (H, W, C) of any depth and channels as 8-bit RGB (H, W, 3): the first three channels, or the first as grey.

    Sixteen bits are stretched so that the darkest and brightest hundredth of the shown values end at black and white: sensors seldom
    use the whole range. An 8-bit RGB image comes back itself.

    Args:
        ignored: A value that does not count for the range, such as that of a border.
    """
    shown = image if image.shape[2] == 3 else image[:, :, :3] if image.shape[2] > 3 else np.repeat(image[:, :, :1], 3, axis=2)
    if image.dtype == np.uint8:
        return np.ascontiguousarray(shown)
    sample = shown[:: max(len(shown) // 256, 1), :: max(shown.shape[1] // 256, 1)]
    counted = sample[sample != ignored] if ignored is not None else sample
    low, high = np.percentile(counted, (1, 99)) if counted.size else (0.0, 0.0)
    low, high = (low, high) if high > low else (0.0, 65535.0)  # of one value: as bright as it is
    scaled = (shown.astype(np.float32) - low) * (255 / (high - low))
    return np.ascontiguousarray(scaled.round().clip(0, 255).astype(np.uint8))


def draw_detections(
    image_rgb: Image,
    found: Detections,
    names: Sequence[str],
    *,
    line_thickness: int | None = None,
    hide_labels: bool = False,
    hide_conf: bool = False,
) -> Image:
    """A copy of an RGB image (H, W, 3) with its detections, the best score drawn last and so on top.

    Args:
        found: Boxes in px of the image, on any device.
        line_thickness: In px; by the image's size if not given.
        hide_labels: Draw boxes only.
        hide_conf: Leave the score out of the label.
    """
    classes, scores = found.classes.tolist(), found.scores.tolist()
    most = _columns_of(image_rgb.shape, line_thickness)
    shown = {c: short_name(names[c], most=most) for c in set(classes)}
    labels = ["" if hide_labels else shown[c] if hide_conf else f"{shown[c]} {s:.2f}" for c, s in zip(classes, scores)]
    boxes = found.boxes.detach().float().cpu().numpy()
    return draw_boxes(image_rgb.copy(), boxes[::-1], labels[::-1], classes[::-1], line_thickness=line_thickness)


def draw_boxes(
    image: Image, boxes_xyxy: NDArray, labels: Sequence[str], classes: Sequence[int], *, line_thickness: int | None = None,
    box_thickness: int | None = None,
) -> Image:  # fmt: skip
    """Draws boxes (n, 4) in px and their labels onto an image (H, W, 3), in place; an empty label draws only the box.

    The size of labels goes with ``line_thickness``, and so do the lines of boxes unless ``box_thickness`` says otherwise.
    """
    width = line_thickness or default_thickness(image.shape[:2])
    corners = np.nan_to_num(boxes_xyxy, nan=0.0).clip(-32768, 32767).round().astype(int).tolist()
    for (x1, y1, x2, y2), c in zip(corners, classes):
        cv2.rectangle(image, (x1, y1), (x2, y2), colour_of(c), box_thickness or width, cv2.LINE_AA)
    for (x1, y1, _, _), label, c in zip(corners, labels, classes):  # after all boxes, so that no line crosses a text
        if label:
            draw_label(image, label, (x1, y1), colour_of(c), width)
    return image


@cache
def colour_of(index: int) -> Colour:
    """The colour of a class, the same everywhere: hues by the golden angle, in three strengths."""
    strength, value = ((0.85, 0.95), (0.55, 0.98), (0.95, 0.7))[index // 8 % 3]
    r, g, b = colorsys.hsv_to_rgb((FIRST_HUE + index * GOLDEN_ANGLE) % 1, strength, value)
    return round(r * 255), round(g * 255), round(b * 255)


def default_thickness(hw: tuple[int, ...]) -> int:
    """Line width in px for an image of this height and width."""
    return max(round((hw[0] + hw[1]) / 2 * 0.003), 2)


def draw_text(image: Image, text: str, at: tuple[int, int], *, height: int, colour: Colour) -> None:
    """Writes one line of text in place, its lower left corner at ``at``; characters beyond ASCII in fonts that have them."""
    text = _one_line(text)
    if text.isascii():
        scale, weight = _font(height)
        cv2.putText(image, text, at, FONT, scale, colour, weight, cv2.LINE_AA)
        return
    from PIL import Image as Pillow
    from PIL import ImageDraw

    left, top = at[0], at[1] - height - height // 3  # Chinese characters are higher than capitals
    right, bottom = min(left + text_width(text, height), image.shape[1]), min(at[1] + height // 2, image.shape[0])
    left, top = max(left, 0), max(top, 0)
    if left >= right or top >= bottom:
        return
    patch = Pillow.fromarray(image[top:bottom, left:right])
    canvas, x = ImageDraw.Draw(patch), float(at[0] - left)
    for part, font in _runs(text, height):
        canvas.text((x, at[1] - top), part, fill=colour, font=font, anchor="ls")
        x += font.getlength(part)
    image[top:bottom, left:right] = np.asarray(patch)


def text_width(text: str, height: int) -> int:
    """Width in px of one line of text whose capitals are ``height`` px high."""
    text = _one_line(text)
    if text.isascii():
        scale, weight = _font(height)
        return int(cv2.getTextSize(text, FONT, scale, weight)[0][0])
    return int(sum(font.getlength(part) for part, font in _runs(text, height))) + 1


def label_height(line: int) -> int:
    """Height in px of the capitals of labels beside lines ``line`` px wide."""
    return 4 + 3 * line


def draw_label(image: Image, text: str, corner: tuple[int, int], colour: Colour, line: int) -> None:
    """Text on a filled box above the corner, or below its edge where there is no room; moved left to stay in the image."""
    height = label_height(line)
    margin = max(height // 4, 2)
    wide, high = text_width(text, height) + 2 * margin, height + 2 * margin
    x = max(min(corner[0] - line // 2, image.shape[1] - wide), 0)
    y = corner[1] if corner[1] >= high else max(corner[1], 0) + high
    cv2.rectangle(image, (x, y - high), (x + wide, y), colour, -1, cv2.LINE_AA)
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    draw_text(image, text, (x + margin, y - margin), height=height, colour=(0, 0, 0) if luminance > 140 else (255, 255, 255))


@cache
def _font(height: int) -> tuple[float, int]:
    """Scale and stroke of OpenCV's font for capitals of this height."""
    scale = height / cv2.getTextSize("H", FONT, 1.0, 1)[0][1]
    return scale, max(round(scale * 1.6), 1)


def _columns_of(shape: tuple[int, ...], line: int | None) -> int:
    """How many columns of a name leave room for the score on an image of this shape; few on a small one."""
    column = 0.85 * (4 + 3 * (line or default_thickness(shape[:2])))  # width of a letter, nearly
    return max(6, min(LONGEST_NAME, int(shape[1] / column) - 6))


def _one_line(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _runs(text: str, height: int) -> list[tuple[str, Any]]:
    """Parts of the text with their fonts, of a size whose capitals are ``height`` px high."""
    return [(part, font_file(file, round(height / CAPITALS))) for part, file in text_runs(text)]
