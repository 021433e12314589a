"""Stopping hopeless variants early: successive halving by the mean of a variant's seeds, after so many epochs each time.

Source: Jamieson and Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter Optimization, arXiv 1502.07943. All seeds of a
variant are stopped, or none. The baseline is never stopped, and a capacity control is kept as long as a variant that it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.study.run_files import read_json, write_json
from utils.errors import UserError, nearest
from utils.reading.yaml_text import shown

KEYS = ("after", "keep")
DECISIONS_FILE = "early_stop.json"


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


def survivors(
    means: Mapping[str, float], rule: Rule, *, always: Sequence[str], follows: Mapping[str, Sequence[str]],
    decided: Mapping[str, str] | None = None,
) -> set[str]:  # fmt: skip
    """The variants that train on.

    Args:
        means: of the metric over the seeds of each variant that is left, NaN where no seed was trained.
        always: variants that are never stopped and do not compete, such as the baseline.
        follows: control -> the variants that it belongs to; it does not compete.
        decided: variant -> why it was stopped here before, empty if it was not; the others join and are measured against these.
    """
    decided = decided or {}
    competing = [name for name in means if name not in always and name not in follows]
    ranked = sorted(competing, key=lambda name: -math.inf if math.isnan(means[name]) else means[name], reverse=True)
    kept = {*ranked[: math.ceil(rule.keep * len(ranked))], *(name for name in always if name in means)}
    kept = {name for name in kept if not decided.get(name)} | {name for name in means if decided.get(name) == ""}
    return kept | {control for control, owners in follows.items() if control in means and kept.intersection(owners)}


class Decisions:
    """What a rule decided after each of its epochs: kept as a file, so that no later failure, seed or variant undoes it.

    Args:
        path: the file; None keeps nothing.
        rule, metric, always: by what is decided; what another rule decided does not count.

    Raises:
        UserError: the file is damaged.
    """

    def __init__(self, path: Path | None, rule: Rule, *, metric: str, always: Sequence[str]) -> None:
        self.path = path
        self.rule = {"after": list(rule.after), "keep": rule.keep, "metric": metric, "always": list(always)}
        found = read_json(path) if path and path.is_file() else {}
        self.rungs: dict[str, dict[str, str]] = _rungs(found.get("rungs"), path) if found.get("rule") == self.rule else {}

    def at(self, epoch: int) -> dict[str, str]:
        """Variant -> why it was stopped after so many epochs; empty for one that trains on."""
        return self.rungs.get(str(epoch), {})

    def keep(self, epoch: int, decided: Mapping[str, str]) -> None:
        """Adds decisions; those that were made before stay."""
        whole = {**decided, **self.at(epoch)}
        if whole == self.at(epoch):
            return
        self.rungs[str(epoch)] = whole
        if self.path:
            write_json(self.path, {"rule": self.rule, "rungs": self.rungs})


def _rungs(value: Any, path: Path | None) -> dict[str, dict[str, str]]:
    rungs = value if isinstance(value, dict) else {}
    if not all(isinstance(rung, dict) and all(isinstance(why, str) for why in rung.values()) for rung in rungs.values()):
        raise UserError(f"{path}: damaged; remove it, and variants are stopped by what their runs hold")
    return rungs
