"""What training and evaluation left in a run folder, read back: metrics.json, per_class.csv, pr_curve.csv, cost.json, a study's marks."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.logging.cost import COST_FILE
from engine.study.records import Cost, Stop
from utils.errors import UserError
from utils.reading.limits import MAX_CLASSES, MIB
from utils.reading.text_files import decode, read_bytes
from utils.text_table import FORMULA_STARTS

METRICS, PER_CLASS, PR_CURVE = "metrics.json", "per_class.csv", "pr_curve.csv"
STUDY_RUN, STUDY_METRICS, STUDY_FAILED = "study_run.json", "study_metrics.json", "study_failed.json"  # of a run of a study
STUDY, DIFFERENCES = "study.json", "diff.json"  # of a study
CLASS_COLUMNS = ("P", "R", "AP50", "AP75", "AP", "objects")
MOST_POINTS = 10_000  # of a PR curve
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
        flags, recipe: of its training.
        failure: why it failed; empty where it did not.
        compare: which weights were measured.
        outputs: of these weights; None where none were measured.
    """

    variant: str = ""
    control_of: tuple[str, ...] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""
    compare: str = ""
    outputs: Outputs | None = None

    def outputs_of(self, compare: str) -> Outputs | None:
        """What was measured of the weights that a study compares; of any where that is not known."""
        return self.outputs if not compare or compare == self.compare else None

    def settings(self, compare: str) -> dict[str, Any]:
        """What the caption of a table states."""
        return stated_settings(self.flags, self.recipe, compare or self.compare, self.control_of)


def stated_settings(flags: Mapping[str, Any], recipe: Mapping[str, Any], compare: str, control_of: Sequence[str]) -> dict[str, Any]:
    """What the caption of a table states of a study's training."""
    named = {key: flags[key] for key in ("data", "imgsz", "epochs", "batch_size") if key in flags}
    values = json.dumps(dict(recipe), sort_keys=True, default=str)  # each variant has a file of its own: the values count
    main = [str(flags.get("optimizer") or recipe.get("optimizer", "")), f"lr0 {recipe.get('lr0', '')}"]
    shown = [*(text for text in main if text.strip("lr0 ")), f"hyp.yaml {hashlib.sha256(values.encode()).hexdigest()[:8]}"]
    return {**named, "hyp": ", ".join(shown), "compare": compare, "recipe": dict(recipe), "control_of": list(control_of)}


def read_mark(folder: Path, notes: list[str]) -> StudyRun:
    """Whose run a run folder is, and what was to be trained; nothing of how it ended."""
    marks = _read_or_note(folder / STUDY_RUN, notes)
    variant, control_of, flags, recipe = (marks.get(key) for key in ("variant", "control_of", "flags", "hyp"))
    if not isinstance(variant, str) or not variant:
        return StudyRun()
    controlled = tuple(str(v) for v in control_of) if isinstance(control_of, list) else ()
    return StudyRun(variant, controlled, flags if isinstance(flags, dict) else {}, recipe if isinstance(recipe, dict) else {})


def read_study_run(folder: Path, notes: list[str]) -> StudyRun:
    """What a study wrote into a run folder; a file that is damaged is a note and costs no other."""
    run = read_mark(folder, notes)
    if not run.variant:
        return run
    if (path := folder / STUDY_FAILED).is_file():
        run = replace(run, failure=str(_read_or_note(path, notes).get("reason") or "no reason is known"))
    measured = _read_or_note(folder / STUDY_METRICS, notes, most=16 * MIB)
    return replace(run, compare=str(measured.get("compare", "")), outputs=_measured_outputs(measured)) if measured else run


def _measured_outputs(measured: Mapping[str, Any]) -> Outputs:
    per_class, curves = measured.get("per_class"), measured.get("pr_curves")
    return Outputs(
        metrics=_numbers(measured.get("metrics")),
        per_class={name: _numbers(row) for name, row in per_class.items()} if isinstance(per_class, dict) else {},
        per_size=_numbers(measured.get("per_size")),
        pr_curves={name: [float(v) for v in row] for name, row in curves.items() if _are_numbers(row)} if isinstance(curves, dict) else {},
        image_noise=_numbers(measured.get("image_noise")),
    )


def _read_or_note(path: Path, notes: list[str], *, most: int = MIB) -> dict[str, Any]:
    """The keys and values of a JSON file; none, and a note, where it is damaged."""
    try:
        return _read_json(path, most=most)
    except UserError as error:
        notes.append(f"{error}; it is left out")
        return {}


@dataclass(frozen=True)
class StudyOfRuns:
    """What a study folder says of the runs in it; empty where it says nothing.

    Attributes:
        compare: which weights it compares, ``last`` or ``best``.
        variants: in the order of the table.
        seeds: of each variant.
        costs: of each variant's network, as the study measured them.
        stopped: the variants that its rule stopped.
        notes: lines for the report.
    """

    baseline: str = ""
    metric: str = ""
    compare: str = ""
    variants: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    costs: Mapping[str, Cost] = field(default_factory=dict)
    stopped: Mapping[str, Stop] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_study_folder(folder: Path, notes: list[str]) -> StudyOfRuns:
    """What ``study.json`` of a study folder says; a note where it is damaged, or missing beside the other files of a study."""
    values = _read_or_note(folder / STUDY, notes, most=16 * MIB)
    baseline, metric, variants = (values.get(key) for key in ("baseline", "metric", "variants"))
    if not isinstance(baseline, str) or not isinstance(metric, str) or not isinstance(variants, dict):
        if values:
            notes.append(f"{folder / STUDY}: baseline, metric and variants are expected; it is left out")
        elif (folder / DIFFERENCES).is_file() and not (folder / STUDY).is_file():
            notes.append(f"{folder}: no {STUDY}, so that baseline and order are not known; the study's command writes it")
        return StudyOfRuns()
    seeds, stops, own = (values.get(key) for key in ("seeds", "stopped", "notes"))
    return StudyOfRuns(
        baseline, metric, str(values.get("compare") or ""), tuple(variants), tuple(seeds) if isinstance(seeds, list) else (),
        costs={name: _cost(value) for name, value in variants.items()},
        stopped={name: Stop(*stop) for name, stop in stops.items() if _is_stop(stop)} if isinstance(stops, dict) else {},
        notes=tuple(str(note) for note in own) if isinstance(own, list) else (),
    )  # fmt: skip


def _is_stop(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and type(value[0]) is int and value[0] > 0 and isinstance(value[1], str)


def study_content(study: StudyOfRuns) -> dict[str, Any]:
    """What ``study.json`` holds, as :func:`read_study_folder` reads it."""
    variants = {}
    for name in study.variants:
        cost = study.costs.get(name, Cost())
        latency = {str(batch): list(values) for batch, values in cost.latency_ms.items()}
        variants[name] = {**{key: getattr(cost, key) for key in (*_SIZES, "device")}, "latency_ms": latency}
    named = {"baseline": study.baseline, "metric": study.metric, "compare": study.compare, "seeds": list(study.seeds)}
    stopped = {name: [stop.epoch, stop.reason] for name, stop in study.stopped.items()}
    return {**named, "variants": variants, "stopped": stopped, "notes": list(study.notes)}


def _cost(value: Any) -> Cost:
    """The cost that ``study.json`` has of a variant; what is not a number is left out."""
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
