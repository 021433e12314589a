"""Sizes in px as they are typed: one number or two, multiples of the stride, the windows of sliced inference."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from utils.cli.flags import flag
from utils.errors import UserError
from utils.sizes import round_up_to_stride

MIN_SLICE_PX = 32
MAX_SLICE_OVERLAP = 0.9


def slice_flag() -> Any:
    """``--slice`` of detect.py and val.py."""
    help = "also run on windows of this side, or height and width, in px of the image, and merge their detections"
    return flag(None, help, metavar="PX", least=MIN_SLICE_PX, hint="they are px of the image")


def slice_overlap_flag() -> Any:
    """``--slice-overlap`` of detect.py and val.py."""
    help = "smallest overlap of neighbouring windows, a fraction of their side"
    return flag(0.2, help, least=0, most=MAX_SLICE_OVERLAP)


def height_and_width(px: int | Sequence[int], *, flag: str = "--imgsz") -> tuple[int, int]:
    """The two sides in px that ``--imgsz`` or another flag means: one number is a square.

    Raises:
        UserError: more than two numbers, or one below 1.
    """
    sides = (px,) if isinstance(px, int) else tuple(px)
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise UserError(f"{flag} {' '.join(map(str, sides))}: one side in px, or height and width, are needed")
    return sides[0], sides[-1]


def check_slice_flags(given: Container[str]) -> None:
    """Refuses an overlap of windows that were not asked for."""
    if "slice_overlap" in given and "slice" not in given:
        raise UserError("--slice-overlap: belongs to --slice, which is not given; write for example --slice 640 --slice-overlap 0.2")


def multiple_of_stride(px: int, stride: int) -> int:
    """The side that is used for ``--imgsz``: the next multiple of the model's stride, with a line where that is another number."""
    rounded = round_up_to_stride(px, stride)
    if rounded != px:
        print(f"--imgsz {px} is no multiple of the model's stride {stride}: {rounded} is used")
    return rounded
