"""The table of reports, as CSV and Markdown; the CSV is appended line by line, so that --resume can read it."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path

from engine.doctor.checkup import CHECKS, Case, Report
from utils.errors import UserError

ROOT = Path(__file__).parents[2]
SOURCES = ("models", "utils", "engine", "data", "tasks")  # folders whose code a result depends on, beside the scripts
COLUMNS = ("cfg", "scale", "result", *CHECKS, "parameters", "height", "width", "seconds", "peak_mib", "reason", "sources")


class Table:
    """``doctor.csv`` and ``doctor.md`` in a folder.

    Args:
        folder: made if missing.
        side: of the images, px; results at another size do not count.
        plugins: files whose code the results depend on, too.
    """

    def __init__(self, folder: Path, *, side: int, plugins: Sequence[str] = ()) -> None:
        self.csv, self.markdown = folder / "doctor.csv", folder / "doctor.md"
        self.sources = fingerprint(side, plugins)

    def read_passed(self, cases: Sequence[Case]) -> list[Report]:
        """Reports of the cases that an earlier run passed with the same sources and the same YAML."""
        if not self.csv.is_file():
            return []
        with self.csv.open(newline="", encoding="utf-8") as file:
            rows = {(row["cfg"], row["scale"]): row for row in csv.DictReader(file)}
        reports = []
        for case in cases:
            row = rows.get((case.cfg.as_posix(), case.scale))
            if row and row["result"] == "pass" and row["sources"] == self._fingerprint(case):
                reports.append(_parse_row(case, row))
        return reports

    def start(self, done: Sequence[Report]) -> None:
        """Writes a new CSV with the reports of an earlier run.

        Raises:
            UserError: it cannot be written.
        """
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
        results = [_result_of(report, check) for check in CHECKS]
        figures = (report.parameters, *report.size, f"{report.seconds:.1f}", f"{report.peak_mib:.0f}")
        result = "pass" if report.passed else "fail"
        with self.csv.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(
                (case.cfg.as_posix(), case.scale, result, *results, *figures, report.failure, self._fingerprint(case))
            )  # fmt: skip

    def finish(self, reports: Sequence[Report]) -> None:
        """Writes the Markdown table, sorted by name."""
        failed = sum(not report.passed for report in reports)
        seconds = sum(report.seconds for report in reports)
        head = ("YAML", "scale", "parameters", "validated at", *CHECKS, "processor s", "peak MiB")
        lines = [f"{len(reports) - failed} of {len(reports)} pass; {seconds / 60:.1f} processor minutes.", ""]
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for report in sorted(reports, key=lambda r: r.case.name):
            size = "x".join(map(str, report.size))
            results = [_result_of(report, check) for check in CHECKS]
            cells = (report.case.cfg.as_posix(), report.case.scale, f"{report.parameters:,}", size, *results)
            lines.append("| " + " | ".join((*cells, f"{report.seconds:.1f}", f"{report.peak_mib:.0f}")) + " |")
        if failed:
            lines += ["", *(f"- {r.case.name}: {r.failure}" for r in reports if not r.passed)]
        self.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def line(self, report: Report) -> str:
        """One report as a line of text."""
        details = report.failure or f"{report.parameters / 1e6:.1f} M parameters, {report.seconds:.1f} s, {report.peak_mib:.0f} MiB"
        return f"{'pass' if report.passed else 'FAIL'}  {report.case.name}: {details}"

    def _fingerprint(self, case: Case) -> str:
        """Hash of the code and of the case's own file."""
        return hashlib.sha256(f"{self.sources} {hashlib.sha256(case.cfg.read_bytes()).hexdigest()}".encode()).hexdigest()[:16]


def fingerprint(side: int, plugins: Sequence[str]) -> str:
    """Hash of all code that a result depends on, and of the settings."""
    digest = hashlib.sha256(str(side).encode())
    files = [path for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py"))]
    for path in (*sorted(ROOT.glob("*.py")), *files, *sorted(ROOT.glob("data/hyps/*.yaml")), *map(Path, plugins)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _result_of(report: Report, check: str) -> str:
    if check not in report.reasons:
        return "-"
    return "FAIL" if report.reasons[check] else "pass"


def _parse_row(case: Case, row: dict[str, str]) -> Report:
    return Report(
        case, dict.fromkeys(CHECKS, ""), int(row["parameters"]), (int(row["height"]), int(row["width"])), float(row["seconds"]),
        float(row["peak_mib"]),
    )  # fmt: skip
