"""MuSGD is the published update, on all weights of one shape at once; class towers learn faster; nothing waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import pytest
import torch
from torch import nn

from engine.training.learning_rates import class_rates, multipliers
from engine.training.optim import apply_settings, build_optimizer, learning_rates, load_state, optimizer_step
from engine.training.optimizers import musgd
from engine.training.optimizers.musgd import MuSGD
from engine.training.optimizers.orthogonal import orthogonalised
from engine.training.schedule import StepSettings
from models import build_model
from tests.fake_cuda import FakeCudaTensor, fake_cuda
from tests.golden import assert_close, find
from tests.tiny import tiny_cfg, tiny_model
from utils.config import Hyperparameters


def published(*, fused: bool = True) -> tuple[list[nn.Parameter], MuSGD]:
    """The parameters of the vector and their optimizer."""
    args = find("ops", "musgd").meta["args"]
    weights = [nn.Parameter(find("ops", "musgd").tensor(f"param_{i}_0").clone()) for i in range(4)]
    groups = [
        {"params": [weights[i] for i in args["muon_params"]], "muon": True, "weight_decay": args["weight_decay"]},
        {"params": [weights[i] for i in args["sgd_params"]]},
    ]
    return weights, MuSGD(groups, lr=args["lr"], momentum=args["momentum"], **({"fused": True} if fused else {"foreach": True}))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-6), (torch.float32, 1e-3)])
def test_four_steps_equal_the_published_ones(monkeypatch, dtype, tolerance, fused):
    """To the bit's neighbourhood with the published products in bfloat16; to their rounding with those of a CPU."""
    monkeypatch.setattr(musgd, "orthogonalised", lambda m: orthogonalised(m, dtype=dtype))
    case = find("ops", "musgd")
    weights, optimizer = published(fused=fused)
    for step in range(4):
        for i, weight in enumerate(weights):
            weight.grad = case.tensor(f"grad_{i}_{step}")
        optimizer.step()
        for i, weight in enumerate(weights):
            start = case.tensor(f"param_{i}_0")
            moved, wanted = weight.detach() - start, case.tensor(f"param_{i}_{step + 1}") - start
            assert_close(moved, wanted, tolerance, f"what parameter {i} moved in {step + 1} steps")


@pytest.mark.parametrize("shape", ["wide", "tall"])
def test_orthogonalisation_equals_the_published_one(shape):
    case = find("ops", "musgd")
    given, wanted = (case.tensor(f"ns_{shape}_{end}") for end in ("in", "out"))
    assert_close(orthogonalised(given[None], dtype=torch.bfloat16)[0], wanted, 1e-6)
    assert_close(orthogonalised(given[None])[0], wanted, 3e-2)  # the rounding of bfloat16
    singular = torch.linalg.svdvals(orthogonalised(given.double()[None])[0])
    assert ((singular > 0.6) & (singular < 1.3)).all()


def test_matrices_of_one_shape_are_orthogonalised_together_as_each_alone(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 4, 3, 3), (8, 4, 3, 3), (6, 8), (8, 4, 3, 3), (6, 8), (5, 1, 1, 7)]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    calls = []

    def counted(matrices):
        calls.append(len(matrices))
        return orthogonalised(matrices)

    def run(together: bool) -> list[torch.Tensor]:
        weights = [nn.Parameter(v.clone()) for v in values]
        groups = [weights] if together else [[w] for w in weights]
        optimizer = MuSGD([{"params": g, "muon": True, "weight_decay": 0.01} for g in groups], lr=0.1, momentum=0.9, fused=True)
        for _ in range(3):
            for weight, gradient in zip(weights, gradients):
                weight.grad = gradient.clone()
            optimizer.step()
        return [w.detach() for w in weights]

    monkeypatch.setattr(musgd, "orthogonalised", counted)
    alike = run(together=True)
    assert calls == [3, 2, 1] * 3
    for one, alone in zip(alike, run(together=False), strict=True):
        torch.testing.assert_close(one, alone, rtol=0, atol=1e-6)
    monkeypatch.setattr(musgd, "MOST_VALUES", 300)  # one filter has 288
    calls.clear()
    run(together=True)
    assert calls[:5] == [1, 1, 1, 2, 1]


