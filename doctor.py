"""Checks model YAMLs: each is built, trained for a step, validated at a rectangular size, fused, deployed and exported to ONNX.

Example:
    python doctor.py                              # every YAML under models/configs, the smallest scale of each
    python doctor.py --all-scales --resume        # every scale; resumes after a stop
    python doctor.py --only 'yolov8-*' 'gelan*'
    python doctor.py my_yolov8.yaml --plugins my_blocks.py
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli.parser import OneLineParser
from utils.cli.script import run_command
from utils.errors import UserError
from utils.text_table import counted

if TYPE_CHECKING:
    from engine.doctor.checkup import Case, Report


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status is 0 where every YAML passes."""
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM ends the child processes too
    return run_command("doctor.py", lambda: int(not all(report.passed for report in doctor(args))), reason="resume with --resume")


def build_parser() -> argparse.ArgumentParser:
    """The command line's flags."""
    flags = OneLineParser(prog="doctor.py", description="puts model YAMLs through training, validation, deployment and export")
    flags.add_argument("cfg", nargs="*", help="model YAMLs, paths or bare names; all under models/configs if none is given")
    flags.add_argument("--only", nargs="+", metavar="PATTERN", default=[], help="only YAMLs of these names, such as 'yolov8-*'")
    flags.add_argument("--all-scales", action="store_true", help="every scale of a YAML with scales, not only its smallest")
    flags.add_argument("--imgsz", type=int, default=64, help="side of the images, px; rounded up to the stride of each network")
    flags.add_argument("--jobs", type=int, default=0, help="processes, one thread each; the number of cores if not given")
    flags.add_argument("--memory", type=float, default=0.0, help="GiB for all processes together; four fifths of what is free if not given")
    flags.add_argument("--resume", action="store_true", help="leave out what passed before, by the table in --out, if nothing has changed")
    flags.add_argument("--out", type=Path, default=Path("runs/doctor"), help="folder of the tables, doctor.csv and doctor.md")
    flags.add_argument("--plugins", nargs="*", default=[], help="Python files with blocks of your own")
    return flags


def doctor(args: argparse.Namespace) -> list[Report]:
    """Checks the YAMLs that the flags name, and writes the tables.

    Raises:
        UserError: an unknown YAML, a pattern that nothing fits, or a plug-in that does not load.
    """
    from engine.doctor.pool import Limits, Settings, check_all
    from engine.doctor.table import Table
    from models.spec.registry import load_plugin

    for path in args.plugins:
        load_plugin(path)
    cases = find_cases(args.cfg, only=args.only, all_scales=args.all_scales)
    table = Table(args.out, side=args.imgsz, plugins=args.plugins)
    done = table.read_passed(cases) if args.resume else []
    waiting = [case for case in cases if case not in {report.case for report in done}]
    limits = Limits.of(jobs=args.jobs, memory_gib=args.memory)
    print(f"{counted(len(cases), 'network')}, {len(done)} passed before; {limits}")
    table.start(done)
    started, reports = time.perf_counter(), list(done)
    for report in check_all(waiting, Settings(args.imgsz, tuple(args.plugins)), limits):
        reports.append(report)
        table.add(report)
        print(f"{len(reports):>4}/{len(cases)} {table.line(report)}", flush=True)
    table.finish(reports)
    print_summary(reports, time.perf_counter() - started, args.out)
    return reports


def find_cases(given: Sequence[str], *, only: Sequence[str], all_scales: bool) -> list[Case]:
    """The YAMLs at the scales to be checked, sorted by name.

    Raises:
        UserError: an unknown YAML, or a pattern that nothing fits.
    """
    from engine.doctor.checkup import Case, read_at_scale
    from models.spec.config_files import CONFIGS, find_config

    found = [find_config(name) for name in given] or [(path, "") for path in sorted(CONFIGS.rglob("*.yaml"))]
    for pattern in only:
        if not any(_matches(path, pattern) for path, _ in found):
            raise UserError(f"--only {pattern}: fits none of the {len(found)} YAMLs")
    cases = []
    for path, letter in found:
        if only and not any(_matches(path, pattern) for pattern in only):
            continue
        scales = read_at_scale(Case(path)).get("scales") or {}
        by_size = sorted(scales, key=lambda s: (scales[s][1], scales[s][0]))  # width first, then depth
        cases += [Case(_relative(path), scale) for scale in ([letter] if letter else by_size if all_scales else by_size[:1]) or [""]]
    return cases


def print_summary(reports: Sequence[Report], seconds: float, folder: Path) -> None:
    """Prints a line for every failure, and the totals."""
    from engine.doctor.checkup import failure_lines

    failed = failure_lines(reports)
    print("\n".join(f"FAILED {line}" for line in failed))
    processor = sum(report.seconds for report in reports) / 60
    print(f"{len(reports) - len(failed)} of {len(reports)} pass; {seconds / 60:.1f} min, processor {processor:.1f} min; table in {folder}")


def _matches(path: Path, pattern: str) -> bool:
    return any(fnmatch(text, pattern) for text in (path.stem, path.name, path.as_posix()))


def _relative(path: Path) -> Path:
    """The path relative to the current folder if it is below it."""
    absolute, here = path.absolute(), Path.cwd()
    return absolute.relative_to(here) if absolute.is_relative_to(here) else absolute


if __name__ == "__main__":
    sys.exit(main())
