"""Fused kernels give plain steps in any memory layout, scalers skip whole steps, and LION is the published formula."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.doctor.checkup import noise_batch
from engine.memory_format import channels_last
from engine.training.optim import build_optimizer, load_state, optimizer_step
from models import build_model
from models.model import Model
from tests.tiny import tiny_cfg
from utils.config import Hyperparameters
from utils.types import to_unit_range

FUSED = ("SGD", "Adam", "AdamW", "MuSGD")
HYP = Hyperparameters(lr0=0.003, weight_decay=0.01, nbs=2)


def network() -> Model:
    torch.manual_seed(0)
    return channels_last(build_model(tiny_cfg(attention=("MHSA", [])), nc=3)).train()


def optimizer_of(model: nn.Module, name: str, *, plain: bool = False) -> Optimizer:
    optimizer = build_optimizer(model, HYP, name=name, batch_size=2, accumulate=1)
    for group in optimizer.param_groups if plain else ():
        group.update(fused=False, foreach=False)
    return optimizer


def backward(model: Model) -> None:
    loss = model.head.build_loss(HYP)
    batch = noise_batch(model, 64, 64)
    torch.stack(list(loss(model(to_unit_range(batch.images)), batch).values())).sum().backward()


def step(model: Model, optimizer: Optimizer, scaler: torch.amp.GradScaler | None = None) -> Tensor:
    return optimizer_step(optimizer, scaler or torch.amp.GradScaler("cpu", enabled=False), clip_norm=10.0)


@pytest.mark.parametrize("name", FUSED)
def test_fused_steps_equal_plain_steps(name):
    fused, plain = network(), network()
    ours, reference = optimizer_of(fused, name), optimizer_of(plain, name, plain=True)
    assert all(group["fused"] for group in ours.param_groups)
    for _ in range(4):
        backward(fused)
        for p, q in zip(fused.parameters(), plain.parameters()):
            assert p.grad is None or p.grad.stride() == p.stride()  # what fused kernels rely on
            q.grad = None if p.grad is None else p.grad.clone()
        step(fused, ours)
        nn.utils.clip_grad_norm_(plain.parameters(), 10.0, foreach=False)
        reference.step()
    for (key, p), q in zip(fused.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", [*FUSED, "LION"])
def test_loaded_state_has_the_memory_layout_of_the_weights(name):
    """A state in another layout would make fused kernels on a CPU mix up the elements of a weight."""
    one, other = network(), network()
    first, second = optimizer_of(one, name), optimizer_of(other, name)
    backward(one)
    step(one, first)
    other.load_state_dict(one.state_dict())
    saved = deepcopy(first.state_dict())
    for values in saved["state"].values():
        values.update({k: v.contiguous() for k, v in values.items() if v.dim() == 4})
    load_state(second, saved)
    for model, optimizer in ((one, first), (other, second)):
        backward(model)
        step(model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters()))


@pytest.mark.parametrize("name", [*FUSED, "LION"])
def test_a_scaler_skips_whole_steps(name):
    model = network()
    optimizer, scaler = optimizer_of(model, name), torch.amp.GradScaler("cpu", init_scale=4.0)

    def scaled(spoil: float = 1.0) -> Tensor:
        loss = model(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))).main[0].square().mean()
        scaler.scale(loss).backward()
        next(model.parameters()).grad[0, 0, 0, 0] *= spoil
        return step(model, optimizer, scaler)

    def state() -> list[Tensor]:
        return [v.clone() for v in (*model.parameters(), *(v for values in optimizer.state.values() for v in values.values()))]

    assert scaled()
    before = state()
    assert not scaled(float("inf"))
    assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    assert scaler.get_scale() == 2.0
    assert scaled()
    assert not torch.equal(before[0], state()[0])


def lion_by_hand(w: np.ndarray, gradients: list[np.ndarray], *, lr: float, b1: float, b2: float, decay: float) -> np.ndarray:
    """Algorithm 2 of arXiv 2302.06675, a line for a line."""
    m = np.zeros_like(w)
    for g in gradients:
        c = b1 * m + (1 - b1) * g
        w = w - lr * (np.sign(c) + decay * w)
        m = b2 * m + (1 - b2) * g
    return w


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lion_equals_algorithm_2_of_the_paper(decay):
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(6, 5)), [rng.normal(size=(6, 5)) for _ in range(12)]
    model = nn.Linear(5, 6, bias=False).double()
    model.weight.data = torch.from_numpy(start.copy())
    hyp = Hyperparameters(lr0=0.01, momentum=0.9, weight_decay=decay, nbs=8)
    optimizer = build_optimizer(model, hyp, name="LION", batch_size=8, accumulate=1)
    for i, gradient in enumerate(gradients):
        if i == 5:  # a new optimizer resumes the state of the old one
            saved, optimizer = optimizer.state_dict(), build_optimizer(model, hyp, name="LION", batch_size=8, accumulate=1)
            load_state(optimizer, saved)
        model.weight.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    expected = lion_by_hand(start, gradients, lr=0.01, b1=0.9, b2=0.99, decay=decay)
    np.testing.assert_allclose(model.weight.detach().numpy(), expected, rtol=0, atol=1e-12)
