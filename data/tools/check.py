"""The command line that checks a data set: a table, a plot, an exit code, and on request a cleaned copy.

Example:
    python -m data.check mine.yaml
    python -m data.check mine.yaml --task obb
    python -m data.check mine.yaml --fix --out ../datasets/mine-clean

Exit code 0: clean; 1: problems found; 2: could not be checked.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.dataset_spec import load_dataset_spec
from data.labels.class_folders import has_class_folders
from data.labels.files import list_images
from data.labels.problems import KINDS, write_problems
from data.tools.cleaning import write_clean_copy
from data.tools.inspection import SIZES, SplitInspection, inspect_dataset, size_counts
from tasks import CLASSIFY, TASKS, get_task
from utils.cli.parser import OneLineParser
from utils.cli.script import run_command
from utils.errors import UserError, first_line
from utils.run_folders import new_run_dir
from utils.visual.figures import PAGE, Style, add_legend, drawing, figure_formats
from utils.visual.names import FIGURE_FORMATS, shown_name

SHOWN = 20
MOST_NAMED = 40  # classes whose names can be read in the figure


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)

    def body() -> int:
        try:
            return check(arguments)
        except OSError as error:
            raise UserError(f"{error.filename or 'the report'}: {error.strerror or error}") from error

    return run_command("data.check", body, failed=2)


def check(arguments: argparse.Namespace) -> int:
    """Inspects a data set, reports, and writes a cleaned copy if asked; 1 if anything is wrong.

    Raises:
        UserError: the data set cannot be inspected, or the copy not be written.
        OSError: the report cannot be written.
    """
    if arguments.fix and not arguments.out:
        raise UserError("--fix: give the folder of the cleaned copy with --out")
    if arguments.out and not arguments.fix:
        raise UserError("--out: is where --fix writes the cleaned copy; give both")
    spec = load_dataset_spec(arguments.data)
    if arguments.fix and spec.kpt_shape:
        raise UserError(f"--fix: would write boxes only, but {spec.yaml_path} has kpt_shape; its keypoints would be lost")
    if arguments.fix and (arguments.task == CLASSIFY.name or has_class_folders(spec, list_images(spec.train or spec.val))):
        raise UserError(f"--fix: writes label files, but {spec.yaml_path} has a folder for each class; remove what is listed by hand")
    task = get_task(arguments.task) if arguments.task else None
    found = inspect_dataset(spec, task=task, workers=arguments.workers, progress=sys.stderr.isatty())
    print(report(found, spec.names))
    print(*(line for split in found for line in split.remarks), sep="\n", end="\n" if any(split.remarks for split in found) else "")
    problems = [p for split in found for p in split.problems]
    folder = new_run_dir(arguments.project, arguments.name, exist_ok=arguments.exist_ok)
    write_problems(folder / "problems.txt", problems)
    with figure_formats(arguments.plots):
        plot(found, spec.names, folder / "check.png")
    print(*(f"  {p}" for p in problems[:SHOWN]), sep="\n", end="\n" if problems else "")
    if len(problems) > SHOWN:
        print(f"  … and {len(problems) - SHOWN} more in {folder / 'problems.txt'}")
    print(f"{len(problems) or 'no'} problem{'s' * (len(problems) != 1)}; check.png and problems.txt in {folder}")
    if arguments.fix:
        for line in write_clean_copy(spec, found, Path(arguments.out), exist_ok=arguments.exist_ok):
            print(f"fixed: {line} in {arguments.out}")
    return 1 if problems else 0


def report(found: Sequence[SplitInspection], names: Sequence[str]) -> str:
    """A table of images, boxes, kinds of problems and objects of each class, with a column for each split."""
    rows: list[tuple[str, Sequence[object]]] = [("", [s.split for s in found])]
    objects = [s.table.counts for s in found]
    sizes = [size_counts(s.box_areas()) for s in found]
    rows += [
        ("images", [len(s.files) for s in found]),
        ("usable", [int(s.usable.sum()) for s in found]),
        ("without objects", [int((s.usable & (n == 0)).sum()) for s, n in zip(found, objects)]),
        ("  of these without labels", [int((s.usable & ~s.table.has_label_file).sum()) for s in found]),
        ("objects", [len(s.table.classes) for s in found]),
        *((f"  {size} (COCO's area)", [c[size] for c in sizes]) for size in SIZES),
    ]
    kinds = [Counter(p.kind for p in s.problems) for s in found]
    wrong = [(kind, [k[kind] for k in kinds]) for kind in KINDS if any(k[kind] for k in kinds)]
    rows += [("", []), ("problems", [sum(k.values()) for k in kinds]), *((f"  {kind}", list(counts)) for kind, counts in wrong)]
    histogram = [np.bincount(s.table.classes, minlength=len(names)) for s in found]
    rows += [("", []), ("objects of each class", [])]
    rows += [(f"  {i} {name}", [int(h[i]) for h in histogram]) for i, name in enumerate(names)]
    width = max(len(title) for title, _ in rows) + 2
    return "\n".join((title.ljust(width) + "".join(f"{v!s:>10}" for v in values)).rstrip() for title, values in rows)


def plot(found: Sequence[SplitInspection], names: Sequence[str], path: Path) -> None:
    """Draws objects of each class, box widths and heights, and boxes by COCO's classes of area; a failure is one line."""
    try:
        _plot(found, names, path)
    except Exception as error:
        print(f"warning: {path.name} could not be drawn ({type(error).__name__}: {first_line(error)})", file=sys.stderr)


