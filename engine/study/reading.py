"""Runs that exist already as a study: run folders of this project, of YOLOv5, YOLOv9 and ultralytics, read within bounds.

A run folder is one with a results.csv. Its columns are recognised whichever program wrote them; the seed, the config and what the caption
states come from opt.yaml or args.yaml. What was not recognised is a note of one line, never a guess.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from engine.study.records import Cost, RunRecord, Status, Study
from engine.study.run_outputs import (
    STUDY_RUN,
    Outputs,
    StudyOfRuns,
    StudyRun,
    read_mark,
    read_outputs,
    read_study_folder,
    read_study_run,
)
from tasks import DETECT, TASKS
from utils.errors import UserError, nearest, one_line
from utils.reading.text_files import decode, read_bytes
from utils.reading.yaml_text import read_yaml
from utils.text_table import counted

RESULTS = "results.csv"
STUDY_TABLE = b"variant,seed,status,"  # how the results.csv of a study begins
SETTINGS_FILES = ("opt.yaml", "args.yaml")  # of this project, YOLOv5 and YOLOv9; of ultralytics
MOST_RUNS = 1000
MOST_FOLDERS = 20_000  # that are looked into
DEEPEST = 4  # folders below one that is given
MOST_BYTES = 16 * 2**20  # of a results.csv
MOST_EPOCHS = 100_000
MOST_COLUMNS = 200
OWN_MARKS = ("M", "P")  # of the columns of masks and of keypoints, beside "B" of boxes
ACCURACY = ("metrics/accuracy_top1", "metrics/accuracy_top5")  # of classifiers, whose fitness is the mean
BEST_BY = ("metrics/mAP_0.5", "metrics/mAP_0.5:0.95")  # what every YOLO chooses best.pt by, 0.1 and 0.9
# names of ultralytics -> names of this project, YOLOv5 and YOLOv9; (B) boxes, (M) masks, (P) poses
ULTRALYTICS = {"precision": "precision", "recall": "recall", "mAP50": "mAP_0.5", "mAP50-95": "mAP_0.5:0.95"}
_FOREIGN_METRIC = re.compile(r"metrics/(precision|recall|mAP50|mAP50-95|mAP_0\.5|mAP_0\.5:0\.95)(\([BMP]\))?")
_KNOWN = re.compile(r"epoch|time|(train|val)/\S+|x/lr\d+|lr/pg\d+|metrics/\S+")
# what the caption states -> flags of any YOLO
_SETTINGS = {"data": ["data"], "imgsz": ["imgsz", "img_size"], "epochs": ["epochs"], "batch_size": ["batch_size", "batch"], "hyp": ["hyp"]}


@dataclass(frozen=True)
class ReadOptions:
    """What the runs are compared by.

    Attributes:
        baseline: a variant; that of the study whose runs they are, else the first one, if empty.
        metric: of results.csv; ``mAP50`` and ``mAP50-95`` are understood. Empty: that of the study, else of the first run's task.
    """

    baseline: str = ""
    metric: str = ""


@dataclass
class _Found:
    """Records and notes in the making, the metrics of the runs, and the studies whose runs they are, by folder."""

    records: list[RunRecord] = field(default_factory=list)
    metrics: dict[str, None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    studies: dict[Path, StudyOfRuns] = field(default_factory=dict)


def read_study(paths: Sequence[Path], options: ReadOptions | None = None) -> Study:
    """The runs of these folders as a study, variant by variant.

    Args:
        paths: run folders, their results.csv, or folders that hold run folders; ``NAME=FOLDER`` gives its runs the variant's name.
        options: baseline and metric.

    Raises:
        UserError: a folder that does not exist, no run at all, or an unknown baseline or metric.
    """
    options = options or ReadOptions()
    metric = metric_name(options.metric) if options.metric else ""
    found = _Found()
    for path in paths:
        name, folder = named_folder(path)
        for run in run_folders(folder, found.notes):
            if len(found.records) == MOST_RUNS:
                raise UserError(f"{folder}: more than {MOST_RUNS} runs; give fewer folders")
            if run != folder and not is_listed(run, _study_of(found, run)):
                found.notes.append(f"{run}: its study lists its variant or seed no more; it is left out")
                continue
            metric = metric or _study_of(found, run).metric
            _read_into(found, run, name=name, metric=metric)
            metric = metric or next((main_metric(record.metrics) for record in found.records if record.metrics), "")
    if options.metric and found.metrics and metric not in found.metrics:
        known = [name.removeprefix("metrics/") for name in found.metrics]
        hint = nearest(metric.removeprefix("metrics/"), known) or f"known are {', '.join(known)}"
        raise UserError(f"--metric {options.metric}: no run has it; {hint}")
    if not found.records:
        reasons = f": {found.notes[0]}" if found.notes else f"; a run folder has a {RESULTS}"
        raise UserError(f"{', '.join(map(str, paths)) or 'no folder given'}: no run to report{reasons}")
    studies = [study for study in found.studies.values() if study.baseline]
    ordered = by_variant(found.records, first=[name for study in studies for name in study.variants])
    records = numbered_seeds(ordered, found.notes)
    names = tuple(dict.fromkeys(r.variant for r in records))
    baseline = options.baseline or next((study.baseline for study in studies if study.baseline in names), names[0])
    if baseline not in names:
        hint = nearest(baseline, names) or f"the variants are {', '.join(names[:9])}"
        raise UserError(f"--baseline {baseline}: no run of this variant; {hint}")
    notes = (*found.notes, *_program_note(records), *(note for study in studies for note in study.notes))
    return Study(tuple(records), baseline, metric or main_metric(()), tuple(dict.fromkeys(notes)))


def read_run(
    folder: Path, *, variant: str = "", seed: int | None = None, study: StudyOfRuns | None = None, notes: list[str] | None = None
) -> RunRecord:
    """One run folder as a record.

    Args:
        folder: holds a results.csv.
        variant: its name; that in the study, or that of its config, if empty.
        seed: that of opt.yaml or args.yaml if None; -1 where neither says one.
        study: whose run it is; the costs that it measured are taken.
        notes: gets a line for each thing that is not recognised.

    Raises:
        UserError: results.csv is missing, too large, no CSV, or without rows.
    """
    notes = notes if notes is not None else []
    study, outputs, study_run = study or StudyOfRuns(), read_outputs(folder, notes), read_study_run(folder, notes)
    settings = study_run.flags or read_settings(folder, notes)
    try:
        curves = read_curves(folder / RESULTS, notes)
    except UserError:
        if not study_run.variant:
            raise
        curves = {}  # it ended in its first epoch; its study says how
    if study_run.variant:
        kept = {key: getattr(outputs, key) for key in ("parameters", "program", "peak_memory_mib", "seconds")}
        outputs = replace(study_run.outputs_of(study.compare) or Outputs(), **kept)
        status, reason, counts = _ending_in_study(curves, study_run, study)
        stated = study_run.settings(study.compare)
    else:
        status, reason, counts = _ending(curves, settings, is_complete=bool(outputs.metrics))
        stated = _shown_settings(settings)
    at_epoch = {} if counts is None else _metrics_at(curves, counts)
    cost = study.costs.get(study_run.variant, Cost(outputs.parameters))
    known_seed = settings.get("seed")
    return RunRecord(
        variant=variant or study_run.variant or variant_name(folder, settings),
        seed=seed if seed is not None else known_seed if type(known_seed) is int else -1,
        status=status,
        metrics={**at_epoch, **outputs.metrics},
        curves=curves,
        per_class=outputs.per_class,
        per_size=outputs.per_size,
        pr_curves=outputs.pr_curves,
        image_noise=outputs.image_noise,
        cost=replace(cost, peak_memory_mib=outputs.peak_memory_mib, training_seconds=_seconds(curves) or outputs.seconds),
        folder=folder,
        reason=reason,
        settings={**stated, "program": outputs.program or _program(folder, curves)},
    )


def _metrics_at(curves: Mapping[str, Sequence[float]], epoch: int) -> dict[str, float]:
    """The metrics of an epoch, counted from 0."""
    return {name: values[epoch] for name, values in curves.items() if name.startswith("metrics/") and math.isfinite(values[epoch])}


def _seconds(curves: Mapping[str, Sequence[float]]) -> float | None:
    """Of the training, where a column counts them, as that of ultralytics does."""
    known = [value for value in curves.get("time", ()) if math.isfinite(value)]
    return known[-1] if known else None


def read_curves(path: Path, notes: list[str]) -> dict[str, list[float]]:
    """The columns of a results.csv by this project's names, an epoch a value, epochs from 1; NaN for an empty cell.

    Raises:
        UserError: missing, too large, no CSV, or without rows.
    """
    text = decode(read_bytes(path, most=MOST_BYTES, kind="CSV file"))
    try:
        rows = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise UserError(f"{path}: not a CSV file ({error})") from None
    header = [cell.strip() for cell in rows[0]] if rows else []
    body = [row for row in rows[1:] if any(cell.strip() for cell in row)]
    if not header or not body:
        raise UserError(f"{path}: no epoch in it; a header and a row for each epoch are expected")
    if len(header) > MOST_COLUMNS or len(body) > MOST_EPOCHS:
        raise UserError(f"{path}: {len(header)} columns and {len(body)} rows, at most {MOST_COLUMNS} and {MOST_EPOCHS} are read")
    unknown = [name for name in header if not _KNOWN.fullmatch(name)]
    if unknown:
        notes.append(f"{path}: columns not recognised, left out: {one_line(', '.join(unknown), most=200)}")
    curves: dict[str, list[float]] = {}
    for i, name in enumerate(header):
        if name not in unknown:
            for ours in own_names(name):
                curves.setdefault(ours, [_number(row[i]) if i < len(row) else math.nan for row in body])
    if curves.get("epoch", [1.0])[0] == 0:  # YOLOv5 and YOLOv9
        curves["epoch"] = [epoch + 1 for epoch in curves["epoch"]]
    return curves


def own_names(column: str) -> tuple[str, ...]:
    """What a column of any YOLO is called here; a metric of boxes also by its plain name."""
    match = _FOREIGN_METRIC.fullmatch(column)
    if match is None:
        return (column,)
    name = f"metrics/{ULTRALYTICS.get(match[1], match[1])}"
    return (name, f"{name}(B)") if match[2] == "(B)" else (name + (match[2] or ""),)


def metric_name(text: str) -> str:
    """The column that a user means by ``mAP50-95``, ``metrics/mAP_0.5`` and the like."""
    word = text.strip().removeprefix("metrics/").replace("mAP@", "mAP_")
    return own_names(f"metrics/{word}")[0]


def main_metric(columns: Collection[str]) -> str:
    """The column of a run's by which its task compares: its own, such as that of masks, before that of boxes."""
    usual = DETECT.defaults.metric
    return next((own for task in TASKS.values() if (own := task.defaults.metric) != usual and own in columns), usual)


