"""``--compile`` trains what training without it does, makes few graphs whatever the sizes, and where it cannot be it says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

import detect
import engine.training.compiling
import export
import val
from engine.training.compiling import unsupported_reason
from models.checkpoints.checkpoint import load_checkpoint
from tests.e2e.test_train import Interrupt
from tests.tiny_training import config, make_world
from train import TrainResult, train
from utils.config import TrainConfig

MOST_GRAPHS = 4  # of a training: one for its size, one for all sizes, one for a smaller last batch, one to spare


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """With a network of two branches and focal modulation."""
    world = make_world(tmp_path_factory.mktemp("world"))
    text = (world / "tiny-v9.yaml").read_text().replace("Conv, [16, 1, 1]", "FocalModulation, []")
    (world / "dual-v9.yaml").write_text(text.replace("[[3, 4], 1, DDetect", "[[3, 4, 3, 4], 1, DualDDetect"))
    return world


@pytest.fixture
def eager_graphs(monkeypatch):
    """Graphs are made and differentiated as for a compiler, and run without one."""
    monkeypatch.setattr(engine.training.compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    """Made since the counters were cleared; one of them is the trial."""
    return counters["stats"]["unique_graphs"] - 1


def weights_of(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_checkpoint(result.last_weights).weights


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference, relative to the larger of 1 and the largest value of its tensor."""
    assert list(a) == list(b)
    return max(float((x.float() - y.float()).abs().max() / y.float().abs().max().clamp(min=1)) for x, y in zip(a.values(), b.values()))


def test_failed_compilation_falls_back_with_one_line(world, tmp_path, monkeypatch, capsys):
    plain = train(config(world, tmp_path, epochs=1))
    capsys.readouterr()
    monkeypatch.setattr(engine.training.compiling, "BACKEND", "no_such_backend")
    result = train(config(world, tmp_path, epochs=1, compile=True))
    errors = [line for line in capsys.readouterr().err.splitlines() if "--compile" in line]
    assert len(errors) == 1
    assert errors[0].startswith("warning: --compile: ")
    assert errors[0].endswith("; training continues without it")
    assert furthest(weights_of(result), weights_of(plain)) == 0


@pytest.mark.usefixtures("eager_graphs")
def test_double_counted_statistics_prevent_compilation(world, tmp_path, monkeypatch, capsys):
    """As on torch 2.6."""
    given = {"epochs": 1, "checkpoint_activations": "all"}
    plain = train(config(world, tmp_path, **given))
    counted = engine.training.compiling._counts_once(torch.device("cpu"))
    monkeypatch.setattr(engine.training.compiling, "_counts_once", lambda device: False)
    torch._dynamo.reset()
    counters.clear()
    capsys.readouterr()
    result = train(config(world, tmp_path, compile=True, **given))
    assert counted or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15)
    assert "counts a batch twice in running statistics where --checkpoint-activations" in capsys.readouterr().err
    assert graphs() == 0
    assert furthest(weights_of(result), weights_of(plain)) == 0


@pytest.mark.usefixtures("eager_graphs")
def test_a_compiled_training_makes_few_graphs(world, tmp_path):
    """Batches of 5, 5 and 2 images in varied sizes."""
    given = {"batch_size": 5, "multi_scale": True}
    compiled = train(config(world, tmp_path, compile=True, **given))
    assert 1 <= graphs() <= MOST_GRAPHS
    assert furthest(weights_of(compiled), weights_of(train(config(world, tmp_path, **given)))) < 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("eager_graphs")
@pytest.mark.parametrize("changes", [{}, {"multi_scale": True, "checkpoint_activations": "all"}, {"rect": True}, {"amp": "bf16"}], ids=str)
def test_dual_head_with_attention_compiles(world, tmp_path, changes):
    if "checkpoint_activations" in changes and (reason := unsupported_reason(torch.device("cpu"), recomputed=True)):
        pytest.skip(reason)
    given = {"cfg": world / "dual-v9.yaml", "batch_size": 5, **changes}
    compiled = train(config(world, tmp_path, compile=True, **given))
    assert 1 <= graphs() <= MOST_GRAPHS
    plain = train(config(world, tmp_path, **{**given, "checkpoint_activations": "off"}))
    assert furthest(weights_of(compiled), weights_of(plain)) < (1e-2 if "amp" in changes else 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("eager_graphs")
def test_compiled_run_resumes_and_saves_plain_weights(world, tmp_path):
    given = {"cfg": world / "dual-v9.yaml", "batch_size": 5, "compile": True}
    whole = train(config(world, tmp_path / "whole", **given))
    with pytest.raises(KeyboardInterrupt):
        train(config(world, tmp_path / "cut", **given), callbacks=[Interrupt(1, 1)])
    resumed = train(TrainConfig(resume=tmp_path / "cut" / "exp" / "weights" / "last.pt"))
    assert furthest(weights_of(resumed), weights_of(whole)) == 0
    there = ["--weights", str(resumed.best_weights), "--imgsz", "64"]
    assert val.main([*there, "--data", str(world / "data.yaml"), "--workers", "0", "--device", "cpu", "--project", str(tmp_path)]) == 0
    assert detect.main([*there, "--source", str(world / "images" / "val"), "--device", "cpu", "--project", str(tmp_path)]) == 0
    assert export.main([*there, "--include", "onnx"]) == 0


@pytest.mark.slow
def test_inductor_run_matches_eager(world, tmp_path):
    torch._dynamo.reset()
    counters.clear()
    given = {"cfg": world / "dual-v9.yaml", "batch_size": 5}
    compiled = train(config(world, tmp_path, compile=True, **given))
    assert 1 <= graphs() <= MOST_GRAPHS
    assert furthest(weights_of(compiled), weights_of(train(config(world, tmp_path, **given)))) < 1e-4
