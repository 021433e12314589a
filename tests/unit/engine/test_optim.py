"""Groups hold every trainable parameter once; steps, clipping and settings do what they say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.training.optim import apply_settings, build_optimizer, learning_rates, optimizer_step, parameter_groups
from engine.training.schedule import StepSettings
from utils.config import Hyperparameters
from utils.errors import UserError


class Odd(nn.Module):
    """Parameters under every kind of name that an attention uses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.depthwise = nn.Conv2d(4, 4, 1, groups=4, bias=False)
        self.eca = nn.Conv1d(1, 1, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.gamma = nn.Parameter(torch.zeros(4))
        self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.queries = nn.Parameter(torch.zeros(5, 4))
        self.shared = self.conv
        self.fixed = nn.Parameter(torch.zeros(1), requires_grad=False)


def names_of(model, parameters):
    by_id = {id(p): n for n, p in model.named_parameters()}
    return {by_id[id(p)] for p in parameters}


def test_every_trainable_parameter_is_in_exactly_one_group():
    model = Odd()
    groups = parameter_groups(model)
    ids = [id(p) for group in groups.values() for p in group]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert names_of(model, groups["bias"]) == {"conv.bias", "bn.bias", "norm.bias", "attention.in_proj_bias", "attention.out_proj.bias"}
    assert names_of(model, groups["no_decay"]) == {"bn.weight", "norm.weight", "gamma", "scale", "relative_position_bias_table"}
    assert {"attention.in_proj_weight", "queries", "eca.weight", "depthwise.weight"} <= names_of(model, groups["decay"])


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "LION", "MuSGD"])
def test_a_step_moves_every_trainable_parameter(name):
    torch.manual_seed(0)
    model = Odd()
    optimizer = build_optimizer(model, Hyperparameters(), name=name, batch_size=16, accumulate=4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    optimizer_step(optimizer, torch.amp.GradScaler("cpu", enabled=False), clip_norm=10.0)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters())


def test_weight_decay_follows_the_nominal_batch():
    optimizer = build_optimizer(Odd(), Hyperparameters(weight_decay=0.001), batch_size=24, accumulate=4)
    assert {g["name"]: g["weight_decay"] for g in optimizer.param_groups} == {"bias": 0.0, "decay": 0.001 * 96 / 64, "no_decay": 0.0}


def test_gradients_are_clipped_to_the_norm():
    model = nn.Linear(4, 4, bias=False)
    optimizer = build_optimizer(model, Hyperparameters(momentum=0.0, weight_decay=0.0, lr0=1.0), batch_size=64, accumulate=1)
    start = model.weight.detach().clone()
    model.weight.grad = torch.full((4, 4), 100.0)
    optimizer_step(optimizer, torch.amp.GradScaler("cpu", enabled=False), clip_norm=2.0)
    assert (model.weight - start).norm().item() == pytest.approx(2.0, rel=1e-4)


def test_hyperparameters_reach_the_parameter_groups():
    optimizer = build_optimizer(Odd(), Hyperparameters(), batch_size=16, accumulate=4)
    apply_settings(optimizer, StepSettings(lr_bias=0.3, lr=0.2, momentum=0.1, accumulate=1))
    assert learning_rates(optimizer) == (0.3, 0.2, 0.2)
    assert {g["momentum"] for g in optimizer.param_groups} == {0.1}
    adam = build_optimizer(Odd(), Hyperparameters(), name="Adam", batch_size=16, accumulate=4)
    apply_settings(adam, StepSettings(lr_bias=0.3, lr=0.2, momentum=0.1, accumulate=1))
    assert {g["betas"] for g in adam.param_groups} == {(0.937, 0.999)}


def test_lion_updates_by_the_sign():
    model = nn.Linear(2, 1, bias=False)
    optimizer = build_optimizer(model, Hyperparameters(lr0=0.1, weight_decay=0.0), name="LION", batch_size=64, accumulate=1)
    start = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[3.0, -0.001]])
    optimizer.step()
    assert torch.allclose(model.weight - start, torch.tensor([[-0.1, 0.1]]), atol=1e-6)


def test_model_without_trainable_parameters_is_refused():
    with pytest.raises(UserError, match="--freeze"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), Hyperparameters(), batch_size=16, accumulate=1)