def best_row(curves: Mapping[str, Sequence[float]]) -> int:
    """The epoch, counted from 0, that best.pt is of: of highest fitness, the first of equals; the last one where no fitness is known."""
    values = _fitness_values(curves)
    if not values:
        return len(next(iter(curves.values()))) - 1 if curves else 0
    return max(range(len(values)), key=values.__getitem__)


def _fitness_values(curves: Mapping[str, Sequence[float]]) -> list[float]:
    """Fitness by epoch: of boxes, the mean of that of boxes and of the task's own, or the mean accuracy; empty where nothing says it."""
    own = next((f"({mark})" for mark in OWN_MARKS if f"{BEST_BY[1]}({mark})" in curves), None)
    parts = ("(B)", own) if own else ("",)
    pairs = [(curves.get(BEST_BY[0] + part, ()), curves.get(BEST_BY[1] + part, ())) for part in parts]
    if all(a and b for a, b in pairs):
        by_part = [[fitness_of(a, b) for a, b in zip(*pair)] for pair in pairs]
        return [sum(values) / len(values) for values in zip(*by_part)]
    accuracy = [curves[name] for name in ACCURACY if name in curves]
    return [sum(values) / len(values) for values in zip(*accuracy)]


def fitness_of(map50: float, map50_95: float) -> float:
    """0.1 mAP@0.5 + 0.9 mAP@0.5:0.95; the lowest of all where one is NaN."""
    value = 0.1 * map50 + 0.9 * map50_95
    return value if math.isfinite(value) else -math.inf


