"""Rotated boxes and their labels on images, as boxes are drawn: four sides, and the class at the corner that is highest."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.rotated.boxes import corners_of, rotated_boxes
from utils.types import Detections
from utils.visual.draw import Image, colour_of, default_thickness, draw_label

SUBPIXEL_BITS = 4  # corners are drawn to a sixteenth of a pixel, so that slanted sides stay straight
REACH = 32767  # px


def draw_rotated_detections(
    image_rgb: Image,
    found: Detections,
    names: Sequence[str],
    *,
    line_thickness: int | None = None,
    hide_labels: bool = False,
    hide_conf: bool = False,
) -> Image:
    """A copy of an RGB image (H, W, 3) with its rotated detections, the best score drawn last and so on top.

    Args:
        found: boxes in px of the image with the field ``angle``, on any device.
        names: of the classes.
        line_thickness: in px; by the image's size if not given.
        hide_labels: draw boxes only.
        hide_conf: leave the score out of the label.
    """
    image = image_rgb.copy()
    boxes = rotated_boxes(found.boxes.detach().float().cpu(), found.fields["angle"].detach().float().cpu())
    corners = np.nan_to_num(corners_of(boxes).numpy(), nan=0.0)[::-1]
    classes, scores = found.classes.tolist()[::-1], found.scores.tolist()[::-1]
    width = line_thickness or default_thickness(image.shape[:2])
    for quadrangle, c in zip(corners, classes):
        _outline(image, quadrangle, c, width)
    for quadrangle, c, score in zip(corners, classes, scores):  # after all boxes, so that no line crosses a text
        if not hide_labels:
            x, y = quadrangle[np.lexsort((quadrangle[:, 0], quadrangle[:, 1].round()))[0]].clip(-REACH, REACH).round().astype(int).tolist()
            draw_label(image, names[c] if hide_conf else f"{names[c]} {score:.2f}", (x, y), colour_of(c), width)
    return image


def _outline(image: Image, quadrangle: NDArray, label: int, width: int) -> None:
    points = (quadrangle.clip(-REACH, REACH) * (1 << SUBPIXEL_BITS)).round().astype(np.int32)
    cv2.polylines(image, [points.reshape(-1, 1, 2)], True, colour_of(label), width, cv2.LINE_AA, SUBPIXEL_BITS)
