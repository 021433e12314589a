"""What command lines share: flags that are known by name only, to answer them, and sizes given as one number or two."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from utils.errors import UserError


def add_noted_flags(parser: argparse.ArgumentParser, flags: Iterable[str], *, dest: str) -> None:
    """Lets the parser take each flag with any values; ``dest`` of the result lists those that were given, spelled as in ``flags``."""
    for flag in flags:
        parser.add_argument(flag, dest=dest, action=_Noted, nargs="*", help=argparse.SUPPRESS)


def height_and_width(imgsz: int | Sequence[int]) -> tuple[int, int]:
    """The two sides in px that ``--imgsz`` means: one number is a square.

    Raises:
        UserError: more than two numbers, or one below 1.
    """
    sides = (imgsz,) if isinstance(imgsz, int) else tuple(imgsz)
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise UserError(f"--imgsz {' '.join(map(str, sides))}: one side in px, or height and width, are needed")
    return sides[0], sides[-1]


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
