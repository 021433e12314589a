"""The report of a study: tables, escaping, figures, and what is ordinary: nothing, one seed, failed runs."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from engine.study.figures import learning_curves, pareto_front, pr_curves, trade_offs
from engine.study.records import Cost, RunRecord, Status, Study
from engine.study.report import write_report
from engine.study.statistics import analyse
from engine.study.tables import caption, latex_table, latex_text, markdown_page, markdown_text, paper_rows, setting_notes

METRIC = "metrics/mAP_0.5:0.95"
ODD = r"_50% $x_1$ & {a}#~^\<b>|`*"
SETTINGS = {"data": "bccd.yaml", "imgsz": 320, "epochs": 2, "batch_size": 16, "hyp": "my_hyp.yaml"}


def record(variant: str, seed: int, value: float) -> RunRecord:
    return RunRecord(
        variant, seed, Status.FINISHED, {METRIC: value, "metrics/mAP_0.5": value * 1.5},
        curves={"epoch": [1, 2], METRIC: [value / 2, value]},
        per_class={"cell_$": {"AP": value + 0.01 * seed, "objects": 5}, "细胞": {"AP": math.nan, "objects": 0}},
        per_size={"small": value, "medium": value / 2, "large": math.nan},
        pr_curves={"all": [1.0, value, 0.0]},
        image_noise={METRIC: 0.012},
        cost=Cost(3_000_000, 8.1, 8.0, {1: (3.1, 0.2)}, "a GPU", 800, 60),
        settings=SETTINGS,
    )  # fmt: skip


@pytest.fixture
def study() -> Study:
    gains = (0.010, 0.006, 0.012, 0.007, 0.005)
    runs = [record(name, s, 0.4 + s / 100 + up * gains[s]) for name, up in (("none", 0), (ODD, 1)) for s in range(5)]
    failed = RunRecord("bad", 0, Status.FAILED, reason="expected 64 channels,\ngot 32")
    return Study((*runs, failed), "none", notes=("stopped by no rule",))


@pytest.fixture
def no_figures(monkeypatch):
    """Figures take seconds."""
    monkeypatch.setattr("engine.study.report._draw", lambda *_: [])


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_report_holds_every_table_and_figure(study, tmp_path, capsys):
    report = write_report(study, tmp_path / "a" / "b")
    assert capsys.readouterr().err.count("\n") <= 1  # the line about fonts
    drawn = {"learning_curves", "pr_curves", "differences", "class_differences", "size_differences"}
    drawn |= {f"accuracy_{cost}" for cost in ("parameters", "gflops", "latency_batch1")}
    expected = {"results.csv", "summary.csv", "table.tex", "table.md", *(f"{name}.{suffix}" for name in drawn for suffix in ("png", "pdf"))}
    assert {p.name for p in report.files} == {p.name for p in (tmp_path / "a" / "b").iterdir()} == expected
    assert all(p.stat().st_size > 100 for p in report.files)
    assert "better by 0.8 ± 0.4 (5 seeds, p = 0.004)" in report.text
    assert "failed: bad, seed 0: expected 64 channels, got 32" in report.text


def test_differences_to_controls_stand_beside_those_to_the_baseline(study, tmp_path):
    plain = [replace(record("plain", s, 0.38 + s / 90), settings={**SETTINGS, "control_of": [ODD]}) for s in range(5)]
    controlled = replace(study, records=(*study.records, *plain))
    report = write_report(controlled, tmp_path)
    assert {"control_differences.png", "control_differences.pdf"} <= {p.name for p in report.files}
    by_variant = {row["variant"]: row for row in read(tmp_path / "summary.csv")}
    assert (by_variant[ODD]["control"], by_variant[ODD]["control verdict"]) == ("plain", "better")
    assert float(by_variant[ODD]["difference to control"]) == pytest.approx(0.4 + 0.02 + 0.008 - 0.38 - 2 / 90, rel=1e-4)
    assert by_variant["plain"]["control"] == by_variant["none"]["control"] == ""
    assert f"{ODD} and its control  better by 2.6" in report.text
    header, rows = paper_rows(controlled, report.analysis)
    assert header.count("Difference to its control") == 1
    assert [row[header.index("Difference to its control")] != "–" for row in rows] == [False, True, False, False]
    assert "differences to controls are tested in the same way, 1 comparison of their own" in (tmp_path / "table.md").read_text("utf-8")


def test_many_variants_are_drawn_as_three_groups(study, tmp_path, monkeypatch):
    legends = []
    monkeypatch.setattr("engine.study.figures.add_legend", lambda figure, handles, names, **_: legends.append(names))
    runs = [replace(r, variant=f"v{i}") for i in range(12) for r in study.records if r.variant == ODD]
    plain = [replace(r, variant=f"{r.variant} control", settings={**SETTINGS, "control_of": [r.variant]}) for r in runs]
    many = Study((*(r for r in study.records if r.variant == "none"), *runs, *plain), "none")
    for draw in (partial(learning_curves, many), partial(pr_curves, many), partial(trade_offs, many, analyse(many))):
        draw(tmp_path)
    assert len(legends) == 5
    assert all(set(names) - {"Pareto front"} == {"none", "variants (12)", "their controls (12)"} for names in legends)


@pytest.mark.parametrize(("gain", "shown"), [(0.0003, "0.03 ± 0.0"), (0.00003, "0.003 ± 0.0"), (0.008, "0.8 ± 0.4")])
def test_small_differences_are_not_shown_as_nothing(study, gain, shown):
    noise = (0.25, -0.25, 0.5, -0.125, -0.375)
    base = [record("none", s, 0.4) for s in range(5)]
    better = [record("better", s, 0.4 + gain * (1 + noise[s])) for s in range(5)]
    (found,) = analyse(Study((*base, *better), "none")).comparisons
    assert found.sentence.startswith(f"better by {shown}")
    assert not found.sentence.startswith("better by 0.0 ")
    _, rows = paper_rows(Study((*base, *better), "none"), analyse(Study((*base, *better), "none")))
    assert any(f"+{shown}" in cell for cell in rows[1])


def test_results_have_a_row_a_run_and_the_summary_a_row_a_variant(study, tmp_path, no_figures):
    write_report(study, tmp_path)
    runs, variants = read(tmp_path / "results.csv"), read(tmp_path / "summary.csv")
    assert [(r["variant"], r["seed"], r["status"]) for r in runs][-2:] == [(ODD, "4", "finished"), ("bad", "0", "failed")]
    assert runs[0][METRIC] == "0.4"
    assert runs[-1]["reason"] == "expected 64 channels, got 32"
    assert [v["verdict"] for v in variants] == ["baseline", "better", "not tested"]
    assert float(variants[1]["difference"]) == pytest.approx(0.008)
    assert (variants[1]["p Wilcoxon"], variants[1]["parameters"], variants[1]["image noise sd"]) == ("0.0625", "3000000", "0.012")


def test_latex_is_balanced_and_escaped(study):
    table = latex_table(study, analyse(study))
    assert latex_text(ODD) == (
        r"\_50\% \$x\_1\$ \& \{a\}\#\textasciitilde{}\textasciicircum{}\textbackslash{}\textless{}b\textgreater{}\textbar{}`*"
    )
    assert latex_text(ODD) in table
    assert all(word in table for word in (r"\toprule", r"\midrule", r"\bottomrule", r"$\pm$", r"$\uparrow$"))
    plain = table.replace(r"\{", "").replace(r"\}", "")
    assert plain.count("{") == plain.count("}")
    rows = [line for line in table.splitlines() if line.endswith(r"\\")]
    assert len({line.replace(r"\&", "").count("&") for line in rows}) == 1
    assert "textbf" not in table  # no maximum is bold


def test_markdown_shows_names_as_they_are(study):
    page = markdown_page(study, analyse(study))
    assert markdown_text("a|b*c_d") == r"a\|b\*c\_d"
    header, _, *rows = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {header.count("|")}
    assert "- stopped by no rule" in page


def test_the_caption_states_metric_data_recipe_seeds_and_test(study):
    text = caption(study, analyse(study))
    setting = "data bccd.yaml; 320 px; 2 epochs; batch size 16; recipe my_hyp.yaml"
    for part in ("mAP@0.5:0.95 in points", "seeds (0–4)", setting, "1 comparison", "Holm", "scatter by up to 1.2", "on a GPU"):
        assert part in text


def test_unequal_treatment_is_a_note(study):
    other = replace(study.records[-2], settings={**SETTINGS, "epochs": 3})
    notes = setting_notes(replace(study, records=(*study.records[:-2], other)))
    assert [note.split(":")[0] for note in notes] == ["epochs differs between runs"]
    assert setting_notes(study) == []


@pytest.mark.parametrize("runs", [(), (RunRecord("a", 0, Status.FAILED, reason="why"),), (RunRecord("a", 0, Status.PENDING),)])
def test_a_study_without_results_is_ordinary(tmp_path, capsys, runs):
    report = write_report(Study(runs, "a"), tmp_path)
    assert [p.name for p in report.files] == ["results.csv", "summary.csv", "table.tex", "table.md"]
    assert capsys.readouterr().err == ""


def test_one_seed_has_neither_deviation_nor_interval(tmp_path, capsys):
    report = write_report(Study((record("a", 0, 0.4), record("b", 0, 0.41)), "a"), tmp_path)
    assert "nan" not in (report.text + (tmp_path / "table.tex").read_text() + (tmp_path / "summary.csv").read_text()).lower()
    assert "failed" not in capsys.readouterr().err


def test_a_figure_that_fails_stops_nothing(study, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("engine.study.figures.pr_curves", fail)
    for other in ("learning_curves", "trade_offs", "class_differences", "size_differences"):
        monkeypatch.setattr(f"engine.study.figures.{other}", lambda *_: [])
    names = {p.name for p in write_report(study, tmp_path).files}
    assert "differences.png" in names
    assert "pr_curves.png" not in names
    assert "warning: drawing PR curves failed (OSError: no space left)" in capsys.readouterr().err


def test_the_pareto_front_has_what_nothing_else_beats():
    assert pareto_front([(3, 40), (1, 30), (2, 29), (2, 35), (4, 40), (1, 30)]) == [(1, 30), (2, 35), (3, 40)]
    assert pareto_front([]) == []
