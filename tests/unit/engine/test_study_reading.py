"""Run folders of this project, YOLOv5, YOLOv9 and ultralytics as records; what is not recognised is a line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.study import reading
from engine.study.reading import ReadOptions, best_row, metric_name, read_curves, read_run, read_study
from engine.study.records import Cost, Status, Stop
from engine.study.report import report_folders
from engine.study.run_outputs import StudyOfRuns, study_content
from engine.study.statistics import analyse
from utils.errors import UserError

METRIC = "metrics/mAP_0.5:0.95"
YOLOV5 = """               epoch,      train/box_loss, metrics/precision,      metrics/recall,   metrics/mAP_0.5,metrics/mAP_0.5:0.95, x/lr0
                   0,                 0.1,                 0.5,                 0.4,                 0.3,                0.20,   0.01
                   1,                0.09,                 0.6,                 0.5,                 0.5,                0.35,   0.01
                   2,                0.08,                 0.6,                 0.5,                 0.5,                0.30,   0.01
"""
ULTRALYTICS = """epoch,time,train/box_loss,metrics/precision(B),metrics/recall(B),metrics/mAP50(B),metrics/mAP50-95(B),val/box_loss,lr/pg0
1,3.2,1.1,0.5,0.4,0.30,0.20,1.2,0.01
2,6.1,1.0,0.6,0.5,0.52,0.36,1.1,0.01
"""
OURS = """epoch,train/box_loss,metrics/precision,metrics/recall,metrics/mAP_0.5,metrics/mAP_0.5:0.95
1,1.0,0.5,0.4,0.3,0.2
2,0.9,0.6,0.5,,
"""


@pytest.fixture
def make_run(tmp_path):
    """Writes a run folder; returns it."""

    def make(name: str, table: str, settings: str = "", file: str = "opt.yaml") -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "results.csv").write_text(table, encoding="utf-8")
        if settings:
            (folder / file).write_text(settings, encoding="utf-8")
        return folder

    return make


def test_a_run_of_yolov5_gives_its_best_epoch_seed_and_settings(make_run):
    files = "weights: ''\ncfg: models\\yolov5s.yaml\ndata: /d/coco128.yaml\nhyp: data/hyps/low.yaml\n"
    flags = files + "epochs: 3\nbatch_size: 16\nimgsz: 640\nseed: 2\n"
    run = read_run(make_run("exp", YOLOV5, flags))
    assert (run.variant, run.seed, run.status) == ("yolov5s", 2, Status.FINISHED)
    assert run.metrics[METRIC] == 0.35
    assert run.curves["epoch"] == [1, 2, 3]
    assert run.settings == {
        "data": "coco128.yaml", "imgsz": 640, "epochs": 3, "batch_size": 16, "hyp": "low.yaml", "program": "YOLOv5 or YOLOv9"
    }  # fmt: skip


def test_a_run_gives_what_its_training_cost(make_run):
    ours = make_run("ours", OURS, "cfg: a.yaml\nepochs: 2\nseed: 0\n")
    (ours / "cost.json").write_text(json.dumps({"epoch_seconds": [2.5, 1.5], "peak_memory_mib": 512.0, "device": "cpu"}))
    assert (read_run(ours).cost.training_seconds, read_run(ours).cost.peak_memory_mib) == (4.0, 512.0)
    theirs = read_run(make_run("theirs", ULTRALYTICS, "model: b.pt\nepochs: 2\nseed: 0\n", "args.yaml"))
    assert (theirs.cost.training_seconds, theirs.cost.peak_memory_mib) == (6.1, None)


def test_a_run_of_ultralytics_gives_the_same_names(make_run):
    run = read_run(make_run("train", ULTRALYTICS, "model: yolov8n.pt\ndata: coco8.yaml\nepochs: 2\nbatch: 8\nseed: 0\n", "args.yaml"))
    assert (run.variant, run.seed, run.settings["batch_size"], run.settings["program"]) == ("yolov8n", 0, 8, "ultralytics")
    assert run.metrics[METRIC] == run.metrics["metrics/mAP_0.5:0.95(B)"] == 0.36
    assert run.curves["metrics/recall"] == [0.4, 0.5]


def test_a_run_of_this_project_gives_what_its_last_validation_left(make_run):
    folder = make_run("exp", OURS, "cfg: yolov8n.yaml\nattention: [SE@9]\nepochs: 2\nseed: 1\n")
    content = {"rule": "coco", "metrics": {METRIC: 0.21, "metrics/recall": None}, "size_ap": {"small": 0.1, "large": None},
               "image_noise": {METRIC: 0.01}, "parameters": 123}  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(content))
    rows = "all,2,3,0,0,0,0,0,coco\n细胞,2,3,0.5,0.4,0.3,,0.2,coco\n"
    (folder / "per_class.csv").write_text(f"class,images,objects,P,R,AP50,AP75,AP,rule\n{rows}", encoding="utf-8")
    (folder / "pr_curve.csv").write_text("recall,all,细胞\n0,1,1\n1,0,0\n", encoding="utf-8")
    run = read_run(folder)
    assert run.variant == "yolov8n + SE@9"
    assert (run.metrics[METRIC], run.metrics["metrics/recall"]) == (0.21, 0.4)
    assert (run.per_size, run.image_noise, run.cost.parameters) == ({"small": 0.1}, {METRIC: 0.01}, 123)
    assert run.per_class["细胞"]["AP"] == 0.2
    assert run.pr_curves == {"all": [1.0, 0.0]}


def test_a_study_folder_is_reported_as_the_study_was(make_run, tmp_path):
    for name, variant, value, control_of in (("a", "SE@9 control", 0.3, ["SE@9"]), ("b", "SE@9", 0.4, []), ("c", "none", 0.2, [])):
        folder = make_run(f"study/runs/{name}", OURS, "cfg: variants/any/model.yaml\nepochs: 2\nseed: 3\n")
        (folder / "metrics.json").write_text(json.dumps({"metrics": {METRIC: 0.9}, "parameters": 7, "rule": "coco"}))
        (folder / "study_run.json").write_text(json.dumps({"variant": variant, "seed": 3, "control_of": control_of}))
        measured = {"compare": "last", "metrics": {METRIC: value}, "per_class": {"a": {"AP": 0.5}}, "pr_curves": {"all": [1, 0.5]}}
        (folder / "study_metrics.json").write_text(json.dumps(measured))
    (tmp_path / "runs/study/results.csv").write_text(f"variant,seed,status,{METRIC}\nnone,3,finished,0.2\n")
    study = read_study([tmp_path / "runs/study"], ReadOptions(baseline="none"))
    assert {r.variant: (r.seed, r.metrics[METRIC]) for r in study.records} == {"SE@9 control": (3, 0.3), "SE@9": (3, 0.4), "none": (3, 0.2)}
    assert study.controls == {"SE@9": "SE@9 control"}
    assert (study.records[0].per_class, study.records[0].pr_curves) == ({"a": {"AP": 0.5}}, {"all": [1.0, 0.5]})
    assert study.records[0].cost.parameters == 7
    assert study.notes == ()
    (tmp_path / "runs/study/runs/a/study_run.json").write_text("{")
    assert "study_run.json: not valid JSON" in read_study([tmp_path / "runs/study"]).notes[0]


@pytest.fixture
def make_study(make_run, tmp_path):
    """Writes a study folder with a run of seed 3 for each variant, and its ``study.json``; returns it."""

    def make(*variants: str, baseline: str = "none", metric: str = METRIC, **said) -> Path:
        folder = tmp_path / "runs/study"
        for variant in variants:
            run = make_run(f"study/runs/{variant}", OURS)
            control_of = [variant.removesuffix(" control")] if variant.endswith(" control") else []
            flags = {"seed": 3, "epochs": 9, "data": "a.yaml", "imgsz": 64, "batch_size": 4}
            marks = {"variant": variant, "seed": 3, "control_of": control_of, "flags": flags, "hyp": {"optimizer": "SGD", "lr0": 0.1}}
            (run / "study_run.json").write_text(json.dumps(marks))
            (run / "metrics.json").write_text(json.dumps({"metrics": {METRIC: 0.9}, "parameters": 7, "rule": "coco"}))  # of best.pt
        (folder / "study.json").write_text(json.dumps(study_content(StudyOfRuns(baseline, metric, "last", variants, **said))))
        return folder

    return make


def measure(folder: Path, variant: str, *, compare: str = "last", **metrics: float) -> None:
    values = {"compare": compare, "metrics": {METRIC: 0.5, **{f"metrics/{key}": value for key, value in metrics.items()}}}
    (folder / "runs" / variant / "study_metrics.json").write_text(json.dumps(values))


def test_a_study_folder_says_what_it_is_compared_by_and_what_it_cost(make_study):
    costs = {"SE@9": Cost(12, 0.6, 0.5, {1: (2.0, 0.1)}, "cpu, 1 thread"), "none": Cost(10, 0.5, 0.4), "SE@9 control": Cost(11)}
    folder = make_study(*costs, metric="metrics/mAP_0.5", costs=costs, notes=("compared weights: the last",))
    for variant in costs:
        measure(folder, variant, **{"mAP_0.5": 0.4})
    study = read_study([folder])
    assert (study.baseline, study.metric, study.notes) == ("none", "metrics/mAP_0.5", ("compared weights: the last",))
    assert [(r.variant, r.seed, r.cost) for r in study.records] == [(name, 3, cost) for name, cost in costs.items()]
    assert study.records[0].metrics == {METRIC: 0.5, "metrics/mAP_0.5": 0.4}
    stated = study.records[2].settings
    assert stated["hyp"].startswith("SGD, lr0 0.1, hyp.yaml ")
    assert (stated["data"], stated["imgsz"], stated["epochs"], stated["control_of"]) == ("a.yaml", 64, 9, ["SE@9"])
    assert read_study([folder], ReadOptions("SE@9", "mAP50-95")).metric == METRIC
    (named,) = read_study([Path(f"plain={folder / 'runs/none'}")]).records
    assert (named.variant, named.cost.gflops) == ("plain", 0.5)


def test_a_study_folder_is_found_from_within(make_study, monkeypatch):
    folder = make_study("none", costs={"none": Cost(10)})
    monkeypatch.chdir(folder / "runs/none")
    for path in ("..", ".", "../none"):
        assert read_study([Path(path)]).records[0].cost.parameters == 10


def test_only_what_its_study_measured_is_a_result(make_study):
    folder = make_study("none", "first", "measuring", "other", "killed")
    measure(folder, "none")
    measure(folder, "measuring", compare="best")
    for variant in ("first", "measuring"):
        (folder / "runs" / variant / "study_failed.json").write_text(json.dumps({"reason": "mine.py, line 3: it broke"}))
    (folder / "runs/first/results.csv").write_text(OURS.splitlines()[0] + "\n")  # in its first epoch
    measure(folder, "other", compare="best")
    study = read_study([folder])
    pending = "not measured by its study, after 2 epochs"
    assert [(r.variant, r.status, r.reason, dict(r.metrics)) for r in study.records] == [
        ("none", Status.FINISHED, "", {METRIC: 0.5}),
        ("first", Status.FAILED, "mine.py, line 3: it broke", {}),
        ("measuring", Status.FAILED, "mine.py, line 3: it broke", {}),
        ("other", Status.PENDING, pending, {}),
        ("killed", Status.PENDING, pending, {}),
    ]
    assert study.notes == tuple(f"{folder / 'runs' / v}: {pending}; the study's command resumes it" for v in ("killed", "other"))
    (folder / "study.json").unlink()  # which weights it compares is not known
    assert {r.variant: r.status for r in read_study([folder]).records}["other"] is Status.FINISHED


def test_variants_that_a_study_stopped_are_stopped_in_its_report(make_study):
    stops = {name: Stop(1, f"{name} was stopped") for name in ("SE@9", "SE@9 control")}
    folder = make_study("none", "SE@9", "SE@9 control", stopped=stops)
    measure(folder, "none")
    ends = {r.variant: (r.status, r.reason, r.metrics.get(METRIC)) for r in read_study([folder]).records}
    assert ends == {"none": (Status.FINISHED, "", 0.5), **{name: (Status.STOPPED, f"{name} was stopped", 0.2) for name in stops}}


def test_runs_that_a_study_has_no_more_are_left_out_of_its_report(make_study):
    folder = make_study("none", "SE@9", "CBAM@9", seeds=(3,))
    for variant in ("none", "SE@9", "CBAM@9"):
        measure(folder, variant)
    content = study_content(StudyOfRuns("none", METRIC, "last", ("none", "SE@9"), (3,)))
    (folder / "study.json").write_text(json.dumps(content))
    study = read_study([folder])
    assert [r.variant for r in study.records] == ["none", "SE@9"]
    assert study.notes == (f"{folder / 'runs/CBAM@9'}: its study lists its variant or seed no more; it is left out",)
    assert [r.variant for r in read_study([folder / "runs/CBAM@9"], ReadOptions("CBAM@9")).records] == ["CBAM@9"]  # asked for by itself
    (folder / "study.json").write_text(json.dumps({**content, "seeds": [4]}))
    with pytest.raises(UserError, match=r"no run to report: .* lists its variant or seed no more"):
        read_study([folder])


def test_runs_that_never_began_count_as_not_trained(make_study):
    folder = make_study("none", "SE@9")
    measure(folder, "none")
    for name in ("results.csv", "metrics.json"):
        (folder / "runs/SE@9" / name).unlink()
    assert [(r.variant, r.status) for r in read_study([folder]).records] == [("none", Status.FINISHED), ("SE@9", Status.PENDING)]


def test_a_study_folder_without_its_file_says_what_is_not_known(make_study):
    folder = make_study("none", "SE@9")
    measure(folder, "none")
    measure(folder, "SE@9")
    (folder / "study.json").rename(folder / "diff.json")
    study = read_study([folder])
    assert study.baseline == "SE@9"
    assert study.notes == (f"{folder}: no study.json, so that baseline and order are not known; the study's command writes it",)


@pytest.mark.parametrize("name", ["study_metrics.json", "study_failed.json"])
def test_a_damaged_mark_costs_the_run_no_other(make_study, name):
    folder = make_study("none", "SE@9")
    measure(folder, "none")
    (folder / "runs/SE@9" / name).write_text("{")
    study = read_study([folder])
    assert [r.variant for r in study.records] == ["none", "SE@9"]
    assert f"{name}: not valid JSON" in study.notes[0]
    assert study.records[1].metrics == {}


ODD_COST = '{"parameters": 1' + 400 * "0" + ', "gflops": NaN, "customary_gflops": -1, "latency_ms": {"1": [1], "x": [1, 2]}, "device": 1}'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"), ("[1]", "keys and values are expected"), ("{}", ""),
        ('{"baseline": "none"}', "baseline, metric and variants are expected"),
        ('{"baseline": "none", "metric": "", "variants": {"none": ' + ODD_COST + "}}", ""),
    ],
)  # fmt: skip
def test_a_damaged_study_file_is_a_note(make_study, text, said):
    folder = make_study("none")
    measure(folder, "none")
    (folder / "study.json").write_text(text)
    study = read_study([folder])
    assert (len(study.notes), said in "".join(study.notes)) == (bool(said), True)
    assert study.records[0].cost.parameters in (7, None)
    assert study.records[0].cost.gflops is None


def test_a_run_that_ends_early_failed_unless_its_patience_ended(make_run):
    assert read_run(make_run("killed", YOLOV5, "epochs: 100\npatience: 50\nseed: 0\n")).reason == "ends after 3 of 100 epochs"
    assert read_run(make_run("patient", YOLOV5, "epochs: 100\npatience: 1\nseed: 0\n")).status is Status.FINISHED


def test_folders_become_a_study_and_names_are_given(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.study.report._draw", lambda *_: [])
    for i in (1, 2, 10):
        make_run(f"base/exp{i}", YOLOV5, f"cfg: yolov5s.yaml\nepochs: 3\nseed: {i}\n")
        make_run(f"se/exp{i}", YOLOV5.replace("0.35", f"0.3{i % 7}"), f"cfg: yolov5s.yaml\nepochs: 3\nseed: {i}\n")
    runs = tmp_path / "runs"
    study = read_study([Path(f"SE={runs / 'se'}"), runs / "base"], ReadOptions("yolov5s", "mAP50-95"))
    assert [(r.variant, r.seed) for r in study.records] == [(v, s) for v in ("SE", "yolov5s") for s in (1, 2, 10)]
    assert (study.baseline, study.metric, study.notes) == ("yolov5s", METRIC, ())
    report = report_folders([f"SE={runs / 'se'}", runs / "base"], tmp_path / "out", ReadOptions("yolov5s"))
    assert "SE  worse by 3.0 ± 2.5 (3 seeds, p = 0.035)" in report.text


def test_repeated_seeds_are_numbered_with_a_note(make_run, tmp_path):
    for name in ("exp", "exp2"):
        make_run(name, YOLOV5, "cfg: a.yaml\nepochs: 3\nseed: 0\n")
    study = read_study([tmp_path / "runs"])
    assert [r.seed for r in study.records] == [0, 1]
    assert "all seeds are the same or missing" in study.notes[0]


def test_seeds_that_are_known_stay_paired_beside_broken_and_repeated_runs(make_run, tmp_path):
    for name, config, seed, epochs in (
        ("exp1", "a", 0, 100), ("exp2", "a", 0, 3), ("exp3", "a", 1, 3), ("exp4", "b", 0, 3), ("exp5", "b", 1, 3), ("exp6", "b", 1, 3),
        ("exp7", "b", 7, 100),
    ):  # fmt: skip
        make_run(name, YOLOV5, f"cfg: {config}.yaml\nepochs: {epochs}\nseed: {seed}\n")
    make_run("exp8", YOLOV5, "cfg: b.yaml\nepochs: 3\n")
    study = read_study([tmp_path / "runs"])
    assert [(r.variant, r.seed) for r in study.records] == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("b", 1), ("b", 7), ("b", -1)]
    assert [r.status is Status.FAILED for r in study.records] == [False] * 5 + [True, False]
    assert "a, seed 0" in study.notes[0]
    assert study.notes[0].endswith("exp1 ends after 3 of 100 epochs; another run of this seed finished")
    assert study.notes[1].startswith("1 runs have no seed and are paired with none")
    assert analyse(study).comparisons[0].seeds == (0, 1)


def test_different_programs_are_a_note(make_run, tmp_path):
    make_run("exp", YOLOV5, "cfg: a.yaml\nepochs: 3\nseed: 0\n")
    make_run("exp2", ULTRALYTICS, "model: b.pt\nepochs: 2\nseed: 0\n", "args.yaml")
    assert "AP differs by its rule alone" in read_study([tmp_path / "runs"]).notes[-1]


def test_what_is_not_recognised_is_one_line_each(make_run, tmp_path):
    good = make_run("a", OURS.replace("train/box_loss", "my column"), "cfg: a.yaml\nepochs: 2\nseed: 0\n")
    make_run("b", "epoch,loss\n1,2\n", "seed: 0\n")
    make_run("c", "")
    make_run("d", "epoch\n1\n", "epochs: [\n")
    (good / "metrics.json").write_text("[" * 100_000)
    study = read_study([tmp_path / "runs"])
    assert [r.variant for r in study.records] == ["a"]
    text = "\n".join(study.notes)
    assert f"{good / 'results.csv'}: columns not recognised, left out: my column" in text
    assert "metrics.json: not valid JSON" in text
    assert "b/results.csv: no value of metrics/mAP_0.5:0.95 (metrics there: none); the run is left out" in text
    assert "c/results.csv: no epoch in it" in text


@pytest.mark.parametrize(
    ("paths", "options", "said"),
    [
        (["nowhere"], ReadOptions(), "nowhere: no such folder"),
        (["runs"], ReadOptions(baseline="yolov5m"), "--baseline yolov5m: no run of this variant; did you mean 'yolov5s'?"),
        (["runs"], ReadOptions(metric="speed"), "--metric speed: no run has it; known are precision, recall, mAP_0.5"),
        (["runs"], ReadOptions(metric="mAP5"), "--metric mAP5: no run has it; did you mean 'mAP_0.5'?"),
        (["empty"], ReadOptions(), "empty: no run to report; a run folder has a results.csv"),
        ([], ReadOptions(), "no folder given: no run"),
    ],
)
def test_what_cannot_be_reported_is_said(make_run, tmp_path, paths, options, said):
    make_run("exp", YOLOV5, "cfg: yolov5s.yaml\nepochs: 3\nseed: 0\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as error:
        read_study([tmp_path / p for p in paths], options)
    assert said in str(error.value)


def test_reading_is_bounded(make_run, monkeypatch):
    monkeypatch.setattr(reading, "MOST_EPOCHS", 2)
    monkeypatch.setattr(reading, "MOST_RUNS", 0)
    folder = make_run("exp", YOLOV5)
    with pytest.raises(UserError, match="7 columns and 3 rows, at most 200 and 2 are read"):
        read_curves(folder / "results.csv", [])
    with pytest.raises(UserError, match="more than 0 runs"):
        read_study([folder])


def test_metrics_are_named_as_users_name_them():
    assert metric_name("mAP50-95") == metric_name("mAP@0.5:0.95") == metric_name(METRIC) == METRIC
    assert metric_name("metrics/mAP50(B)") == "metrics/mAP_0.5"
    assert best_row({"metrics/mAP_0.5": [float("nan"), 0.1], METRIC: [0.9, 0.1]}) == 1


MASKS = (
    "epoch,"
    + ",".join(f"metrics/{name}({mark})" for mark in "BM" for name in ("precision", "recall", "mAP_0.5", "mAP_0.5:0.95"))
    + """
1,0.5,0.5,0.5,0.40,0.5,0.5,0.5,0.10
2,0.5,0.5,0.4,0.30,0.5,0.5,0.5,0.30
3,0.5,0.5,0.4,0.35,0.5,0.5,0.4,0.20
"""
)
CLASSES = """epoch,metrics/accuracy_top1,metrics/accuracy_top5
1,0.5,0.9
2,0.6,0.7
"""


@pytest.mark.parametrize(
    ("table", "metric", "best"), [(MASKS, f"{METRIC}(M)", 1), (CLASSES, "metrics/accuracy_top1", 0), (OURS, METRIC, 0)]
)
def test_runs_of_a_task_are_compared_by_its_own_measure(make_run, table, metric, best):
    study = read_study([make_run("one", table)], ReadOptions())
    assert study.metric == metric
    assert study.records[0].metrics[metric] == study.records[0].curves[metric][best]
