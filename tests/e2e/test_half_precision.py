"""The path of ``--amp fp16`` as a GPU takes it, on a CPU: float16 with CUDA's casts, and a gradient scaler at work."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import engine.training.nonfinite_guard
import engine.training.setup.build
import engine.training.step
from data.dataset_spec import load_dataset_spec
from engine.evaluation.evaluate import EvaluationOptions, evaluate
from engine.training.ema import ModelEMA
from engine.training.nonfinite_guard import NonFiniteGuard
from engine.training.optim import build_optimizer, optimizer_step
from engine.training.setup.config import resolve_config
from engine.training.setup.data import build_loaders
from models.checkpoints.checkpoint import load_checkpoint, load_model
from tests.cuda_casts import CudaCasts
from tests.e2e.test_faults import poisoned
from tests.e2e.test_head_families import ANCHORS, FAMILIES
from tests.e2e.test_resume import Signal
from tests.e2e.test_switches import CALM, halves, prepared
from tests.tiny_training import HYP, config, make_world
from train import TrainResult, train, train_one_epoch
from utils.config import TrainConfig
from utils.errors import UserError
from utils.precision import MIN_SCALE

GIVEN = {"precise_bn": 0, "batch_size": 2, "epochs": 2, "hyp": HYP.replace(nbs=4, warmup_epochs=0)}  # two batches a step
ATTENTION = {"v5": "CloAttention@3", "v7 auxiliary": "NLBlockND@3", "v8": "nchwBRA@3", "v9 dual": "FocalModulation@3"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def half(monkeypatch) -> Iterator[None]:
    """Trainings are in float16, as on a GPU."""
    with monkeypatch.context() as patch, CudaCasts():
        patch.setattr(engine.training.setup.build, "precision_of", lambda choice, device: torch.float16)
        yield


def scaler_of(monkeypatch, **options) -> None:
    monkeypatch.setattr(engine.training.setup.build, "gradient_scaler", lambda device, dtype: torch.amp.GradScaler("cpu", **options))


class Watch:
    """What every step of a training was, and what it left."""

    def __init__(self, monkeypatch) -> None:
        self.factors: list[float] = []  # after the step
        self.taken: list[bool] = []
        self.gradients: list[list[torch.Tensor]] = []  # before the step, with the factor in them
        self.averages: list[torch.Tensor] = []
        step, update = engine.training.step.optimizer_step, ModelEMA.update

        def watched(optimizer, scaler, **given):
            self.gradients.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
            taken = step(optimizer, scaler, **given)
            self.taken.append(bool(taken))
            self.factors.append(scaler.get_scale())
            return taken

        def updated(ema, taken):
            update(ema, taken)
            self.averages.append(torch.cat([value.flatten() for value in ema.model.state_dict().values() if value.is_floating_point()]))

        monkeypatch.setattr(engine.training.step, "optimizer_step", watched)
        monkeypatch.setattr(ModelEMA, "update", updated)


def weights_of(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_checkpoint(result.last_weights).weights


def equal(one: TrainResult, other: TrainResult) -> bool:
    first, second = weights_of(one), weights_of(other)
    return all(torch.equal(first[name], second[name]) for name in first)


def losses_of(result: TrainResult) -> list[float]:
    with open(result.save_dir / "results.csv", newline="") as file:
        return [float(row[key]) for row in csv.DictReader(file) for key in row if "_loss" in key]


@pytest.mark.parametrize("family", ATTENTION)
def test_every_family_of_heads_trains_and_validates_as_in_float32(world, tmp_path, request, family):
    backbone = [[-1, 1, "Conv", [c, 3, 2]] for c in (8, 16, 16, 32)]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"nc": 80, "backbone": backbone, **FAMILIES[family]}))
    gains = {"box": 0.05, "cls": 0.5, "obj": 1.0} if "anchors" in FAMILIES[family] and FAMILIES[family]["anchors"] is ANCHORS else {}
    given = {"cfg": tmp_path / "tiny.yaml", "attention": ATTENTION[family], "hyp": CALM.replace(**gains), "epochs": 2}
    full = losses_of(train(config(world, tmp_path, **given)))
    request.getfixturevalue("half")
    result = train(config(world, tmp_path, **given))
    assert losses_of(result) == pytest.approx(full, rel=0.02)
    assert losses_of(result) != full
    assert result.last.map == pytest.approx(result.best.map, abs=0.02)  # best.pt is validated in float32


def test_trained_network_detects_the_same_in_half_precision(world, tmp_path):
    result = train(config(world, tmp_path, hyp=CALM, attention="BRA@3", optimizer="AdamW", epochs=25, noval=True, nosave=True))
    model = load_model(result.last_weights)
    given, _ = resolve_config(config(world, tmp_path))
    loader = build_loaders(given, CALM, load_dataset_spec(given.data), task=model.task, stride=model.stride).val
    with CudaCasts():
        full, low = (evaluate(model, loader, EvaluationOptions(precision=p, progress=False)) for p in (None, torch.float16))
    assert full.map50 > 0.5
    # one box of these few that crosses a threshold moves the mean by 0.025, and which one does depends on the processor
    assert low.map == pytest.approx(full.map, abs=0.03)
    assert low.map50 == pytest.approx(full.map50, abs=0.03)


def test_loss_scale_search_is_not_counted_as_non_finite(world, tmp_path, monkeypatch, half, capsys):
    scaler_of(monkeypatch, init_scale=2.0**20)
    watch = Watch(monkeypatch)
    result = train(config(world, tmp_path, nan_patience=1, noval=True, nosave=True, **{**GIVEN, "epochs": 3}))
    searched = watch.taken.index(True)
    assert searched >= 3
    assert watch.factors[: searched + 1] == [*(2.0 ** (19 - i) for i in range(searched)), 2.0 ** (20 - searched)]
    assert all(torch.equal(average, watch.averages[0]) for average in watch.averages[:searched])
    assert not torch.equal(watch.averages[searched], watch.averages[0])
    assert "skipped" not in capsys.readouterr().err
    assert not (result.save_dir / "nan_batches.txt").exists()


def test_non_finite_losses_do_not_lower_the_loss_scale(world, tmp_path, monkeypatch, half, capsys):
    scaler_of(monkeypatch, init_scale=16.0)
    poisoned(monkeypatch, {(0, 0), (0, 5), (1, 2)})
    watch = Watch(monkeypatch)
    result = train(config(world, tmp_path, **GIVEN))
    assert watch.taken == [False, True, False, True, False, True]
    assert watch.factors == [16.0] * 6
    assert all(torch.isfinite(average).all() for average in watch.averages)
    assert "epoch 1: 2 step(s) were skipped, loss or gradient was not finite" in capsys.readouterr().err
    assert (result.save_dir / "nan_batches.txt").read_text().count("box loss nan") == 3


def test_gradients_non_finite_at_every_loss_scale_end_the_run(world, tmp_path, monkeypatch, half):
    """The loss is a number, its slope is none; torch alone would halve the factor until it is zero, and say nothing."""
    real = NonFiniteGuard.total_loss

    def total_loss(self, parts, **given):
        return real(self, parts, **given) + (parts["box"] * 0).sqrt()

    monkeypatch.setattr(NonFiniteGuard, "total_loss", total_loss)
    monkeypatch.setattr(engine.training.nonfinite_guard, "MAX_HALVINGS", 3)
    scaler_of(monkeypatch, init_scale=4.0)
    watch = Watch(monkeypatch)
    with pytest.raises(UserError, match="the gradient is not finite for 2 steps in a row; lower lr0 in --hyp, train with --amp bf16"):
        train(config(world, tmp_path, nan_patience=2, **{**GIVEN, "epochs": 9}))
    assert watch.factors == [2.0, *[MIN_SCALE] * 5]  # the guard checks at the end of an epoch, of three steps


def test_gradients_with_non_finite_norm_change_nothing():
    """Each is a number, their norm is not: where nothing is clipped, a scaler alone would have stepped with it, and left weights of nan."""
    layer = torch.nn.Linear(2, 1)
    for name in ("SGD", "AdamW", "LION", "MuSGD"):
        optimizer = build_optimizer(layer, HYP, name=name, batch_size=4, accumulate=1)
        scaler, before = torch.amp.GradScaler("cpu", init_scale=1.0), layer.weight.clone()
        (scaler.scale(layer(torch.ones(1, 2)).sum()) * 1e30).backward()
        assert not optimizer_step(optimizer, scaler, clip_norm=0.0)
        assert torch.equal(layer.weight, before)


def test_resumed_run_restores_the_loss_scale(world, tmp_path, monkeypatch, half):
    scaler_of(monkeypatch, init_scale=16.0, growth_interval=2)
    whole = train(config(world, tmp_path / "whole", **GIVEN))
    with pytest.raises(KeyboardInterrupt):
        train(config(world, tmp_path, **GIVEN), callbacks=[Signal(1, 1)])
    last = tmp_path / "exp" / "weights" / "last.pt"
    state = load_checkpoint(last).training["scaler"]
    assert (state["scale"], state["_growth_tracker"]) == (64.0, 0)  # after four steps
    assert equal(train(TrainConfig(resume=last)), whole)


def test_run_started_without_a_scaler_resumes_with_one(world, tmp_path, request):
    """Begun on a CPU, resumed with ``--device 0``."""
    with pytest.raises(KeyboardInterrupt):
        train(config(world, tmp_path, **GIVEN), callbacks=[Signal(1, 1)])
    request.getfixturevalue("half")
    last = tmp_path / "exp" / "weights" / "last.pt"
    assert load_checkpoint(last).training["scaler"] == {}
    assert train(TrainConfig(resume=last)).epochs == 2


def test_micro_batches_and_accumulation_share_one_loss_scale(world, tmp_path, monkeypatch, half):
    """With batch statistics that stay, and a loss that is a mean over images, they are the gradients of the whole batch."""
    scaler_of(monkeypatch, init_scale=1024.0)
    whole, parts = halves(world, alike=False)
    watch = Watch(monkeypatch)
    for name, batches, accumulate, count in (("whole", whole, 1, 1), ("micro-batches", whole, 1, 2), ("accumulated", parts, 2, 1)):
        run = prepared(world, tmp_path / name, batches[: 4 * accumulate], accumulate=accumulate, own_loss=False)
        run.step.micro_batches.count = count
        train_one_epoch(run, 0)
    assert watch.taken == [True] * 12
    for i, other in enumerate(watch.gradients[4:]):
        for p, q in zip(watch.gradients[i % 4], other, strict=True):
            assert float((p - q).norm()) <= 5e-3 * float(p.norm())