def test_which_weights_are_orthogonalised():
    """Matrices and filters that multiply; vectors, normalisations, position tables and 1-D convolutions are left to SGD."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear, self.line = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Conv1d(1, 1, 3, bias=False)
            self.bn, self.gamma = nn.BatchNorm2d(4), nn.Parameter(torch.ones(4))
            self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))

    model = Odd()
    optimizer = build_optimizer(model, Hyperparameters(), name="MuSGD", batch_size=64, accumulate=1)
    named = {name for name, p in model.named_parameters() if "muon_buffer" in optimizer.state[p]}
    assert named == {"conv.weight", "linear.weight"}
    assert all("momentum_buffer" in optimizer.state[p] for p in model.parameters())


PLAIN = ("0.conv", "0.bn", "1.conv", "1.bn", "2")  # the layers of a class tower
LIGHT = ("0.0.conv", "0.0.bn", "0.1.conv", "0.1.bn", "1.0.conv", "1.0.bn", "1.1.conv", "1.1.bn", "2")
BOTH = ("cv3", "one2one_cv3")


def names_of(layers: Sequence[str]) -> set[str]:
    return {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias") if kind == "weight" or not layer.endswith("conv")}


@pytest.mark.parametrize(
    ("cfg", "towers", "layers", "further", "count"),
    [
        ("yolov8n", ("cv3",), PLAIN, (), 24),
        ("yolo11n", ("cv3",), LIGHT, (), 42),
        ("yolov10n", BOTH, LIGHT, (), 84),
        ("yolo26n-pose", BOTH, LIGHT, (), 84),
        ("yolo26n-seg", BOTH, LIGHT, [f"proto.semseg.{layer}" for layer in PLAIN], 92),
        ("yolo26n-cls", (), (), (), 0),
    ],
)
def test_which_parameters_learn_three_times_as_fast(cfg, towers, layers, further, count):
    """As published: weights, normalisations and biases of the class towers and of the semantic branch; no classifier's linear layer."""
    with torch.device("meta"):
        model = build_model(f"{cfg}.yaml", nc=2)
    row = len(model.plans) - 1
    wanted = names_of([f"{tower}.{level}.{layer}" for tower in towers for level in range(3) for layer in layers]) | names_of(further)
    assert len(wanted) == count
    assert class_rates(model) == {f"model.{row}.{name}": 3.0 for name in wanted}


def test_the_rate_of_classes_comes_on_top_of_a_multiplier_but_no_warm_up_begins_at_it():
    model = build_model(tiny_cfg(), nc=3)
    factors = multipliers(model, "head=2")
    fast = {name for name, _ in model.named_parameters() if name.startswith(f"model.{len(model.plans) - 1}.cv3.")}
    optimizer = build_optimizer(model, Hyperparameters(), name="MuSGD", batch_size=64, accumulate=1, multipliers=factors)
    by_id = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(by_id)
    for part in (0.0, 0.25, 1.0):  # of a warm-up from 0.4 for biases, 0 for others, to 0.2
        rates = {"lr_bias": 0.4 + (0.2 - 0.4) * part, "lr": 0.2 * part}
        apply_settings(optimizer, StepSettings(**rates, momentum=0.8, accumulate=1))
        assert learning_rates(optimizer) == (rates["lr_bias"], rates["lr"], rates["lr"])
        for name, p in model.named_parameters():
            if p.requires_grad:
                group, end = by_id[id(p)], 0.6 if name in fast else 0.2
                start = 0.4 if group["name"] == "bias" else 0.0
                assert group["lr"] == pytest.approx((start + (end - start) * part) * factors.get(name, 1.0))
                assert (group["momentum"], group["muon"]) == (0.8, group["name"] == "decay")
    plain = build_optimizer(model, Hyperparameters(), name="SGD", batch_size=64, accumulate=1)
    assert {(group["lr_mult"], group["class_rate"]) for group in plain.param_groups} == {(1.0, 1.0)}


def test_a_loaded_state_goes_on_bit_for_bit():
    one, other = tiny_model(), tiny_model()
    first, second = (build_optimizer(m, Hyperparameters(), name="MuSGD", batch_size=64, accumulate=1) for m in (one, other))

    def steps(model, optimizer, seeds):
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator) if p.requires_grad else None
            optimizer.step()

    steps(one, first, range(3))
    other.load_state_dict(deepcopy(one.state_dict()))
    load_state(second, deepcopy(first.state_dict()))
    for model, optimizer in ((one, first), (other, second)):
        steps(model, optimizer, (7, 8))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("spoilt", [False, True])
def test_a_step_on_the_fake_device_waits_for_nothing(monkeypatch, spoilt):
    with fake_cuda(monkeypatch) as seen:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).to("cuda:0")
        optimizer = build_optimizer(model, Hyperparameters(), name="MuSGD", batch_size=64, accumulate=1)
        scaler = torch.amp.GradScaler("cuda", enabled=False)
        for p in model.parameters():
            p.grad = torch.full_like(p, float("nan") if spoilt else 0.1)
        before = [p.detach().clone() for p in model.parameters()]
        seen.syncs.clear()
        seen.copies.clear()
        applied = optimizer_step(optimizer, scaler, clip_norm=10.0)
        assert isinstance(next(model.parameters()).data, FakeCudaTensor)
        assert (seen.syncs, seen.copies) == ([], [])
        assert bool(applied) is not spoilt
        assert all(torch.equal(p.detach(), q) is spoilt for p, q in zip(model.parameters(), before))
