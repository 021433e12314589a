"""What became of a checkpoint's weights in a network: by row, in sum, and as a file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.errors import UserError
from utils.text_table import csv_cell, markdown_table

# What can become of a row, in the order of a report.
KEPT, MOVED, ADAPTED, PARTIAL, FRESH, DROPPED = "transferred", "re-indexed", "adapted", "partial", "initialisation", "dropped"
OUTCOMES = (KEPT, MOVED, ADAPTED, PARTIAL, FRESH, DROPPED)
COLUMNS = ("source", "target", "module", "outcome", "landed", "of source", "of target", "note")
SUFFIXES = (".md", ".csv", ".json")


@dataclass(frozen=True)
class RowReport:
    """One row of the network, or one of the checkpoint that has no place in it.

    Attributes:
        source, target: row numbers; None without one.
        module: registered name, as far as it is known.
        outcome: one of ``OUTCOMES``.
        landed: elements that went from the one to the other.
        source_size, target_size: elements of each, without the step counters of batch norms.
        note: what was done to make it fit.
    """

    source: int | None
    target: int | None
    module: str
    outcome: str
    landed: int
    source_size: int
    target_size: int
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        shares = [f"{_percent(min(self.landed, size), size)}" if size else "" for size in (self.source_size, self.target_size)]
        numbers = ["" if i is None else str(i) for i in (self.source, self.target)]
        return (*numbers, self.module, self.outcome, str(self.landed), *shares, self.note)


@dataclass(frozen=True)
class TransferReport:
    """All rows with tensors, and the names of what is filled.

    Attributes:
        origin: where the weights are from.
        rows: of the network in order, then what was dropped.
        filled: names of the network's tensors that hold the checkpoint's values in whole.
        tensors: how many the network has.
        anchors: which stay, where the checkpoint has others than the network's YAML lists.
    """

    origin: str
    rows: tuple[RowReport, ...]
    filled: frozenset[str]
    tensors: int
    anchors: str = ""

    @property
    def landed(self) -> int:
        """Elements of the checkpoint that are in the network now."""
        return sum(row.landed for row in self.rows)

    @property
    def of_source(self) -> float:
        """Share of the checkpoint's parameters (with running statistics) that landed, 0-1."""
        return min(self.landed / max(sum(row.source_size for row in self.rows), 1), 1.0)  # what is adapted may become more

    @property
    def of_target(self) -> float:
        """Share of the network's parameters that are filled, 0-1."""
        return self.landed / max(sum(row.target_size for row in self.rows), 1)

    def having(self, *outcomes: str) -> list[RowReport]:
        return [row for row in self.rows if row.outcome in outcomes]

    def __str__(self) -> str:
        """A few lines: how much, and what did not go the plain way."""
        lines = [
            f"{self.origin}: transferred {len(self.filled)} of {self.tensors} tensors; {_percent(self.of_source)} of its parameters "
            f"landed, {_percent(self.of_target)} of the network's are filled"
        ]
        lines += [f"  {name:<14} {text}" for name, text in self._summaries() if text]
        return "\n".join(lines)

    def _summaries(self) -> list[tuple[str, str]]:
        noted = [(r.target, f"row {r.target} {r.module}".rstrip() + f" ({r.note})" * bool(r.note)) for r in self.having(ADAPTED, PARTIAL)]
        return [
            (KEPT, _count(self.having(KEPT))),
            (MOVED, _ranges(self.having(MOVED))),
            ("in part", ", ".join(text for _, text in noted)),
            (FRESH, _named((r.target, r.module) for r in self.having(FRESH))),
            (DROPPED, _named((r.source, r.module) for r in self.having(DROPPED))),
            ("anchors", self.anchors),
        ]

    def write(self, path: str | Path) -> None:
        """Writes the report as Markdown, CSV or JSON, by the file's suffix.

        Raises:
            UserError: another ending, or the file cannot be written.
        """
        path = Path(path)
        check_report_path(path)
        text = {".md": self._markdown, ".csv": self._csv, ".json": self._json}[path.suffix.lower()]()
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--weights-report {path}: cannot be written ({error.strerror or error})") from error

    def _markdown(self) -> str:
        table = markdown_table(COLUMNS, (row.cells() for row in self.rows))
        return f"# Weights from {self.origin}\n\n{self}\n\n{table}\n"

    def _csv(self) -> str:
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(asdict(self.rows[0]).keys() if self.rows else COLUMNS)
        writer.writerows(map(csv_cell, asdict(row).values()) for row in self.rows)
        return file.getvalue()

    def _json(self) -> str:
        content = {
            "origin": self.origin,
            "tensors": self.tensors,
            "tensors_filled": len(self.filled),
            "of_source": self.of_source,
            "of_target": self.of_target,
            "anchors": self.anchors,
            "rows": [asdict(row) for row in self.rows],
        }
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def check_report_path(path: str | Path) -> None:
    """Raises UserError where a report's ending is not one of those that can be written."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise UserError(f"--weights-report {path}: a file that ends in {', '.join(SUFFIXES)} is needed")


def _percent(share: float, whole: int = 1) -> str:
    """In percent, never rounded up to 100 or down to 0."""
    percent = 100 * share / whole
    if 99.9 < percent < 100 or 0 < percent < 0.1:
        return ">99.9 %" if percent > 1 else "<0.1 %"
    return f"{percent:.1f} %".replace("100.0", "100")


def _count(rows: Sequence[RowReport]) -> str:
    return f"{len(rows)} rows" if len(rows) != 1 else "1 row"


def _ranges(rows: Sequence[RowReport]) -> str:
    """``9-21 to 10-22`` for rows that moved together."""
    runs: list[list[RowReport]] = []
    for row in rows:
        if runs and _shift(runs[-1][-1]) == _shift(row):
            runs[-1].append(row)
        else:
            runs.append([row])
    return ", ".join(f"{_span([r.source for r in run])} to {_span([r.target for r in run])}" for run in runs)


def _shift(row: RowReport) -> int:
    return (row.target or 0) - (row.source or 0)


def _span(numbers: Sequence[int | None]) -> str:
    return f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"


def _named(rows: Iterable[tuple[int | None, str]]) -> str:
    return ", ".join(f"row {index} {module}".rstrip() if index is not None else module for index, module in rows)
