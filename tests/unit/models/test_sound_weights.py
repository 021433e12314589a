"""NaN, infinity and integer weights are named, by every way into a network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.training.initial_weights import transfer_weights
from models import load_model
from models.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from models.checkpoints.sound_weights import check_weights, fault_of
from tests.tiny import tiny_checkpoint, tiny_model
from utils.config import TrainConfig
from utils.errors import UserError

NAME = "model.0.conv.weight"


def damaged(folder: Path, name: str, value: float | torch.dtype) -> Path:
    path = tiny_checkpoint(folder / "bad.pt")
    checkpoint = load_checkpoint(path)
    weights = {key: tensor.clone() for key, tensor in checkpoint.weights.items()}
    if isinstance(value, torch.dtype):
        weights[name] = weights[name].to(value)
    else:
        weights[name].view(-1)[1] = value
    save_checkpoint(path, replace(checkpoint, weights=weights))
    return path


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (NAME, float("nan"), r"holds NaN \(1 of 216 values are not finite\)"),
        ("model.0.bn.running_var", float("inf"), r"holds infinity \(1 of 8 values"),
        (NAME, torch.int8, "is of type int8"),
    ],
)
def test_weights_that_are_no_finite_numbers_are_refused(name: str, value: float | torch.dtype, message: str, tmp_path: Path) -> None:
    path = damaged(tmp_path, name, value)
    with pytest.raises(UserError, match=f"bad.pt: {name} {message}"):
        load_model(path)
    with pytest.raises(UserError, match=f"bad.pt: {name} {message}"):
        transfer_weights(tiny_model(), TrainConfig(weights=str(path)), load_checkpoint(path))


def test_several_tensors_are_counted() -> None:
    with pytest.raises(UserError, match=r"a\.weight holds NaN .* \(and 1 more tensors\); expected: finite floating-point weights"):
        check_weights({"a.weight": torch.full((2,), torch.nan), "b": torch.tensor(torch.inf), "c": torch.ones(1)}, "x.pt")


@pytest.mark.parametrize(
    ("name", "value"),
    [("bn.num_batches_tracked", torch.tensor(3)), ("relative_position_index", torch.arange(4)), ("w.weight", torch.ones(2).half()),
     ("empty.weight", torch.zeros(0))],
)  # fmt: skip
def test_sound_tensors(name: str, value: torch.Tensor) -> None:
    assert fault_of(name, value) == ""
