"""The table of check-ups, as CSV and Markdown; the CSV grows line by line, so that a stopped run can go on from it."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path

from engine.doctor.checkup import CHECKS, Case, Report
from utils.errors import UserError

ROOT = Path(__file__).parents[2]
SOURCES = ("models", "utils", "engine", "data")  # folders whose code a result hangs on, beside the scripts
COLUMNS = ("cfg", "scale", "result", *CHECKS, "parameters", "height", "width", "seconds", "peak_mib", "reason", "sources")


class Table:
    """``doctor.csv`` and ``doctor.md`` in a folder.

    Args:
        folder: made if missing.
        side: of the images, px; results at another size are no results of this run.
        plugins: files whose code the results hang on, too.
    """

    def __init__(self, folder: Path, *, side: int, plugins: Sequence[str] = ()) -> None:
        self.csv, self.markdown = folder / "doctor.csv", folder / "doctor.md"
        self.sources = fingerprint(side, plugins)

    def passed_before(self, cases: Sequence[Case]) -> list[Report]:
        """Reports of the cases that an earlier run passed with the same sources and the same YAML."""
        if not self.csv.is_file():
            return []
        with self.csv.open(newline="", encoding="utf-8") as file:
            rows = {(row["cfg"], row["scale"]): row for row in csv.DictReader(file)}
        found = [(case, rows.get((case.cfg.as_posix(), case.scale))) for case in cases]
        return [_report(case, row) for case, row in found if row and row["result"] == "pass" and row["sources"] == self._of(case)]

    def start(self, done: Sequence[Report]) -> None:
        """Begins the CSV anew, with what is done already. Raises UserError where it cannot be written."""
        try:
            self.csv.parent.mkdir(parents=True, exist_ok=True)
            with self.csv.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(COLUMNS)
        except OSError as error:
            raise UserError(f"--out {self.csv.parent}: cannot be written ({error.strerror})") from error
        for report in done:
            self.add(report)

    def add(self, report: Report) -> None:
        """Appends a line to the CSV."""
        case = report.case
        verdicts = [_verdict(report, check) for check in CHECKS]
        figures = (report.parameters, *report.size, f"{report.seconds:.1f}", f"{report.peak_mib:.0f}")
        result = "pass" if report.passed else "fail"
        with self.csv.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(
                (case.cfg.as_posix(), case.scale, result, *verdicts, *figures, report.complaint, self._of(case))
            )  # fmt: skip

    def finish(self, reports: Sequence[Report]) -> None:
        """Writes the Markdown table, in the order of names."""
        failed = sum(not report.passed for report in reports)
        seconds = sum(report.seconds for report in reports)
        head = ("YAML", "scale", "parameters", "validated at", *CHECKS, "processor s", "peak MiB")
        lines = [f"{len(reports) - failed} of {len(reports)} pass; {seconds / 60:.1f} processor minutes.", ""]
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for report in sorted(reports, key=lambda r: r.case.name):
            size = "x".join(map(str, report.size))
            verdicts = [_verdict(report, check) for check in CHECKS]
            cells = (report.case.cfg.as_posix(), report.case.scale, f"{report.parameters:,}", size, *verdicts)
            lines.append("| " + " | ".join((*cells, f"{report.seconds:.1f}", f"{report.peak_mib:.0f}")) + " |")
        if failed:
            lines += ["", *(f"- {r.case.name}: {r.complaint}" for r in reports if not r.passed)]
        self.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def line(self, report: Report) -> str:
        """One report for the screen."""
        tail = report.complaint or f"{report.parameters / 1e6:.1f} M parameters, {report.seconds:.1f} s, {report.peak_mib:.0f} MiB"
        return f"{'pass' if report.passed else 'FAIL'}  {report.case.name}: {tail}"

    def _of(self, case: Case) -> str:
        """The fingerprint of the code and of the case's own file."""
        return hashlib.sha256(f"{self.sources} {hashlib.sha256(case.cfg.read_bytes()).hexdigest()}".encode()).hexdigest()[:16]


def fingerprint(side: int, plugins: Sequence[str]) -> str:
    """One hash of all code that a result hangs on, and of the settings."""
    digest = hashlib.sha256(str(side).encode())
    files = [path for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py"))]
    for path in (*sorted(ROOT.glob("*.py")), *files, *sorted(ROOT.glob("data/hyps/*.yaml")), *map(Path, plugins)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _verdict(report: Report, check: str) -> str:
    if check not in report.reasons:
        return "-"
    return "FAIL" if report.reasons[check] else "pass"


def _report(case: Case, row: dict[str, str]) -> Report:
    return Report(
        case, dict.fromkeys(CHECKS, ""), int(row["parameters"]), (int(row["height"]), int(row["width"])), float(row["seconds"]),
        float(row["peak_mib"]),
    )  # fmt: skip