def run_folders(path: Path, notes: list[str]) -> list[Path]:
    """Run folders in a folder, in natural order of their names (exp, exp2, exp10); the folder itself where it is one.

    Raises:
        UserError: there is no such folder.
    """
    if path.name == RESULTS and is_run_folder(path.parent):
        return [path.parent]
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; a run folder, a folder of runs, or NAME=FOLDER is expected")
    found = []
    for looked, (folder, depth) in enumerate(_folders(path)):
        if looked == MOST_FOLDERS:
            notes.append(f"{path}: more than {MOST_FOLDERS} folders; those after them are not looked into")
            break
        if is_run_folder(folder):
            found.append(folder)
            if depth == 0:
                break
    return sorted(found, key=_natural)


def is_run_folder(folder: Path) -> bool:
    """Whether a training's results.csv, or a study's mark of a run, lies in a folder; a study's own results.csv has a row a run."""
    path = folder / RESULTS
    if not path.is_file():
        return (folder / STUDY_RUN).is_file()
    try:
        with path.open("rb") as file:
            return not file.read(len(STUDY_TABLE)).startswith(STUDY_TABLE)
    except OSError:  # it is named when it is read
        return True


def named_folder(path: Path) -> tuple[str, Path]:
    """Name and folder of ``NAME=FOLDER``; no name where the text is a folder as it is."""
    name, separator, folder = str(path).partition("=")
    return (name, Path(folder).expanduser()) if separator and name and not path.exists() else ("", path.expanduser())


