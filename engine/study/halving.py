"""Stopping hopeless variants early: successive halving by the mean of a variant's seeds, after so many epochs each time.

Source: Jamieson and Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter Optimization, arXiv 1502.07943. All seeds of a
variant are stopped, or none. The baseline is never stopped, and a capacity control is kept as long as a variant that it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from utils.errors import UserError, nearest
from utils.reading.yaml_text import shown

KEYS = ("after", "keep")


@dataclass(frozen=True)
class Rule:
    """After each of ``after`` epochs, the best ``keep`` of the variants that are left train on."""

    after: tuple[int, ...]
    keep: float

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, epochs: int, source: str) -> Rule:
        """Reads ``{after: [5, 10], keep: 0.5}``.

        Raises:
            UserError: a key is unknown or missing, or a value is out of range; names file and key.
        """
        for key in values:
            if key not in KEYS:
                raise UserError(f"{source}: early_stop: unknown key {shown(key)}; {nearest(str(key), KEYS) or 'known are after and keep'}")
        after, keep = values.get("after"), values.get("keep", 0.5)
        after = after if isinstance(after, list) else [after]
        whole = all(type(a) is int and 1 <= a < epochs for a in after)
        if not whole or sorted(set(after)) != after:
            got = shown(values.get("after"))
            raise UserError(f"{source}: early_stop.after: ascending epochs from 1 to {epochs - 1} are expected, not {got}")
        if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep < 1:
            raise UserError(f"{source}: early_stop.keep: a fraction between 0 and 1 is expected, not {shown(keep)}")
        return cls(tuple(after), float(keep))

    def __str__(self) -> str:
        epochs = ", ".join(map(str, self.after))
        return f"successive halving: after {epochs} epochs the best {self.keep:g} of the variants by the mean of their seeds train on"


def survivors(means: Mapping[str, float], rule: Rule, *, always: Sequence[str], follows: Mapping[str, Sequence[str]]) -> set[str]:
    """The variants that train on.

    Args:
        means: of the metric over the seeds of each variant that is left, NaN where no seed was trained.
        always: variants that are never stopped and do not compete, such as the baseline.
        follows: control -> the variants that it belongs to; it does not compete.
    """
    competing = [name for name in means if name not in always and name not in follows]
    ranked = sorted(competing, key=lambda name: -math.inf if math.isnan(means[name]) else means[name], reverse=True)
    kept = {*ranked[: math.ceil(rule.keep * len(ranked))], *(name for name in always if name in means)}
    return kept | {control for control, owners in follows.items() if control in means and kept.intersection(owners)}
