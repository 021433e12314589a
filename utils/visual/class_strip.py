"""The best classes of an image as a strip in its corner: a row each, with a bar as long as its score."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from utils.types import Detections
from utils.visual.draw import Image, colour_of, default_thickness, draw_text, text_width

MOST_OF_HEIGHT, MOST_OF_WIDTH = 0.5, 0.92  # of the image that the strip may cover
LEAST_TEXT_PX, USUAL_TEXT, LARGEST_TEXT = 8, 1 / 36, 1 / 16  # height of capitals; the latter two of the image's shorter side
DARKENED = 0.62  # how much of the image the panel hides
WHITE, GREY = (255, 255, 255), (205, 205, 205)


def draw_class_strip(
    image_rgb: Image,
    found: Detections,
    names: Sequence[str],
    *,
    line_thickness: int | None = None,
    hide_labels: bool = False,
    hide_conf: bool = False,
) -> Image:
    """A copy of an RGB image (H, W, 3) with its classes in the upper left corner, best first, on a darkened panel.

    Args:
        found: Classes and scores, on any device; boxes are not drawn.
        line_thickness: In px, of which the text's height follows as that of labels of boxes does; by the image's size if not given.
        hide_labels: Bars only.
        hide_conf: Leave the scores out.
    """
    image = image_rgb.copy()
    scores, classes = found.scores.tolist(), found.classes.tolist()
    if not classes or min(image.shape[:2]) < 2:
        return image
    height = _text_height(image.shape[:2], line_thickness)
    margin, gap, bar = max(height // 2, 3), max(height * 3 // 8, 2), max(height // 4, 3)  # letters reach below the line of the text
    step = height + gap + bar + max(height // 3, 3)
    rows = max(1, min(len(classes), int((image.shape[0] * MOST_OF_HEIGHT - margin) // step)))
    room = int(image.shape[1] * MOST_OF_WIDTH) - 3 * margin
    numbers = ["" if hide_conf or hide_labels else f"{score:.2f}" for score in scores[:rows]]
    number_px = max(text_width(text, height) for text in numbers) + margin if any(numbers) else 0
    texts = ["" if hide_labels else shortened(names[c], height, room - number_px) for c in classes[:rows]]
    wide = max(max(text_width(text, height) for text in texts) + number_px, 4 * height)
    _darken(image, (min(wide + 3 * margin, image.shape[1]), min(rows * step + margin, image.shape[0])))
    for row, (text, number, score, label) in enumerate(zip(texts, numbers, scores, classes)):
        bottom = margin + row * step + height
        colour, top = colour_of(label), bottom + gap
        cv2.rectangle(image, (margin, top), (margin + wide, top + bar - 1), (90, 90, 90), -1)
        cv2.rectangle(image, (margin, top), (margin + max(round(wide * min(max(score, 0.0), 1.0)), 1), top + bar - 1), colour, -1)
        draw_text(image, text, (margin, bottom), height=height, colour=WHITE)
        draw_text(image, number, (margin + wide - text_width(number, height), bottom), height=height, colour=GREY)
    return image


def shortened(text: str, height: int, most_px: int) -> str:
    """The text, cut to ``most_px`` at this height of capitals with three dots at its end where it is longer."""
    if text_width(text, height) <= most_px:
        return text
    fits = [n for n in range(len(text)) if text_width(f"{text[:n]}...", height) <= most_px]
    return f"{text[: fits[-1]].rstrip()}..." if fits else ""


def _text_height(hw: tuple[int, ...], line_thickness: int | None) -> int:
    """That of a box's label, more where the image is large and less where it is small."""
    wanted = max(4 + 3 * (line_thickness or default_thickness(hw)), round(min(hw) * USUAL_TEXT))
    return max(min(wanted, round(min(hw) * LARGEST_TEXT)), LEAST_TEXT_PX)


def _darken(image: Image, size_wh: tuple[int, int]) -> None:
    panel = image[: size_wh[1], : size_wh[0]]
    panel[:] = (panel * (1 - DARKENED)).astype(np.uint8)
