"""Training end to end on a tiny network and a handful of images."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import detect
import export
import val
from data.dataset_spec import load_dataset_spec
from engine.logging.callbacks import Callback
from engine.training.setup.config import resolve_config
from engine.training.setup.network import build_network
from models import build_model, load_model
from models.checkpoints.checkpoint import load_checkpoint
from tests.tiny_training import HYP, config, make_world
from train import TrainResult, main, train
from utils.config import TrainConfig
from utils.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("wörld with space"))


class Interrupt(Callback):
    """Ctrl-C at a given step."""

    def __init__(self, epoch: int, iteration: int) -> None:
        self.when = (epoch, iteration)

    def on_batch(self, run, epoch, iteration, batch) -> None:
        if (epoch, iteration) == self.when:
            raise KeyboardInterrupt


def rows_of(result: TrainResult) -> list[dict[str, str]]:
    with open(result.save_dir / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_run_writes_the_documented_outputs(world, tmp_path):
    result = train(config(world, tmp_path, noplots=False, save_period=2, epochs=2))
    left = {p.relative_to(result.save_dir).as_posix() for p in result.save_dir.rglob("*") if p.is_file()}
    expected = {"weights/best.pt", "weights/last.pt", "weights/epoch2.pt", "opt.yaml", "hyp.yaml", "results.csv", "results.png"}
    expected |= {"weights/best-deploy.pt", "metrics.json", "per_class.csv", "pr_curve.csv"}
    expected |= {f"train_batch{i}.jpg" for i in range(3)} | {"labels.jpg", "confusion_matrix.png", "model.yaml"}
    expected |= {"val_batch0_labels.jpg", "val_batch0_pred.jpg"}
    expected |= {f"{name}_curve.png" for name in ("P", "R", "F1", "PR")}
    assert expected <= left
    assert any(name.startswith("events.out.tfevents") for name in left)
    rows = rows_of(result)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(value != "" for row in rows for value in row.values())
    best = load_checkpoint(result.best_weights)
    assert (best.names, best.training, best.config["data"]) == (("dark", "bright"), None, str(world / "data.yaml"))
    assert result.best.map50 >= 0


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "LION", "MuSGD"])
def test_resumed_run_equals_an_uninterrupted_one(world, tmp_path, optimizer):
    given = {"cfg": world / "noisy-v9.yaml", "plugins": world / "noisy.py", "optimizer": optimizer, "multi_scale": True, "cos_lr": True}
    whole = train(config(world, tmp_path / "whole", **given))
    with pytest.raises(KeyboardInterrupt, match="holds 1 of 3 epochs, resume with --resume"):
        train(config(world, tmp_path / "cut", **given), callbacks=[Interrupt(1, 1)])
    last = tmp_path / "cut" / "exp" / "weights" / "last.pt"
    assert load_checkpoint(last).epoch == 1
    torch.manual_seed(999)
    assert resolve_config(TrainConfig(resume=last))[0].plugins == ()  # a stored path is never imported
    resumed = train(TrainConfig(resume=last, plugins=world / "noisy.py"))
    assert resumed.save_dir.absolute() == last.parents[1].absolute()
    for name in ("last.pt", "best.pt"):
        a, b = (load_checkpoint(r.save_dir / "weights" / name) for r in (whole, resumed))
        assert a.epoch == b.epoch
        assert a.weights.keys() == b.weights.keys()
        assert all(torch.equal(a.weights[k], b.weights[k]) for k in a.weights)
    assert rows_of(whole) == rows_of(resumed)


def test_two_runs_with_one_seed_are_equal_and_workers_do_not_matter(world, tmp_path):
    a, b = (train(config(world, tmp_path, epochs=1, workers=w)) for w in (0, 2))
    first, second = (load_checkpoint(r.last_weights).weights for r in (a, b))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_finished_run_is_not_resumed_and_other_flags_are_refused(world, tmp_path):
    result = train(config(world, tmp_path, epochs=1))
    with pytest.raises(UserError, match="holds no training state"):
        train(TrainConfig(resume=result.last_weights))
    with pytest.raises(UserError, match="--epochs with --resume"):
        train(TrainConfig(resume=result.last_weights, epochs=7))


def test_frozen_layers_keep_weights_and_statistics(world, tmp_path):
    first = train(config(world, tmp_path, epochs=1))
    second = train(config(world, tmp_path, cfg="", weights=first.best_weights, epochs=1, freeze=(0, 2)))
    before, after = (load_checkpoint(r.last_weights).weights for r in (first, second))
    frozen = [k for k in before if k.startswith(("model.0.", "model.2."))]
    assert frozen
    assert all(torch.equal(before[k], after[k]) for k in frozen)
    assert not torch.equal(before["model.1.conv.weight"], after["model.1.conv.weight"])


def test_weights_are_transferred_and_reported(world, tmp_path, capsys):
    first = train(config(world, tmp_path, epochs=1))
    capsys.readouterr()
    train(config(world, tmp_path, weights=first.best_weights, epochs=1))
    total = len(load_checkpoint(first.best_weights).weights)
    assert f"transferred {total} of {total} tensors; 100 % of its parameters landed" in capsys.readouterr().out
    report = tmp_path / "report.md"
    train(config(world, tmp_path, weights=first.best_weights, epochs=1, single_cls=True, weights_report=report))
    said = capsys.readouterr().out
    assert f"transferred {total - 4} of {total} tensors" in said
    assert f"Report of the weights: {report}" in said
    assert "| 5 | 5 | DDetect |" in report.read_text(encoding="utf-8")


def test_freeze_pretrained_keeps_transferred_tensors(world, tmp_path, capsys):
    first = train(config(world, tmp_path, epochs=1))
    given = {"cfg": "", "weights": first.best_weights, "freeze": "pretrained", "attention": "SE@3", "attention_init": "identity"}
    before = load_checkpoint(first.best_weights).weights
    with pytest.raises(KeyboardInterrupt):
        train(config(world, tmp_path / "cut", **given), callbacks=[Interrupt(1, 1)])
    resumed = train(TrainConfig(resume=tmp_path / "cut" / "exp" / "weights" / "last.pt"))
    after = load_checkpoint(resumed.last_weights).weights
    kept = {k: v for k, v in after.items() if not k.startswith("model.4.")}
    assert len(kept) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), kept.values()))  # running statistics too
    assert after["model.4.gamma"].item() != 0
    assert "--freeze pretrained: " in capsys.readouterr().out


def test_deployed_weights_load_in_every_script(world, tmp_path, capsys):
    dual = (world / "tiny-v9.yaml").read_text().replace("[[3, 4], 1, DDetect", "[[3, 4, 3, 4], 1, DualDDetect")
    (tmp_path / "dual-v9.yaml").write_text(dual)
    first = train(config(world, tmp_path, cfg=tmp_path / "dual-v9.yaml", epochs=1))
    deployed = first.deployed_weights
    assert load_model(deployed).head.branch_weights == (1.0,)
    there = ["--weights", str(deployed), "--imgsz", "64", "--project", str(tmp_path), "--device", "cpu"]
    assert val.main([*there, "--data", str(world / "data.yaml"), "--workers", "0"]) == 0
    assert detect.main([*there, "--source", str(world / "images" / "val")]) == 0
    capsys.readouterr()
    for cfg in ("", tmp_path / "dual-v9.yaml"):
        train(config(world, tmp_path, cfg=cfg, weights=deployed, epochs=1))
    said = capsys.readouterr().out
    assert "100 % of the network's are filled" in said  # by itself: the folded network
    assert "in part" in said  # in the network before folding: the convolutions


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"freeze": "pretrained"}, "--freeze pretrained: is about weights that are carried over; give them with --weights"),
        ({"weights_report": "x.md"}, "--weights-report: is about weights"),
        ({"weights_report": "x.txt", "backbone_weights": "x.pth"}, r"a file that ends in \.md, \.csv, \.json"),
    ],
)
def test_flags_that_need_weights_are_refused_without_them(world, tmp_path, changes, says):
    with pytest.raises(UserError, match=says):
        train(config(world, tmp_path, **changes))


def test_fully_frozen_model_is_refused(world, tmp_path):
    first = train(config(world, tmp_path, epochs=1))
    with pytest.raises(UserError, match="so nothing is left to train"):
        train(config(world, tmp_path, cfg="", weights=first.best_weights, freeze="pretrained"))


def test_refused_training_leaves_no_run_folder(world, tmp_path):
    world = shutil.copytree(world, tmp_path / "set")
    shutil.rmtree(world / "labels")
    with pytest.raises(UserError, match="no labels at all"):
        train(config(world, tmp_path, project=str(tmp_path / "runs")))
    assert not list((tmp_path / "runs").iterdir())


def test_nosave_and_noval_act_at_the_end_only(world, tmp_path):
    seen = []

    class Look(Callback):
        def on_batch(self, run, epoch, iteration, batch):
            seen.append(sorted(p.name for p in (run.save_dir / "weights").iterdir()))

    result = train(config(world, tmp_path, nosave=True, noval=True, epochs=2), callbacks=[Look()])
    assert seen
    assert all(files == [] for files in seen)
    assert result.best_weights.is_file()
    assert [row["metrics/mAP_0.5"] != "" for row in rows_of(result)] == [False, True]


def test_training_stops_early_without_progress(world, tmp_path, monkeypatch, capsys):
    fitness = iter([0.1, 0.5, 0.4, 0.5, 0.3, 0.2, 0.1])
    rest = {"precision": 0.0, "recall": 0.0, "map50": 0.0, "map": 0.0, "losses": {}}
    monkeypatch.setattr("train.validate", lambda run: SimpleNamespace(fitness=next(fitness), columns={}, **rest))
    result = train(config(world, tmp_path, epochs=9, patience=2))
    assert (result.best_epoch, result.epochs) == (4, 6)
    assert "stops early (--patience)" in capsys.readouterr().out


def test_non_finite_losses_end_the_run(world, tmp_path):
    with pytest.raises(UserError, match=r"epoch 1, iteration 2: the cls loss became inf for 2 steps in a row; lower lr0.* holds 0 of 3"):
        train(config(world, tmp_path, hyp=HYP.replace(box=1e38, cls=1e38), nan_patience=2))
    assert load_checkpoint(tmp_path / "exp" / "weights" / "last.pt").epoch == 0


def test_rect_batches_and_bfloat16_train(world, tmp_path):
    assert train(config(world, tmp_path, rect=True, amp="bf16", epochs=1)).last is not None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cfg": "yolov9-ttt.yaml"}, "yolov9-ttt"),
        ({"data": "nothing.yaml"}, "nothing.yaml"),
        ({"hyp": "nothing.yaml"}, "nothing.yaml: no such file"),
        ({"weights": "nothing.pt"}, "nothing.pt: no such checkpoint"),
        ({"cfg": ""}, "give --cfg"),
        ({"freeze": (77, 78)}, "layer 77 is not there"),
        ({"attention": "EMMA@2"}, "--attention: tiny-v9.yaml: EMMA@2: unknown module 'EMMA', did you mean 'EMA'"),
        ({"lr_mult": "attention=2"}, "--lr-mult attention: nothing that is trained"),
        ({"amp": "fp16"}, "--amp fp16: needs a GPU"),
        ({"device": "99"}, "--device 99"),
        ({"plugins": "nothing.py"}, "--plugins nothing.py: no such file"),
        ({"project": "{world}/data.yaml"}, "cannot be written"),
        ({"resume": "nothing.pt"}, "--cfg with --resume"),
    ],
)
def test_bad_input_gives_one_line(world, tmp_path, changes, says):
    changes = {k: str(v).format(world=world) if k == "project" else v for k, v in changes.items()}
    with pytest.raises(UserError, match=says) as caught:
        train(config(world, tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_command_line_refuses_unsupported_flags_by_name(capsys):
    assert main(["--quad"]) == 1
    assert capsys.readouterr().err.startswith("train.py: --quad: not here; give a larger")


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_within_an_epoch_saves_last_and_prints_one_line(world, tmp_path):
    flags = ["--imgsz", "64", "--batch", "4", "--epochs", "100000", "--workers", "1", "--device", "cpu", "--noplots"]
    command = [sys.executable, str(ROOT / "train.py"), "--cfg", str(world / "tiny-v9.yaml"), "--data", str(world / "data.yaml"), *flags]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    last = tmp_path / "runs" / "train" / "exp" / "weights" / "last.pt"
    while process.poll() is None and not (last.is_file() and load_checkpoint(last).epoch > 0):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # a terminal tells the workers too
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == 130
    assert load_checkpoint(last).training is not None
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("train.py: interrupted; ")


@pytest.mark.slow
def test_two_processes_train_one_model(world, tmp_path):
    flags = ["--imgsz", "64", "--batch", "4", "--epochs", "2", "--workers", "0", "--device", "cpu", "--noplots"]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "train.py"), *flags]
    given = ["--cfg", str(world / "tiny-v9.yaml"), "--data", str(world / "data.yaml"), "--project", str(tmp_path)]
    done = subprocess.run([*run, *given], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["exp"]
    assert load_checkpoint(tmp_path / "exp" / "weights" / "last.pt").epoch == 2
    assert "2 process(es)" in done.stdout


ATTENDED = {"attention": ["SE@3", "EMA@1(factor=2)"], "attention_init": "identity", "lr_mult": "attention=2,backbone=0.5"}


def test_attention_inserted_into_trained_weights_starts_as_a_no_op_and_trains(world, tmp_path, capsys):
    first = train(config(world, tmp_path, epochs=1))
    source = load_model(first.best_weights)
    given = config(world, tmp_path, cfg="", weights=first.best_weights, name="attended", **ATTENDED)
    spec = load_dataset_spec(str(world / "data.yaml"))
    for changed in (given, given.replace(cfg=str(world / "tiny-v9.yaml"))):  # with --weights alone, and with both
        start = build_network(changed, load_checkpoint(first.best_weights), spec)[0].eval()
        images = torch.rand(2, 3, 64, 64)
        assert all(torch.equal(a, b) for a, b in zip(start(images).main, source(images).main, strict=True))
    capsys.readouterr()
    result = train(given)
    said = capsys.readouterr().out
    assert "--attention: SE inserted behind what was row 3, as row 5" in said
    assert "rates     attention x 2 (" in said
    trained = load_model(result.best_weights)
    assert [plan.name for plan in trained.plans if plan.identity_start] == ["EMA", "SE"]
    assert all(layer.gamma.item() != 0 for layer, plan in zip(trained.model, trained.plans) if plan.identity_start)
    assert float(rows_of(result)[-1]["x/lr1"]) == pytest.approx(float(rows_of(train(config(world, tmp_path)))[-1]["x/lr1"]))
    again = build_model(result.save_dir / "model.yaml")
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in trained.state_dict().items()}


def test_resumed_run_with_attention_and_lr_mult_equals_an_uninterrupted_one(world, tmp_path):
    whole = train(config(world, tmp_path / "whole", **ATTENDED))
    with pytest.raises(KeyboardInterrupt):
        train(config(world, tmp_path / "cut", **ATTENDED), callbacks=[Interrupt(1, 1)])
    resumed = train(TrainConfig(resume=tmp_path / "cut" / "exp" / "weights" / "last.pt"))
    a, b = (load_checkpoint(r.last_weights).weights for r in (whole, resumed))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert (whole.save_dir / "model.yaml").read_text().split("\n", 1)[1] == (resumed.save_dir / "model.yaml").read_text().split("\n", 1)[1]


def test_a_model_yaml_of_a_run_trains_detects_and_exports(world, tmp_path, capsys):
    first = train(config(world, tmp_path, epochs=1, **ATTENDED))
    second = train(config(world, tmp_path, cfg=first.save_dir / "model.yaml", weights=first.best_weights, epochs=1))
    total = len(load_checkpoint(first.best_weights).weights)
    assert f"transferred {total} of {total} tensors" in capsys.readouterr().out
    shared = ["--weights", str(second.best_weights), "--imgsz", "64", "--device", "cpu", "--project", str(tmp_path / "used")]
    assert val.main([*shared, "--data", str(world / "data.yaml"), "--workers", "0"]) == 0
    assert detect.main([*shared, "--source", str(world / "images" / "val")]) == 0
    assert export.main(["--weights", str(second.best_weights), "--imgsz", "64", "--include", "onnx", "--dynamic"]) == 0


def test_image_weights_draws_are_identical_after_a_resume(world, tmp_path):
    given = {"image_weights": True, "epochs": 3}
    whole = train(config(world, tmp_path / "whole", **given))
    with pytest.raises(KeyboardInterrupt):
        train(config(world, tmp_path / "cut", **given, save_steps=1), callbacks=[Interrupt(2, 1)])
    last = tmp_path / "cut" / "exp" / "weights" / "last.pt"
    kept = load_checkpoint(last).training
    assert kept is not None
    assert len(kept["class_ap"]) == 2
    resumed = train(TrainConfig(resume=last))
    first, second = (load_checkpoint(r.last_weights).weights for r in (whole, resumed))
    assert all(torch.equal(first[k], second[k]) for k in first)
    plain = load_checkpoint(train(config(world, tmp_path / "plain")).last_weights).weights
    assert any(not torch.equal(first[k], plain[k]) for k in first)


def test_evolve_runs_a_hyperparameter_search(world, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.visual.plots.plot_evolution", lambda rows, keys, path: path.touch())  # thirty diagrams take seconds
    given = ["--cfg", world / "tiny-v9.yaml", "--data", world / "data.yaml", "--imgsz", 64, "--epochs", 1, "--workers", 0]
    argv = [str(a) for a in (*given, "--batch-size", 4, "--device", "cpu", "--project", tmp_path, "--name", "search", "--evolve", 2)]
    assert main(argv) == 0
    folder = tmp_path / "search"
    lines = (folder / "evolve.csv").read_text().splitlines()
    assert len(lines) == 3
    assert lines[1].split(",")[6:] != lines[2].split(",")[6:]
    assert {"hyp_evolve.yaml", "evolve.png", "opt.yaml"} <= {p.name for p in folder.iterdir()}
