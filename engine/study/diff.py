"""What differs between two variants: rows, parameters, multiply-adds, hyper-parameters and start; printed, and saved with the study."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.study.plan import PlannedVariant
from engine.study.records import Cost
from models.spec.parser import Row
from utils.files import atomic_write


@dataclass(frozen=True)
class Difference:
    """What another variant has in place of the baseline's.

    Attributes:
        rows: lines that begin with ``-`` (the baseline's) or ``+``, with the number of the row there.
        parameters, gflops: of both.
        hyp: key -> values of both.
        other: start and size: key -> values of both.
    """

    variant: str
    baseline: str
    rows: tuple[str, ...]
    parameters: tuple[int | None, int | None]
    gflops: tuple[float | None, float | None]
    hyp: Mapping[str, tuple[Any, Any]]
    other: Mapping[str, tuple[Any, Any]]

    def lines(self) -> list[str]:
        """For the console and diff.md."""
        out = list(self.rows)
        out += [f"parameters {_change(*self.parameters, form=',')}", f"GFLOPs {_change(*self.gflops, form='.3f')}"]
        out += [f"{key}: {before} -> {after}" for key, (before, after) in {**self.hyp, **self.other}.items()]
        return out


def difference(baseline: PlannedVariant, other: PlannedVariant, costs: Mapping[str, Cost]) -> Difference:
    """Compares two variants.

    Args:
        costs: by the variants' names.
    """
    a, b = costs.get(baseline.name, Cost()), costs.get(other.name, Cost())
    recipes = baseline.hyp.to_dict(), other.hyp.to_dict()
    start = [
        {"weights": v.weights or "scratch", "imgsz": v.imgsz, "scale": p.spec.scale, "depth": p.spec.depth, "width": p.spec.width}
        for p, v in ((baseline, baseline.variant), (other, other.variant))
    ]
    return Difference(
        other.name, baseline.name, tuple(_row_lines(baseline.spec.rows, other.spec.rows)), (a.parameters, b.parameters),
        (a.gflops, b.gflops), _differing(*recipes), _differing(*start),
    )  # fmt: skip


def write_differences(folder: Path, differences: Sequence[Difference]) -> None:
    """Writes diff.md and diff.json."""
    parts = ["# What differs from the baseline\n"]
    for found in differences:
        parts.append(f"## {found.variant} and {found.baseline}\n\n```diff\n" + "\n".join(found.lines()) + "\n```\n")
    for name, text in (
        ("diff.md", "\n".join(parts)),
        ("diff.json", json.dumps([asdict(d) for d in differences], indent=1, ensure_ascii=False)),
    ):
        with atomic_write(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")


def _row_lines(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """Rows that only one has. Sources are left out: those behind an insertion move by one."""
    old, new = ([_text(row) for row in rows] for rows in (before, after))
    lines = []
    for tag, a0, a1, b0, b1 in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag != "equal":
            lines += [f"- row {i}: {old[i]}" for i in range(a0, a1)] + [f"+ row {i}: {new[i]}" for i in range(b0, b1)]
    return lines


def _text(row: Row) -> str:
    times = f"{row.number} x " if row.number > 1 else ""
    return f"{times}{row.module} {[dict(a) if isinstance(a, Mapping) else a for a in row.args]}"


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def _change(before: float | None, after: float | None, *, form: str) -> str:
    if before is None or after is None:
        return "not counted"
    share = f", {after / before - 1:+.2%}" if before else ""
    return f"{before:{form}} -> {after:{form}} ({after - before:+{form}}{share})"
