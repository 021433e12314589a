"""What command lines share: flags that are known by name only, to answer them, and sizes given as one number or two."""

from __future__ import annotations

import argparse
from collections.abc import Container, Iterable, Sequence

from utils.errors import UserError

MIN_SLICE_PX = 32
MAX_SLICE_OVERLAP = 0.9
SLICE_TEXT = "also look at the image through windows of this side, or height and width, in px, and merge what they show"
SLICE_OVERLAP_TEXT = "least common part of neighbouring windows, a fraction of their side"


def add_noted_flags(parser: argparse.ArgumentParser, flags: Iterable[str], *, dest: str) -> None:
    """Lets the parser take each flag with any values; ``dest`` of the result lists those that were given, spelled as in ``flags``."""
    for flag in flags:
        parser.add_argument(flag, dest=dest, action=_Noted, nargs="*", help=argparse.SUPPRESS)


def height_and_width(px: int | Sequence[int], *, flag: str = "--imgsz") -> tuple[int, int]:
    """The two sides in px that ``--imgsz`` or another flag means: one number is a square.

    Raises:
        UserError: more than two numbers, or one below 1.
    """
    sides = (px,) if isinstance(px, int) else tuple(px)
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise UserError(f"{flag} {' '.join(map(str, sides))}: one side in px, or height and width, are needed")
    return sides[0], sides[-1]


def slice_size(px: int | Sequence[int] | None, overlap: float) -> tuple[int, int] | None:
    """Height and width in px that ``--slice`` means, None where it is not given; ``--slice-overlap`` is checked as well.

    Raises:
        UserError: a side that is too small to see anything in, or an overlap out of range.
    """
    if not 0 <= overlap <= MAX_SLICE_OVERLAP:
        raise UserError(f"--slice-overlap {overlap:g}: a fraction of the window in 0-{MAX_SLICE_OVERLAP} is needed, such as 0.2")
    size = None if px is None else height_and_width(px, flag="--slice")
    if size and min(size) < MIN_SLICE_PX:
        raise UserError(f"--slice {size[0]} {size[1]}: windows of at least {MIN_SLICE_PX} px a side are needed")
    return size


def check_slice_flags(given: Container[str]) -> None:
    """Refuses an overlap of windows that were not asked for."""
    if "slice_overlap" in given and "slice" not in given:
        raise UserError("--slice-overlap: belongs to --slice, which is not given; write for example --slice 640 --slice-overlap 0.2")


def multiple_of_stride(px: int, stride: int) -> int:
    """The side that is used for ``--imgsz``: the next multiple of the model's stride, with a line where that is another number."""
    rounded = -(-px // stride) * stride
    if rounded != px:
        print(f"--imgsz {px} is no multiple of the model's stride {stride}: {rounded} is used")
    return rounded


class _Noted(argparse.Action):
    """Remembers that a flag was given, whatever follows it."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: object, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, []), self.option_strings[0]])
