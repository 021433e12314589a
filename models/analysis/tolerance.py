"""``--tolerance PX SCORE``: how far a written network may differ from torch, for who knows better than the usual limits."""

from __future__ import annotations

import math
from collections.abc import Sequence

from utils.errors import UserError


def check_tolerance(values: Sequence[float]) -> tuple[float, float]:
    """The allowed differences of boxes in px and of scores.

    Raises:
        UserError: not two numbers above 0.
    """
    if len(values) != 2 or not all(0 < value < math.inf for value in values):
        shown = " ".join(f"{value:g}" for value in values)
        raise UserError(f"--tolerance {shown}: two numbers above 0 are needed, px and score, such as 0.01 0.001")
    return values[0], values[1]
