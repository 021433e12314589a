"""The hyper-parameters that augmentation reads, with the names and meanings of the YOLOv5, v8 and v9 families."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol


class AugmentHyp(Protocol):
    """The hyper-parameters that augmentation reads."""

    @property
    def hsv_h(self) -> float: ...
    @property
    def hsv_s(self) -> float: ...
    @property
    def hsv_v(self) -> float: ...
    @property
    def degrees(self) -> float: ...
    @property
    def translate(self) -> float: ...
    @property
    def scale(self) -> float: ...
    @property
    def shear(self) -> float: ...
    @property
    def perspective(self) -> float: ...
    @property
    def flipud(self) -> float: ...
    @property
    def fliplr(self) -> float: ...
    @property
    def mosaic(self) -> float: ...
    @property
    def mixup(self) -> float: ...
    @property
    def copy_paste(self) -> float: ...


@dataclass(frozen=True)
class AugmentValues:
    """The same as values of their own."""

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

    @classmethod
    def of(cls, hyp: AugmentHyp, **changes: float) -> AugmentValues:
        """The values of ``hyp``, some exchanged."""
        return cls(**{**{field.name: getattr(hyp, field.name) for field in fields(cls)}, **changes})
