"""What training and evaluation left in a run folder, read back: metrics.json, per_class.csv, pr_curve.csv, cost.json, a study's marks."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.logging.cost import COST_FILE
from engine.study.records import Cost
from utils.errors import UserError
from utils.reading.limits import MAX_CLASSES, MIB
from utils.reading.text_files import decode, read_bytes
from utils.text_table import FORMULA_STARTS

METRICS, PER_CLASS, PR_CURVE = "metrics.json", "per_class.csv", "pr_curve.csv"
STUDY_RUN, STUDY_METRICS, STUDY_FAILED = "study_run.json", "study_metrics.json", "study_failed.json"  # of a run of a study
STUDY, EARLY_STOP = "study.json", "early_stop.json"  # of a study
CLASS_COLUMNS = ("P", "R", "AP50", "AP75", "AP", "objects")
MOST_POINTS = 10_000  # of a PR curve
FOLLOWS = "its controlled variant was stopped after {} epochs"  # why a control was stopped
_SIZES = ("parameters", "gflops", "customary_gflops")  # of Cost
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
            parameters=parameters if type(parameters) is int and 0 <= parameters < 1e15 else None,
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
        flags: of its training.
        failure: why it failed; empty where it did not.
        outputs: of the weights that the study compares; None where they were not measured.
    """

    variant: str = ""
    control_of: tuple[str, ...] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""
    outputs: Outputs | None = None


def read_study_run(folder: Path, notes: list[str]) -> StudyRun:
    """The marks of a study in a run folder; one that is damaged is a note."""
    try:
        marks = _read_json(folder / STUDY_RUN)
        variant, control_of, flags = marks.get("variant"), marks.get("control_of"), marks.get("flags")
        if not isinstance(variant, str) or not variant:
            return StudyRun()
        controlled = tuple(str(v) for v in control_of) if isinstance(control_of, list) else ()
        failed, path = _read_json(folder / STUDY_FAILED), folder / STUDY_FAILED
        run = StudyRun(variant, controlled, flags if isinstance(flags, dict) else {}, _reason(failed) if path.is_file() else "")
        measured = _read_json(folder / STUDY_METRICS, most=16 * MIB)
    except UserError as error:
        notes.append(f"{error}; it is left out")
        return StudyRun()
    if not measured:
        return run
    per_class, curves = measured.get("per_class"), measured.get("pr_curves")
    outputs = Outputs(
        metrics=_numbers(measured.get("metrics")),
        per_class={name: _numbers(row) for name, row in per_class.items()} if isinstance(per_class, dict) else {},
        per_size=_numbers(measured.get("per_size")),
        pr_curves={name: [float(v) for v in row] for name, row in curves.items() if _are_numbers(row)} if isinstance(curves, dict) else {},
        image_noise=_numbers(measured.get("image_noise")),
    )
    return replace(run, outputs=outputs, failure="")


def _reason(failed: Mapping[str, Any]) -> str:
    return str(failed.get("reason") or "no reason is known")


@dataclass(frozen=True)
class StudyOfRuns:
    """What a study folder says of the runs in it; empty where it says nothing.

    Attributes:
        variants: in the order of the table.
        costs: of each variant's network, as the study measured them.
        stopped: by its rule, variant -> after how many epochs, and why.
    """

    baseline: str = ""
    metric: str = ""
    variants: tuple[str, ...] = ()
    costs: Mapping[str, Cost] = field(default_factory=dict)
    stopped: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    def stop_of(self, run: StudyRun) -> tuple[int, str] | None:
        """After how many epochs its rule stopped the variant of a run, and why; a control stops with the last of its variants."""
        if run.variant in self.stopped or not run.control_of:
            return self.stopped.get(run.variant)
        owners = [self.stopped.get(name) for name in run.control_of]
        stops = [stop[0] for stop in owners if stop is not None]
        return (max(stops), FOLLOWS.format(max(stops))) if len(stops) == len(owners) else None


def read_study_folder(folder: Path, notes: list[str]) -> StudyOfRuns:
    """What ``study.json`` and ``early_stop.json`` of a study folder say; a file that is damaged is a note."""
    try:
        values = _read_json(folder / STUDY, most=16 * MIB)
        baseline, metric, variants = (values.get(key) for key in ("baseline", "metric", "variants"))
        if not isinstance(baseline, str) or not isinstance(metric, str) or not isinstance(variants, dict):
            if values:
                notes.append(f"{folder / STUDY}: baseline, metric and variants are expected; it is left out")
            return StudyOfRuns()
        rungs = _read_json(folder / EARLY_STOP).get("rungs")
    except UserError as error:
        notes.append(f"{error}; it is left out")
        return StudyOfRuns()
    rungs = {int(at): rung for at, rung in rungs.items() if _is_count(at) and isinstance(rung, dict)} if isinstance(rungs, dict) else {}
    stopped = {variant: (at, str(why)) for at in sorted(rungs, reverse=True) for variant, why in rungs[at].items() if why}
    return StudyOfRuns(baseline, metric, tuple(variants), {name: _cost(value) for name, value in variants.items()}, stopped)


def study_content(baseline: str, metric: str, costs: Mapping[str, Cost]) -> dict[str, Any]:
    """What ``study.json`` holds, as :func:`read_study_folder` reads it; ``costs`` are by variant, in the order of the table."""
    variants = {}
    for name, cost in costs.items():
        latency = {str(batch): list(values) for batch, values in cost.latency_ms.items()}
        variants[name] = {**{key: getattr(cost, key) for key in (*_SIZES, "device")}, "latency_ms": latency}
    return {"baseline": baseline, "metric": metric, "variants": variants}


def _cost(value: Any) -> Cost:
    """The cost that ``study.json`` has of a variant; what is no number is left out."""
    values = value if isinstance(value, dict) else {}
    sizes = {key: number for key, number in _numbers(values).items() if key in _SIZES and number >= 0}
    parameters = sizes.pop("parameters", None)
    latency, named = values.get("latency_ms"), values.get("device")
    rows, device = latency.items() if isinstance(latency, dict) else (), named if isinstance(named, str) else ""
    times = {int(size): (row[0], row[1]) for size, row in rows if _is_count(size) and _are_numbers(row) and len(row) == 2}
    return Cost(None if parameters is None else int(parameters), **sizes, latency_ms=times, device=device)


def _is_count(text: str) -> bool:
    return text.isdecimal() and len(text) < 10


def _are_numbers(row: Any) -> bool:
    return isinstance(row, list) and len(row) <= MOST_POINTS and len(_numbers(dict(enumerate(row)))) == len(row)


def _read_json(path: Path, *, most: int = MIB) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(decode(read_bytes(path, most=most, kind="JSON file")))
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, UserError) else UserError(f"{path}: not valid JSON ({str(error)[:80]})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: keys and values are expected, not a {type(value).__name__}")
    return value


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
