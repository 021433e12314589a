"""A skipped step leaves everything as it was, to the bit; every other step is what it would be without the guard."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from torch import nn

from engine.training.ema import ModelEMA
from engine.training.nonfinite_guard import BufferBackup, NonFiniteGuard
from engine.training.optim import build_optimizer, optimizer_step
from engine.training.stop_signals import Stopped, StopSignals
from utils.config import Hyperparameters
from utils.errors import UserError

NAN, INF = float("nan"), float("inf")
HYP = Hyperparameters(lr0=0.01, nbs=4)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2).double()).train()


class Training:
    """The loop of train.py on a network of a few weights."""

    def __init__(self, tmp_path, name: str, patience: int = 0) -> None:
        self.model = network()
        self.model[-1].float()
        self.optimizer = build_optimizer(self.model, HYP, name=name, batch_size=4, accumulate=1)
        self.scaler, self.ema = torch.amp.GradScaler("cpu", enabled=False), ModelEMA(self.model)
        self.guard = NonFiniteGuard(self.model, ("box", "cls"), patience=patience, folder=tmp_path)
        self.iteration = 0

    def step(self, fault=None) -> None:
        images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(self.iteration))
        if fault == "images":
            images[0, 0, 0, 0] = INF
        mean = self.model(images).square().mean()
        parts = {"box": mean, "cls": mean * (NAN if fault == "loss" else INF if fault == "infinite" else 1.0)}
        total = self.guard.total_loss(parts, epoch=0, iteration=self.iteration, paths=("a.png",))
        if fault == "gradient":
            total = total + (self.model[0].weight.sum() * 0).sqrt()  # 0, but its slope is infinite
        total.backward()
        non_finite = self.guard.has_non_finite_loss()
        applied = optimizer_step(self.optimizer, self.scaler, clip_norm=10.0, non_finite=non_finite)
        self.guard.after_step(applied, non_finite)
        self.ema.update(applied)
        self.iteration += 1

    def state(self) -> list[torch.Tensor]:
        states = [v for s in self.optimizer.state.values() for v in s.values()]
        tensors = [v for v in (*self.model.state_dict().values(), *self.ema.model.state_dict().values()) if v.is_floating_point()]
        return [t.clone() for t in (*tensors, *states)]


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "LION", "MuSGD"])
@pytest.mark.parametrize("fault", ["loss", "infinite", "images", "gradient"])
def test_a_non_finite_step_changes_nothing(tmp_path, name, fault):
    run = Training(tmp_path, name)
    run.step(fault)  # the first, before the optimizer has a state
    run.step()
    assert all(torch.isfinite(t).all() for t in run.state())
    before = run.state()
    run.step(fault)
    assert all(torch.equal(a, b) for a, b in zip(before, run.state(), strict=True))
    run.step()
    assert not torch.equal(before[0], run.state()[0])
    assert all(torch.isfinite(t).all() for t in run.state())


def test_first_sgd_step_matches_the_published_one():
    """Momenta that begin at zero are what torch makes of a first gradient, and a non_finite first step leaves no NaN in them."""
    ours, plain = network()[0], network()[0]
    optimizer = build_optimizer(nn.Sequential(ours), HYP.replace(weight_decay=0), batch_size=4, accumulate=1)
    reference = torch.optim.SGD(plain.parameters(), lr=HYP.lr0, momentum=HYP.momentum, nesterov=True)
    for _ in range(3):
        for model, opt in ((ours, optimizer), (plain, reference)):
            model(torch.ones(1, 3, 8, 8)).square().sum().backward()
            opt.step()
            opt.zero_grad()
    assert torch.allclose(ours.weight, plain.weight, rtol=1e-6, atol=0)


def test_run_ends_after_nan_patience_consecutive_steps(tmp_path, capsys):
    run = Training(tmp_path, "SGD", patience=3)
    for fault in ("loss", "loss", None, "gradient", "loss"):
        run.step(fault)
    run.guard.check()
    assert (run.guard.in_row, run.guard.skipped) == (2, 4)
    assert "epoch 1, iteration 4: box loss" in (tmp_path / "nan_batches.txt").read_text()
    state = run.guard.state_dict()
    other = Training(tmp_path, "SGD", patience=3)
    other.guard.load_state_dict(state)
    other.step("infinite")
    with pytest.raises(UserError, match="iteration 1: the cls loss became inf for 3 steps in a row"):
        other.guard.check()
    run.guard.report(0)
    assert "epoch 1: 4 step(s) were skipped" in capsys.readouterr().err
    run.guard.report(1)
    assert capsys.readouterr().err == ""


def test_an_overflow_that_a_scaler_handles_is_not_counted(tmp_path):
    run = Training(tmp_path, "SGD", patience=1)
    run.guard.scaled = True
    run.step("gradient")
    run.guard.check()
    run.step("loss")
    with pytest.raises(UserError, match="the cls loss became nan; lower lr0"):
        run.guard.check()


def test_guard_leaves_finite_steps_unchanged(tmp_path):
    run, plain = Training(tmp_path, "SGD"), Training(tmp_path, "SGD")
    plain.guard.after_step = lambda applied, non_finite: None
    for _ in range(3):
        run.step()
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(run.state(), plain.state(), strict=True))


def test_buffers_of_all_dtypes_are_restored():
    model = network()
    kept = BufferBackup(model)
    good = deepcopy(model.state_dict())
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.fill_(NAN)
    kept.commit(torch.tensor(False))
    assert all(torch.equal(v, good[k]) for k, v in model.state_dict().items())
    model[1].running_mean.fill_(3.0)
    kept.commit(torch.tensor(True))
    model[1].running_mean.fill_(NAN)
    kept.commit(torch.tensor(False))
    assert (model[1].running_mean == 3.0).all()
    BufferBackup(nn.Linear(2, 2)).commit(torch.tensor(False))  # no buffers at all


def test_second_signal_stops_immediately():
    before = signal.getsignal(signal.SIGTERM)

    def heard(*numbers: int, at_once: bool = False) -> None:
        with StopSignals() as signals, signals.at_once() if at_once else nullcontext():
            for number in numbers:
                signal.raise_signal(number)
            assert signals.requested

    with pytest.raises(Stopped):
        heard(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(Stopped):
        heard(signal.SIGINT, at_once=True)
    with pytest.raises(KeyboardInterrupt) as caught:
        heard(signal.SIGINT, signal.SIGTERM)
    assert not isinstance(caught.value, Stopped)
