"""What training and evaluation left in a run folder, read back: metrics.json, per_class.csv, pr_curve.csv, cost.json, a study's marks."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.logging.cost import COST_FILE
from utils.errors import UserError
from utils.reading.limits import MAX_CLASSES, MIB
from utils.reading.text_files import decode, read_bytes
from utils.text_table import FORMULA_STARTS

METRICS, PER_CLASS, PR_CURVE = "metrics.json", "per_class.csv", "pr_curve.csv"
STUDY_RUN, STUDY_METRICS = "study_run.json", "study_metrics.json"  # of a run of a study
STUDY_DIFFERENCES = "diff.json"  # of a study
CLASS_COLUMNS = ("P", "R", "AP50", "AP75", "AP", "objects")
MOST_POINTS = 10_000  # of a PR curve
ALL = "all"  # the first row, and the first column of values: the mean over classes


@dataclass(frozen=True)
class Outputs:
    """The parts of a RunRecord that come from an evaluation; empty where it left none."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    per_class: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    per_size: Mapping[str, float] = field(default_factory=dict)
    pr_curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    image_noise: Mapping[str, float] = field(default_factory=dict)
    parameters: int | None = None
    program: str = ""
    peak_memory_mib: float | None = None
    seconds: float | None = None  # of the training


def read_outputs(folder: Path, notes: list[str]) -> Outputs:
    """What the evaluation of a run left; a file that is missing is empty, one that is damaged is a note."""
    try:
        values, cost = _read_json(folder / METRICS), _read_json(folder / COST_FILE)
        seconds = _numbers(dict(enumerate(each))) if isinstance(each := cost.get("epoch_seconds"), list) else {}
        parameters = values.get("parameters")
        return Outputs(
            metrics=_numbers(values.get("metrics")),
            per_class=_read_classes(folder / PER_CLASS),
            per_size={size: number for size, number in _numbers(values.get("size_ap")).items() if math.isfinite(number)},
            pr_curves=_read_curves(folder / PR_CURVE),
            image_noise=_numbers(values.get("image_noise")),
            parameters=parameters if type(parameters) is int else None,
            program=f"this project, rule {str(values.get('rule'))[:20]}" if values else "",
            peak_memory_mib=_numbers(cost).get("peak_memory_mib"),
            seconds=sum(seconds.values()) or None,
        )
    except UserError as error:
        notes.append(f"{error}; it is left out")
        return Outputs()


@dataclass(frozen=True)
class StudyRun:
    """What a study wrote into the folder of one of its runs; ``variant`` is empty where the run is of none.

    Attributes:
        control_of: the variants whose capacity control it is.
        outputs: of the weights that the study compares; None where they were not measured.
    """

    variant: str = ""
    control_of: tuple[str, ...] = ()
    outputs: Outputs | None = None


def read_study_run(folder: Path, notes: list[str]) -> StudyRun:
    """The marks of a study in a run folder; one that is damaged is a note."""
    try:
        marks = _read_json(folder / STUDY_RUN)
        variant, control_of = marks.get("variant"), marks.get("control_of")
        if not isinstance(variant, str) or not variant:
            return StudyRun()
        controlled = tuple(str(v) for v in control_of) if isinstance(control_of, list) else ()
        measured = _read_json(folder / STUDY_METRICS, most=16 * MIB)
    except UserError as error:
        notes.append(f"{error}; it is left out")
        return StudyRun()
    if not measured:
        return StudyRun(variant, controlled)
    per_class, curves = measured.get("per_class"), measured.get("pr_curves")
    outputs = Outputs(
        metrics=_numbers(measured.get("metrics")),
        per_class={name: _numbers(row) for name, row in per_class.items()} if isinstance(per_class, dict) else {},
        per_size=_numbers(measured.get("per_size")),
        pr_curves={name: [float(v) for v in row] for name, row in curves.items() if _are_numbers(row)} if isinstance(curves, dict) else {},
        image_noise=_numbers(measured.get("image_noise")),
    )
    return StudyRun(variant, controlled, outputs)