def read_settings(folder: Path, notes: list[str]) -> dict[str, Any]:
    """The flags of a run, from opt.yaml or args.yaml; none where neither is there or can be read, which is a note."""
    path = next((folder / name for name in SETTINGS_FILES if (folder / name).is_file()), None)
    if path is None:
        notes.append(f"{folder}: neither {' nor '.join(SETTINGS_FILES)}; seed and settings are not known")
        return {}
    try:
        return read_yaml(path)
    except UserError as error:
        notes.append(f"{error}; seed and settings are not known")
        return {}


def variant_name(folder: Path, settings: Mapping[str, Any]) -> str:
    """The config, with the modules that were inserted: ``yolov8n + SE@9``; the folder's name where no config is known."""
    source = next((v for key in ("cfg", "model", "weights") if isinstance(v := settings.get(key), str) and v.strip()), "")
    stem = re.split(r"[/\\]", source)[-1]
    name = re.sub(r"\.(ya?ml|pt)$", "", stem) or folder.name
    inserted = settings.get("attention")
    return " + ".join([name, *map(str, inserted)]) if isinstance(inserted, list) else name


def by_variant(records: Sequence[RunRecord], *, first: Sequence[str] = ()) -> list[RunRecord]:
    """The records of each variant together: variants of ``first`` in its order, then the others in the order of their first run."""
    return [r for name in dict.fromkeys([*first, *(r.variant for r in records)]) for r in records if r.variant == name]


def numbered_seeds(records: Sequence[RunRecord], notes: list[str]) -> list[RunRecord]:
    """The records with seeds by which variants can be paired; each change is a note.

    A broken run whose seed finished in another run of its variant is left out. Where seeds tell nothing, as none is known or every run of
    a variant has the same, the runs of each variant are numbered. Else runs without a seed get one that no other variant has, and of runs
    with the same seed the last one counts.
    """
    ended = {(r.variant, r.seed) for r in records if r.status is Status.FINISHED and r.seed >= 0}
    kept = [r for r in records if r.status is Status.FINISHED or (r.variant, r.seed) not in ended]
    notes += [f"{r.variant}, seed {r.seed}: {r.folder} {r.reason}; another run of this seed finished" for r in records if r not in kept]
    groups = {name: [r for r in kept if r.variant == name] for name in dict.fromkeys(r.variant for r in kept)}
    repeated = [runs for runs in groups.values() if len(runs) > 1]
    if repeated and all(len({r.seed for r in runs}) == 1 for runs in repeated):
        notes.append(
            "all seeds are the same or missing, so the runs of each variant are numbered in the order of their folders and paired by that"
        )
        return [replace(r, seed=i) for runs in groups.values() for i, r in enumerate(runs)]
    unknown = [r for r in kept if r.seed < 0]
    if unknown and len(unknown) < len(kept):
        notes.append(f"{len(unknown)} runs have no seed and are paired with none: {', '.join(str(r.folder) for r in unknown[:3])}")
        return [replace(r, seed=-1 - unknown.index(r)) if r.seed < 0 else r for r in kept]
    return kept


