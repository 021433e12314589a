"""Parts that run again in the backward pass: the same training to the bit, less kept, names and copies as ever."""

from __future__ import annotations

import pickle
from copy import deepcopy
from types import MethodType

import pytest
import torch
from torch import Tensor, nn

from engine.doctor.checkup import noise_batch
from engine.training.nonfinite_guard import NonFiniteGuard
from engine.training.optim import build_optimizer, optimizer_step
from engine.training.recompute import checkpoint_activations, forward, recomputed_parts
from models import build_model
from models.model import Model
from tests.contract.test_attention_contract import PART_A
from tests.tiny import tiny_cfg
from utils.cli.train_arguments import parse_arguments
from utils.config import Hyperparameters, TrainConfig
from utils.errors import UserError
from utils.precision import autocast
from utils.types import to_unit_range

CPU = torch.device("cpu")


def cfg(*attention) -> dict:
    rows = [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [32, 3, 4]], [-1, 1, *attention], [-1, 1, "Conv", [32, 3, 2]]]
    return {"nc": 3, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": 3, "backbone": rows, "head": [[[2, 3], 1, "DDetect", ["nc"]]]}


def train(model: Model, *, steps: int = 3, precision: torch.dtype | None = None) -> list[Tensor]:
    """The losses of some steps, in the order of train.py; the seed is set, so that drawn numbers are the same."""
    torch.manual_seed(1)
    hyp, batch = Hyperparameters(), noise_batch(model.train(), 64, 96)
    optimizer, loss = build_optimizer(model, hyp, batch_size=64, accumulate=1), model.head.build_loss(hyp)
    losses = []
    for _ in range(steps):
        with autocast(CPU, precision):
            output = model(to_unit_range(batch.images))
        total = torch.stack(list(loss(output, batch).values())).sum()
        total.backward()
        optimizer_step(optimizer, torch.amp.GradScaler("cpu", enabled=False), clip_norm=10.0)
        losses.append(total.detach())
    return losses


def pair(configuration: dict, scope: str) -> tuple[Model, Model]:
    """A network, and the same that computes activations again."""
    torch.manual_seed(0)
    plain = build_model(configuration)
    again = deepcopy(plain)
    checkpoint_activations(again, scope)
    return plain, again


def assert_same_training(plain: Model, again: Model, **options) -> None:
    first, second = train(plain, **options), train(again, **options)
    assert torch.equal(torch.stack(first), torch.stack(second))
    ours, theirs = plain.state_dict(), again.state_dict()  # running statistics and their counters too
    assert list(ours) == list(theirs)
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []


def kept_bytes(model: Model) -> int:
    """What autograd holds after a forward pass, the checkpoints' own inputs left out."""
    sizes = {}

    def note(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model.train()(torch.rand(2, 3, 64, 96))
    del output
    return sum(sizes.values())


@pytest.mark.parametrize("name", PART_A)
def test_recomputed_attention_trains_bit_for_bit_as_without(name):
    arguments = [32] if name in ("BottleneckTransformer", "BoT3") else []
    plain, again = pair(cfg(name, arguments), "all")
    assert len(recomputed_parts(again, "attention")) >= 1
    assert_same_training(plain, again)


@pytest.mark.parametrize(
    "row",
    [
        ("RepNCSPELAN4_CBAM", [32, 32, 16, 1]),  # batch norm, and attention with none
        ("FocalModulationBlock", [{"drop_path": 0.5, "drop": 0.2}]),  # draws
        ("CloBlock", [{"attn_drop": 0.2, "mlp_drop": 0.2}]),  # draws, and has batch norm
        ("SK", []),  # batch norm of a single pixel
    ],
    ids=lambda row: row[0],
)
@pytest.mark.parametrize("scope", ["attention", "all"])
def test_recomputed_rows_with_batch_norm_or_dropout_train_bit_for_bit(row, scope):
    assert_same_training(*pair(cfg(*row), scope))


@pytest.mark.parametrize("name", ["BRA", "FocalModulation", "BoTPaperAttention"])
def test_recomputation_under_bfloat16_runs_in_bfloat16(name):
    assert_same_training(*pair(cfg(name, []), "all"), precision=torch.bfloat16)


class Counted(nn.Module):
    """Depends on a buffer that it changes, and draws."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.runs = nn.Parameter(torch.ones(1)), 0
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor, *, twice: bool = False) -> Tensor:
        self.runs += 1
        self.calls += 1
        return (x * self.scale * self.calls.clone() * torch.rand_like(x)).tanh() * (2 if twice else 1)


def test_buffers_are_updated_only_once():
    plain, again = Counted(), Counted()
    again.forward = MethodType(forward, again)
    drawn = []
    for module in (plain, again):
        torch.manual_seed(0)
        for _ in range(2):
            (module(torch.ones(4)) + module(torch.ones(4), twice=True)).sum().backward()
        drawn.append(torch.rand(1))
    assert drawn[0] == drawn[1]  # what is drawn after it
    assert (plain.runs, again.runs) == (4, 8)
    assert again.calls.item() == plain.calls.item() == 4
    assert torch.equal(plain.scale.grad, again.scale.grad)
    with torch.no_grad():
        again(torch.ones(4))
    assert again.runs == 9


def test_recomputation_keeps_fewer_bytes():
    row = ("FocalModulationBlock", [])
    off, attention, everything = (kept_bytes(model) for model in (*pair(cfg(*row), "attention"), pair(cfg(*row), "all")[1]))
    assert everything < attention < off


def test_attention_is_found_in_rows_blocks_and_backbones():
    def kinds(configuration, scope="attention"):
        return [type(part).__name__ for part in recomputed_parts(build_model(configuration), scope)]

    assert kinds(cfg("RepNCSPELAN4_CBAM", [32, 32, 16, 1])) == ["CBAM"] * 2
    assert kinds(cfg("FocalNetStage", [32])) == ["FocalModulationBlock"]  # in a block that is none
    assert kinds(cfg("BoT3", [32])) == ["BoT3"]
    assert kinds(cfg("FocalModulationBlock", [])) == ["FocalModulationBlock"]  # and not the modulation in it once more
    assert kinds(cfg("Conv", [32, 3, 1]), "all") == ["Conv"] * 4
    assert kinds(cfg("CBAM", []), "off") == []
    with pytest.raises(UserError, match=r"--checkpoint-activations attention: .* has no attention; give --checkpoint-activations all"):
        kinds(cfg("Conv", [32, 3, 1]))


def test_copies_and_fused_and_deployed_forms_work():
    model = pair(tiny_cfg(attention=("CloBlock", [])), "all")[1]
    train(model, steps=1)
    images = torch.rand(1, 3, 64, 64)
    expected = model.predict(images)
    twin = deepcopy(model)
    assert all(part.forward.__self__ is part for part in recomputed_parts(twin, "all"))
    read = pickle.loads(pickle.dumps(model))
    for other, tolerance in ((twin, 0.0), (read, 0.0), (model.fuse(), 1e-3), (model.deploy(), 1e-3)):
        torch.testing.assert_close(other.predict(images).boxes, expected.boxes, rtol=0, atol=tolerance)
    train(twin, steps=1)
    torch.testing.assert_close(model.predict(images).boxes, expected.boxes, rtol=0, atol=0)  # the copy is one


def test_a_non_finite_step_changes_nothing(tmp_path):
    model = pair(cfg("CloBlock", []), "all")[1]
    guard = NonFiniteGuard(model, ("box",), patience=0, folder=tmp_path)
    optimizer = build_optimizer(model, Hyperparameters(), batch_size=64, accumulate=1)
    before = deepcopy(model.state_dict())
    loss = model.train()(torch.rand(2, 3, 64, 64)).main[0].sum() * float("nan")
    guard.total_loss({"box": loss}, epoch=0, iteration=0, paths=("a",)).backward()
    non_finite = guard.has_non_finite_loss()
    guard.after_step(optimizer_step(optimizer, torch.amp.GradScaler("cpu", enabled=False), clip_norm=10.0), non_finite)
    after = model.state_dict()
    assert [k for k, v in before.items() if v.is_floating_point() and not torch.equal(v, after[k])] == []


def test_checkpoint_activations_flag_is_parsed():
    assert [parse_arguments(argv).checkpoint_activations for argv in ([], ["--checkpoint-activations"], ["--checkpoint", "all"])] == [
        "off", "attention", "all",
    ]  # fmt: skip
    with pytest.raises(UserError, match="--checkpoint-activations 'some': one of off, attention, all is needed"):
        TrainConfig(checkpoint_activations="some")