@dataclass(frozen=True)
class StudyOfRuns:
    """What a study folder says of the runs in it.

    Attributes:
        baseline: empty where it is not known.
        variants: in the order of the table.
        parameters, gflops: of each variant's network, as the study counted them.
    """

    baseline: str = ""
    variants: tuple[str, ...] = ()
    parameters: Mapping[str, int] = field(default_factory=dict)
    gflops: Mapping[str, float] = field(default_factory=dict)


def read_study_folder(folder: Path, notes: list[str]) -> StudyOfRuns:
    """The baseline, the variants and the sizes of a study from its ``diff.json``; empty without one, and a note where it is damaged."""
    path = folder / STUDY_DIFFERENCES
    if not path.is_file():
        return StudyOfRuns()
    try:
        rows = _parse_json(path, most=16 * MIB)
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            return StudyOfRuns()  # a study of its baseline alone
        baseline, names = rows[0]["baseline"], [row["variant"] for row in rows]
        sizes = {key: {baseline: rows[0][key][0], **{row["variant"]: row[key][1] for row in rows}} for key in ("parameters", "gflops")}
        if not all(isinstance(name, str) for name in (baseline, *names)):
            raise TypeError("names are expected")
    except UserError as error:
        notes.append(f"{error}; it is left out")
        return StudyOfRuns()
    except (KeyError, IndexError, TypeError) as error:
        notes.append(f"{path}: not the differences of a study ({type(error).__name__}: {error}); it is left out")
        return StudyOfRuns()
    known = {key: {name: value for name, value in values.items() if type(value) in (int, float)} for key, values in sizes.items()}
    return StudyOfRuns(baseline, (baseline, *names), known["parameters"], known["gflops"])


def _are_numbers(row: Any) -> bool:
    return isinstance(row, list) and len(row) <= MOST_POINTS and all(isinstance(v, (int, float)) for v in row)


def _read_json(path: Path, *, most: int = MIB) -> dict[str, Any]:
    value = _parse_json(path, most=most) if path.is_file() else {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: keys and values are expected, not a {type(value).__name__}")
    return value


def _parse_json(path: Path, *, most: int) -> Any:
    """What a JSON file holds.

    Raises:
        UserError: larger than ``most`` bytes, or damaged.
    """
    try:
        return json.loads(decode(read_bytes(path, most=most, kind="JSON file")))
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, UserError) else UserError(f"{path}: not valid JSON ({str(error)[:80]})") from None


def _numbers(value: Any) -> dict[str, float]:
    """The numbers of a mapping; null is left out."""
    items = value.items() if isinstance(value, dict) else ()
    return {str(k): float(v) for k, v in items if isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e15}


def _read_classes(path: Path) -> dict[str, dict[str, float]]:
    header, rows = _read_table(path, most=MAX_CLASSES + 1)
    if not rows:
        return {}
    if header[0] != "class":
        raise UserError(f"{path}: the first column is {header[0][:40]!r}, class is expected")
    rows = rows[1:] if rows[0][0] == ALL else rows
    return {_unquoted(row[0]): {name: _number(cell) for name, cell in zip(header, row) if name in CLASS_COLUMNS} for row in rows}


def _unquoted(name: str) -> str:
    """The name without the apostrophe that :func:`utils.text_table.csv_cell` puts before what looks like a formula."""
    return name[1:] if name.startswith("'") and name[1:2] in FORMULA_STARTS else name


def _read_curves(path: Path) -> dict[str, list[float]]:
    header, rows = _read_table(path, most=MOST_POINTS)
    return {name: [_number(row[i]) if i < len(row) else math.nan for row in rows] for i, name in enumerate(header[:2]) if name == ALL}


def _read_table(path: Path, *, most: int) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV file; nothing where there is none."""
    if not path.is_file():
        return [], []
    try:
        rows = list(csv.reader(io.StringIO(decode(read_bytes(path, kind="CSV file")), newline="")))
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV file ({error})") from None
    if len(rows) > most + 1:
        raise UserError(f"{path}: {len(rows)} rows, at most {most} are read")
    rows = [row for row in rows if row]
    return (rows[0], rows[1:]) if rows else ([], [])


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