def _read_into(found: _Found, folder: Path, *, name: str, metric: str) -> None:
    study = _study_of(found, folder)
    try:
        record = read_run(folder, variant=name, study=study, notes=found.notes)
    except UserError as error:
        found.notes.append(f"{error}; the run is left out")
        return
    found.metrics.update(dict.fromkeys(record.metrics))
    if record.status is Status.PENDING:
        found.notes.append(f"{folder}: {record.reason}; the study's command resumes it")
    missing = (metric or main_metric(record.metrics)) not in record.metrics
    if missing and record.status is Status.FINISHED and not study.baseline:  # of a study's run the summary says so
        known = ", ".join(record.metrics) or "none"
        found.notes.append(f"{folder / RESULTS}: no value of {metric} (metrics there: {one_line(known, most=200)}); the run is left out")
        return
    found.records.append(record)


def is_listed(folder: Path, study: StudyOfRuns) -> bool:
    """Whether a study still has a run; any run where it does not say."""
    run = read_mark(folder, []) if study.baseline else StudyRun()
    return not run.variant or (run.variant in study.variants and (not study.seeds or run.flags.get("seed") in study.seeds))


def _study_of(found: _Found, folder: Path) -> StudyOfRuns:
    """The study whose run a folder is: runs lie in ``runs`` of the study folder."""
    if not (folder / STUDY_RUN).is_file():
        return StudyOfRuns()
    path = folder.resolve().parent.parent
    if path not in found.studies:
        found.studies[path] = read_study_folder(path, found.notes)
    return found.studies[path]


def _ending(curves: Mapping[str, Sequence[float]], settings: Mapping[str, Any], *, is_complete: bool) -> tuple[Status, str, int]:
    """How a run ended: complete by what it left, by its number of epochs, or by its patience; and the epoch, from 0, that counts."""
    done, best = len(next(iter(curves.values()))), best_row(curves)
    wanted, patience = settings.get("epochs"), settings.get("patience")
    if is_complete or type(wanted) is not int or done >= wanted:
        return Status.FINISHED, "", best
    if type(patience) is int and 0 < patience <= done - 1 - best:
        return Status.FINISHED, "", best
    return Status.FAILED, f"ends after {done} of {wanted} epochs", best


def _ending_in_study(curves: Mapping[str, Sequence[float]], run: StudyRun, study: StudyOfRuns) -> tuple[Status, str, int | None]:
    """How a run of a study ended, and the epoch, from 0, whose metrics count; None where what the study measured counts, or nothing."""
    if run.outputs_of(study.compare) is not None:
        return Status.FINISHED, "", None
    if run.failure:
        return Status.FAILED, run.failure, None
    done, stop = len(next(iter(curves.values()), ())), study.stopped.get(run.variant)
    if stop is not None and stop.epoch <= done:
        return Status.STOPPED, stop.reason, stop.epoch - 1
    return Status.PENDING, f"not measured by its study, after {counted(done, 'epoch')}", None


def _shown_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the caption states; file names without their folders."""
    shown = {}
    for key, names in _SETTINGS.items():
        value = next((settings[name] for name in names if settings.get(name) not in (None, "")), None)
        if isinstance(value, str):
            value = re.split(r"[/\\]", value)[-1]
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            shown[key] = value
    return shown


def _program(folder: Path, curves: Mapping[str, Sequence[float]]) -> str:
    """Which program left a run folder that has no metrics.json."""
    return "ultralytics" if (folder / "args.yaml").is_file() or any(name.startswith("lr/pg") for name in curves) else "YOLOv5 or YOLOv9"


def _program_note(records: Sequence[RunRecord]) -> tuple[str, ...]:
    """Programs count AP by different rules, so that their numbers are not comparable."""
    programs = dict.fromkeys(str(r.settings.get("program")) for r in records if r.status is Status.FINISHED)
    if len(programs) < 2:
        return ()
    return (f"runs of different programs or rules ({', '.join(programs)}): AP differs by its rule alone; compare by one evaluator",)


def _folders(path: Path) -> Iterator[tuple[Path, int]]:
    """A folder and those below it, links left out."""
    stack = [(path, 0)]
    while stack:
        folder, depth = stack.pop()
        yield folder, depth
        if depth < DEEPEST and not (depth and is_run_folder(folder)):
            try:
                stack += [(p, depth + 1) for p in sorted(folder.iterdir(), reverse=True) if p.is_dir() and not p.is_symlink()]
            except OSError:  # not readable: nothing of it is shown
                continue


def _natural(path: Path) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d{1,18})", str(path))]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