def _plot(found: Sequence[SplitInspection], names: Sequence[str], path: Path) -> None:
    few = len(names) <= MOST_NAMED
    with drawing(path, PAGE, 2.9, texts=names if few else ()) as figure:
        classes, sizes, areas = figure.subplots(1, 3)
        share, handles = 0.8 / max(len(found), 1), []
        for k, split in enumerate(found):
            style, places = Style.of(k + 1), np.arange(len(names)) + (k - (len(found) - 1) / 2) * share
            number = np.bincount(split.table.classes, minlength=len(names))
            handles.append(classes.bar(places, number, share, color=style.colour))
            wh = split.table.box_sizes_px()
            sizes.scatter(*wh[:: max(len(wh) // 20_000, 1)].T, s=2, alpha=0.4, color=style.colour, linewidths=0, rasterized=True)
            counts = list(size_counts(split.box_areas()).values())
            areas.bar(np.arange(3) + (k - (len(found) - 1) / 2) * share, counts, share, color=style.colour)
        classes.set(title="objects of each class", yscale="symlog")
        shown = [shown_name(name, most=20) for name in names] if few else []
        classes.set_xticks(np.arange(len(names)) if few else [], shown, rotation=90, fontsize=max(4, min(7, 100 // max(len(names), 1))))
        if not few:
            classes.set_xlabel(f"{len(names)} classes")
        sizes.set(title="boxes", xlabel="width, px", ylabel="height, px")
        if any(len(split.table.classes) for split in found):
            _log_axes(sizes)  # which needs a value
        areas.set(title="boxes by COCO's area")
        areas.set_xticks(np.arange(3), ["small\n< 32²", "medium", "large\n> 96²"])
        add_legend(figure, handles, [split.split for split in found], columns=len(found) or 1)


def _log_axes(axes: Any) -> None:
    """Logarithmic axes with as few numbers as can be read beside one another."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        decades = math.log10(max(high, 1e-9) / max(low, 1e-9))
        axis.set_major_locator(LogLocator(base=10, subs=(1, 3) if decades > 1 else (1, 2, 5), numticks=6))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _parser() -> argparse.ArgumentParser:
    codes = "Exit code 0: clean, 1: problems found, 2: could not be checked."
    parser = OneLineParser(prog="python -m data.check", description=f"Checks a data set. {codes}")
    parser.add_argument("data", metavar="DATA.yaml", help="dataset file, or its name under data/")
    told = "that of the dataset file: pose with kpt_shape, classify for class folders, else detect"
    parser.add_argument("--task", choices=sorted(TASKS), help=f"by whose rules label rows are judged (default: {told})")
    parser.add_argument("--fix", action="store_true", help="write a cleaned copy to --out; the original is only read")
    parser.add_argument("--out", help="folder of the cleaned copy")
    parser.add_argument("--workers", type=int, default=8, help="parallel readers")
    parser.add_argument("--project", default="runs/check", help="folder of reports")
    parser.add_argument("--name", default="exp", help="folder of this report")
    parser.add_argument("--exist-ok", action="store_true", help="write into folders and over files that exist")
    parser.add_argument("--plots", nargs="+", choices=FIGURE_FORMATS, default=(), help="the figure in this format too")
    return parser
