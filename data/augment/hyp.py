"""The hyper-parameters that augmentation reads, with the names and meanings of the YOLOv5, v8 and v9 families."""

from __future__ import annotations

from typing import Protocol


class AugmentHyp(Protocol):
    """The hyper-parameters that augmentation reads."""

    hsv_h: float
    hsv_s: float
    hsv_v: float
    degrees: float
    translate: float
    scale: float
    shear: float
    perspective: float
    flipud: float
    fliplr: float
    mosaic: float
    mixup: float
    copy_paste: float
