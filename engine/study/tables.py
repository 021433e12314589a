"""The tables of a study: results.csv (a row a run), summary.csv (a row a variant), table.tex and table.md for a paper and a page.

No run's maximum is marked anywhere: a mark stands for a difference that the seeds show.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.study.records import Cost, Study
from engine.study.statistics import POINTS, Analysis, Comparison, Verdict, shown_difference
from engine.study.variant_costs import variant_cost
from utils.errors import one_line
from utils.metrics.columns import column_title
from utils.text_table import counted, csv_cell, markdown_table

MARKS = {Verdict.BETTER: "↑", Verdict.WORSE: "↓", Verdict.NO_EVIDENCE: "n.s.", Verdict.UNTESTED: "–"}
NONE = "–"
# setting -> how the caption states it
SETTINGS = {"data": "data {}", "imgsz": "{} px", "epochs": "{} epochs", "batch_size": "batch size {}", "hyp": "recipe {}"}
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "≥": r"$\geq$", "–": "--", "×": r"$\times$", "−": "$-$",
}  # fmt: skip
_MARKDOWN = str.maketrans({c: f"\\{c}" for c in r"\`*_[]<>|~#"})


def write_runs(study: Study, path: Path) -> None:
    """results.csv: variant, seed, how it ended, every metric, the cost and the folder of every run."""
    metrics = list(dict.fromkeys(name for record in study.records for name in record.metrics))
    batches = sorted({batch for record in study.records for batch in record.cost.latency_ms})
    header = ["variant", "seed", "status", *metrics, *_cost_header(batches), "folder", "reason"]
    rows = []
    for r in study.records:
        values = [_number(r.metrics.get(name)) for name in metrics]
        folder = "" if r.folder is None else r.folder.as_posix()
        rows.append([r.variant, r.seed, r.status.value, *values, *_cost_values(r.cost, batches), folder, one_line(r.reason)])
    write_csv(path, header, rows)


def write_summary(study: Study, analysis: Analysis, path: Path) -> None:
    """summary.csv: counts, mean and deviation, the comparison with the baseline, noise of the evaluation and cost of every variant."""
    batches = sorted({batch for record in study.records for batch in record.cost.latency_ms})
    header = ["variant", "runs", "finished", "failed", "stopped early", "mean", "sd", "image noise sd", "pairs", "difference"]
    header += ["difference sd", "95 % low", "95 % high", "p t-test", "p Wilcoxon", "p Holm", "comparisons", "detectable", "verdict"]
    header += ["sentence", "control", "difference to control", "control 95 % low", "control 95 % high", "control p t-test"]
    header += ["control p Holm", "control verdict", *_cost_header(batches)]
    comparisons, to_controls = ({c.variant: c for c in those} for those in (analysis.comparisons, analysis.to_controls))
    rows = []
    for s in analysis.summaries:
        row = [s.variant, s.runs, len(s.values), s.failed, s.stopped, *map(_number, (s.mean, s.sd, analysis.image_noise.get(s.variant)))]
        row += [*_comparison_values(comparisons.get(s.variant)), *_control_values(to_controls.get(s.variant))]
        rows.append([*row, *_cost_values(variant_cost(r for r in study.records if r.variant == s.variant), batches)])
    write_csv(path, header, rows)


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A CSV file; a text that a spreadsheet would run as a formula is made harmless."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([csv_cell(cell) for cell in header])
        writer.writerows([csv_cell(cell) for cell in row] for row in rows)


def paper_rows(study: Study, analysis: Analysis) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table for a paper, as text in points; columns that no variant fills are left out."""
    batches = sorted({batch for record in study.records for batch in record.cost.latency_ms})
    header = ["Variant", "Params (M)", "GFLOPs", *(f"ms (batch {b})" for b in batches), "Seeds", column_title(study.metric)]
    header += [f"Difference to {study.baseline}", "p (t, Holm)", "p (Wilcoxon)", ""]
    header += ["Difference to its control", "p (t, Holm)", "p (Wilcoxon)", ""]
    comparisons, to_controls = ({c.variant: c for c in those} for those in (analysis.comparisons, analysis.to_controls))
    rows = []
    for s in analysis.summaries:
        cost = variant_cost(r for r in study.records if r.variant == s.variant)
        latency = [_latency(cost, b) for b in batches]
        lost = ", ".join(f"{count} {how}" for count, how in ((s.failed, "failed"), (s.stopped, "stopped")) if count)
        seeds = str(len(s.values)) + (f" of {s.runs}" if len(s.values) != s.runs else "") + (f" ({lost})" if lost else "")
        sizes = [_fixed(cost.parameters and cost.parameters / 1e6, 2), _fixed(cost.gflops, 2)]
        value = _plus_minus(POINTS * s.mean, POINTS * s.sd, digits=1)
        differences = [cell for those in (comparisons, to_controls) for cell in _compared(those.get(s.variant))]
        rows.append([s.variant, *sizes, *latency, seeds, value, *differences])
    kept = [i for i in range(len(header)) if i == 0 or any(row[i] not in (NONE, "") for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def caption(study: Study, analysis: Analysis) -> str:
    """What the numbers of the table are: metric, data, recipe, seeds, test."""
    seeds = sorted({seed for s in analysis.summaries for seed in s.values})
    setting = "; ".join(SETTINGS[key].format(" or ".join(values)) for key, values in _settings(study).items())
    family = max((c.family for c in analysis.comparisons), default=0)
    comparisons = counted(family, "comparison")
    over = f"mean ± standard deviation over seeds ({_shown_seeds(seeds)})"
    sentences = [
        f"{column_title(study.metric)} in points: {over}" + (f"; {setting}" if setting else ""),
        f"Differences to {study.baseline} are paired by seed, ± half the width of their 95 % interval (Student's t), each by itself",
        f"↑, ↓: better, worse by the paired t-test at 5 % after Holm's correction for {comparisons}; n.s.: no evidence of a difference",
        "The p-value of Wilcoxon's signed-rank test is uncorrected",
    ]
    if analysis.to_controls:
        own = analysis.to_controls[0].family
        sentences.append(
            f"A control has plain convolutions of the same capacity in place of a variant's modules; differences to controls are tested in "
            f"the same way, {counted(own, 'comparison')} of their own"
        )
    if analysis.image_noise:
        noise = POINTS * max(analysis.image_noise.values())
        scatter = f"scatter by up to {noise:.1f} (standard deviation) over resampled validation images"
        sentences.append(f"Apart from the seeds, the same weights {scatter}")
    devices = sorted({r.cost.device for r in study.records if r.cost.latency_ms and r.cost.device})
    if devices:
        sentences.append(f"Latency: median ± half the interquartile range, on {' and '.join(devices)}")
    return ". ".join(sentences) + "."


def latex_table(study: Study, analysis: Analysis) -> str:
    """A table in LaTeX that needs the package booktabs."""
    header, rows = paper_rows(study, analysis)
    lines = [r"% needs \usepackage{booktabs}" + ("; names in Chinese need XeLaTeX with ctex or xeCJK" if not _is_latin(rows) else "")]
    lines += [r"\begin{table}", r"\centering", rf"\caption{{{latex_text(caption(study, analysis))}}}"]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule", _latex_row(header), r"\midrule"]
    lines += [*(_latex_row(row) for row in rows), r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def markdown_page(study: Study, analysis: Analysis) -> str:
    """The table in Markdown, its caption, the verdicts and the notes."""
    header, rows = paper_rows(study, analysis)
    table = markdown_table([markdown_text(h) for h in header], [[markdown_text(cell) for cell in row] for row in rows])
    verdicts = [f"- **{markdown_text(name)}**: {markdown_text(sentence)}" for name, sentence in verdict_lines(analysis)]
    notes = [f"- {markdown_text(note)}" for note in analysis.notes]
    parts = [table if rows else "No run.", markdown_text(caption(study, analysis)), "\n".join(verdicts)]
    parts += ["Notes:\n\n" + "\n".join(notes)] if notes else []
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict_lines(analysis: Analysis) -> list[tuple[str, str]]:
    """What is compared, and what was found."""
    lines = [(c.variant, c.sentence) for c in analysis.comparisons]
    lines += [(f"{c.variant} and its control", c.sentence) for c in analysis.to_controls]
    return [*lines, *((f"{t.what} ({t.count})", t.sentence) for t in analysis.together)]


def setting_notes(study: Study) -> list[str]:
    """A line for each setting of the caption in which the runs differ, since unequal treatment is no comparison."""
    notes = []
    for key in SETTINGS:
        by_value: dict[str, list[str]] = {}
        for r in study.records:
            if r.settings.get(key) is not None:
                by_value.setdefault(str(r.settings[key]), []).append(r.variant)
        if len(by_value) > 1:
            groups = ", ".join(f"{one_line(value, most=80)} ({', '.join(dict.fromkeys(names))})" for value, names in by_value.items())
            notes.append(f"{key} differs between runs: {groups}")
    return notes


def latex_text(text: str) -> str:
    """Text as LaTeX shows it, one line."""
    return "".join(_LATEX.get(c, c) for c in one_line(text))


def markdown_text(text: str) -> str:
    """Text as Markdown shows it, one line."""
    return one_line(text).translate(_MARKDOWN)


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(latex_text, cells)) + r" \\"


def _is_latin(rows: Sequence[Sequence[str]]) -> bool:
    return all(ord(c) < 0x2E80 for row in rows for cell in row for c in cell)


def _compared(comparison: Comparison | None) -> list[str]:
    """Difference, p-values and mark; dashes for the baseline."""
    if comparison is None:
        return [NONE, NONE, NONE, ""]
    paired = comparison.paired
    if paired.count == 0:
        return [NONE, NONE, NONE, MARKS[comparison.verdict]]
    difference = shown_difference(paired.mean, paired.half_width, signed=True).replace("-", "−")
    return [difference, _shown_p(comparison.p_holm), _shown_p(paired.p_wilcoxon), MARKS[comparison.verdict]]


def _comparison_values(c: Comparison | None) -> list[Any]:
    if c is None:
        return [""] * 10 + ["baseline", ""]
    p = c.paired
    numbers = (p.mean, p.sd, *p.interval, p.p_t, p.p_wilcoxon, c.p_holm)
    return [p.count, *map(_number, numbers), c.family, _number(c.detectable), c.verdict.value, c.sentence]


def _control_values(c: Comparison | None) -> list[Any]:
    if c is None:
        return [""] * 7
    return [c.reference, *map(_number, (c.paired.mean, *c.paired.interval, c.paired.p_t, c.p_holm)), c.verdict.value]


def _cost_header(batches: Sequence[int]) -> list[str]:
    latency = [name for b in batches for name in (f"latency ms batch {b}", f"latency IQR ms batch {b}")]
    return ["parameters", "GFLOPs", "customary GFLOPs", *latency, "device", "peak memory MiB", "training s"]


def _cost_values(cost: Cost, batches: Sequence[int]) -> list[Any]:
    latency = [_number(v) for b in batches for v in cost.latency_ms.get(b, (None, None))]
    sizes = ["" if cost.parameters is None else cost.parameters, _number(cost.gflops), _number(cost.customary_gflops)]
    return [*sizes, *latency, cost.device, _number(cost.peak_memory_mib), _number(cost.training_seconds)]


def _settings(study: Study) -> Mapping[str, list[str]]:
    """Setting -> the values of the runs, in order, without repeats."""
    found: dict[str, list[str]] = {}
    for key in SETTINGS:
        values = dict.fromkeys(one_line(str(r.settings[key]), most=80) for r in study.records if r.settings.get(key) not in (None, ""))
        if values:
            found[key] = list(values)
    return found


def _shown_seeds(seeds: Sequence[int]) -> str:
    if not seeds:
        return "none finished"
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]}–{seeds[-1]}"
    return ", ".join(map(str, seeds))


def _plus_minus(value: float, spread: float, *, digits: int) -> str:
    if math.isnan(value):
        return NONE
    return f"{value:.{digits}f}".replace("-", "−") + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


def _latency(cost: Cost, batch: int) -> str:
    if batch not in cost.latency_ms:
        return NONE
    median, spread = cost.latency_ms[batch]
    return _plus_minus(median, spread / 2, digits=1)


def _fixed(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def _shown_p(p: float) -> str:
    return NONE if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.6g}"
