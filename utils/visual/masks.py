"""Masks on images: tinted areas with an outline."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.masks.packed import Extents, Packed, unpack
from utils.masks.rle import FIELD
from utils.types import Detections
from utils.visual.draw import Image, colour_of, default_thickness, draw_boxes, label_height, text_width

OPACITY = 0.45  # of the tint
LIGHTER = 0.45  # share of white in the outline's colour, so that it shows on its own tint
CROWD = 12  # from so many objects on, labels that would hide their objects are left out


def draw_instances(
    image_rgb: Image, found: Detections, names: Sequence[str], *, line_thickness: int | None = None, hide_labels: bool = False,
    hide_conf: bool = False,
) -> NDArray[np.uint8]:  # fmt: skip
    """A copy of an RGB image (H, W, 3) with masks, thin boxes and labels, the best score on top.

    Among many objects, those that are narrower than their label have none: their colour says the class.

    Args:
        image_rgb: not changed.
        found: with packed masks (n, H, ceil(W / 8)), in px of the image.
        names: of the classes.
        line_thickness: in px; by the image's size if not given.
        hide_labels: draw no labels.
        hide_conf: leave the score out of the label.
    """
    classes, boxes = found.classes.tolist(), found.boxes.detach().float().cpu().numpy()
    line = line_thickness or default_thickness(image_rgb.shape[:2])
    labels = ["" if hide_labels else names[c] if hide_conf else f"{names[c]} {s:.2f}" for c, s in zip(classes, found.scores.tolist())]
    if len(labels) >= CROWD:
        labels = [text if text_width(text, label_height(line)) <= x2 - x1 else "" for text, (x1, _, x2, _) in zip(labels, boxes)]
    shown = draw_masks(image_rgb, found.fields[FIELD].cpu().numpy(), classes, thickness=line)
    return draw_boxes(shown, boxes[::-1], labels[::-1], classes[::-1], line_thickness=line, box_thickness=max(line // 2, 1))


def draw_masks(image_rgb: Image, packed: Packed, classes: Sequence[int], *, thickness: int | None = None) -> NDArray[np.uint8]:
    """A copy of an RGB image (H, W, 3) with masks on it, the first one on top.

    Args:
        image_rgb: not changed.
        packed: (n, H, ceil(W / 8)), best score first.
        classes: of each, for its colour.
        thickness: of the outlines in px; by the image's size if not given.
    """
    shown = image_rgb.copy()
    height, width = shown.shape[:2]
    extents, line = Extents.of(packed), thickness or default_thickness((height, width))
    for index in range(len(packed) - 1, -1, -1):
        rows, byte = extents.window(index)
        part = shown[rows, 8 * byte.start : 8 * byte.stop]
        mask = unpack(packed[index, rows, byte], 8 * (byte.stop - byte.start))[: part.shape[0], : part.shape[1]]
        if not mask.any():
            continue
        colour = np.array(colour_of(classes[index]), np.float32)
        inside = mask > 0
        part[inside] = (part[inside] * (1 - OPACITY) + colour * OPACITY).round().astype(np.uint8)
        contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        outline = tuple(int(v) for v in colour * (1 - LIGHTER) + 255 * LIGHTER)
        offset = (8 * byte.start, rows.start)
        cv2.drawContours(shown, contours, -1, outline, max(line // 2, 1), cv2.LINE_AA, offset=offset)  # type: ignore[call-overload]
    return shown
