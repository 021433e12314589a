"""``--lr-mult attention=2,backbone=0.1``: learning rates by part of the network, as text and as numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping

from utils.errors import UserError, nearest

PARTS = ("attention", "backbone", "neck", "head")
ROWS = re.compile(r"(\d+)(?:-(\d+))?")


def format_lr_multipliers(given: str | Mapping[str | int, float] | None) -> str:
    """The same as text, from what Python users pass: ``{"attention": 2, 10: 0.5}``. Checked on the way."""
    if isinstance(given, Mapping):
        given = ",".join(f"{part}={factor}" for part, factor in given.items())
    text = str(given or "").replace(" ", "")
    parse_lr_multipliers(text)
    return text


def parse_lr_multipliers(text: str) -> dict[str, float]:
    """Part (attention, backbone, neck, head, a row ``10`` or rows ``0-9``) -> factor of the learning rate.

    Raises:
        UserError: an unknown part, one given twice, or a factor that is no positive number.
    """
    factors: dict[str, float] = {}
    for item in filter(None, text.split(",")):
        part, equals, value = item.partition("=")
        where = f"--lr-mult {item}"
        if not equals:
            raise UserError(f"{where}: should be PART=FACTOR such as attention=2")
        if part not in PARTS and not rows_of(part):
            hint = nearest(part, PARTS) or f"{', '.join(PARTS)}, a row such as 10, or rows such as 0-9 are"
            raise UserError(f"{where}: {part!r} is no part of a network; {hint}")
        if part in factors:
            raise UserError(f"{where}: {part} is given twice")
        factors[part] = _factor(value, where)
    return factors


def rows_of(part: str) -> range:
    """The rows that ``10`` or ``0-9`` means; empty for a part by name."""
    match = ROWS.fullmatch(part)
    return range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)


def _factor(value: str, where: str) -> float:
    try:
        factor = float(value)
    except ValueError:
        factor = 0.0
    if not 0 < factor <= 1000:
        raise UserError(f"{where}: the factor should be above 0 and at most 1000; what is not to be trained at all goes to --freeze")
    return factor
