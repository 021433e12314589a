"""A study as files: results.csv, summary.csv, table.tex, table.md and figures, and what to print of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from engine.logging.observing import observing
from engine.study import figures
from engine.study.reading import ReadOptions, read_study
from engine.study.records import Status, Study
from engine.study.statistics import Analysis, analyse
from engine.study.tables import latex_table, markdown_page, paper_rows, setting_notes, verdict_lines, write_runs, write_summary
from utils.errors import UserError, one_line
from utils.files import atomic_write
from utils.text_table import text_table


@dataclass(frozen=True)
class Report:
    """What was written, and what was found.

    Attributes:
        files: of the folder, in the order in which they were written.
        text: the table, the verdicts and the notes, for the console.
    """

    folder: Path
    files: tuple[Path, ...]
    analysis: Analysis
    text: str


def write_report(study: Study, folder: Path) -> Report:
    """Writes the tables and figures of a study into a folder, which is made; a figure that fails is a line and stops nothing.

    Raises:
        UserError: the folder cannot be written.
    """
    study = replace(study, notes=(*study.notes, *setting_notes(study)))
    analysis = analyse(study)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = _write_tables(study, analysis, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return Report(folder, (*files, *_draw(study, analysis, folder)), analysis, console_text(study, analysis))


def report_folders(folders: Sequence[str | Path], out: str | Path, options: ReadOptions | None = None) -> Report:
    """The report of runs that exist already, by this project, YOLOv5, YOLOv9 or ultralytics.

    Args:
        folders: run folders, and folders that hold run folders.
        out: folder of the report.
        options: baseline and metric; those of the study whose runs they are, else the first variant and its task's main metric, if None.

    Raises:
        UserError: no run is found, an unknown baseline, or ``out`` cannot be written.
    """
    return write_report(read_study([Path(f) for f in folders], options), Path(out))


def console_text(study: Study, analysis: Analysis) -> str:
    """The table of the paper, the verdicts, the failures and the notes as text."""
    header, rows = paper_rows(study, analysis)
    lines = [text_table([header, *rows], right=range(1, len(header)))] if rows else ["no run"]
    verdicts = verdict_lines(analysis)
    width = max((len(name) for name, _ in verdicts), default=0)
    lines += ["", *(f"{name:{width}}  {sentence}" for name, sentence in verdicts)] if verdicts else []
    failures = [r for r in study.records if r.status is Status.FAILED]
    lines += [f"failed: {r.variant}, seed {r.seed}: {one_line(r.reason)}" for r in failures]
    lines += [f"note: {one_line(note)}" for note in analysis.notes]
    return "\n".join(lines)


def _write_tables(study: Study, analysis: Analysis, folder: Path) -> list[Path]:
    writers = {
        "results.csv": partial(write_runs, study),
        "summary.csv": partial(write_summary, study, analysis),
        "table.tex": partial(_write_text, latex_table(study, analysis)),
        "table.md": partial(_write_text, markdown_page(study, analysis)),
    }
    for name, write in writers.items():
        with atomic_write(folder / name) as partial_file:
            write(partial_file)
    return [folder / name for name in writers]


def _write_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _draw(study: Study, analysis: Analysis, folder: Path) -> list[Path]:
    drawings = {
        "learning curves": partial(figures.learning_curves, study, folder),
        "PR curves": partial(figures.pr_curves, study, folder),
        "accuracy against cost": partial(figures.trade_offs, study, analysis, folder),
        "differences": partial(figures.difference_plot, study, analysis.comparisons, folder / "differences"),
        "differences to controls": partial(figures.difference_plot, study, analysis.to_controls, folder / "control_differences"),
        "differences by class": partial(figures.class_differences, study, folder),
        "differences by size": partial(figures.size_differences, study, folder),
    }
    files: list[Path] = []
    for what, draw in drawings.items():
        with observing(f"drawing {what}"):
            files += draw()
    return files
