"""Switches that change memory and speed leave the training as it is: recomputed activations, accumulation, bfloat16, compilation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.checkpoints import load_checkpoint
from tests.e2e.test_train import Interrupt
from tests.tiny_training import config, make_world
from train import TrainResult, train
from utils.config import TrainConfig
from utils.errors import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def weights_of(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_checkpoint(result.last_weights).weights


def assert_equal_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def test_a_run_that_computes_activations_again_is_the_same_run(world, tmp_path, capsys):
    given = {"cfg": world / "noisy-v9.yaml", "plugins": world / "noisy.py", "multi_scale": True, "amp": "bf16", "attention": "CBAM@3"}
    plain = weights_of(train(config(world, tmp_path, **given)))
    capsys.readouterr()
    again = train(config(world, tmp_path, checkpoint_activations="all", **given))
    assert "memory    activations of 5 modules are computed again in the backward pass" in capsys.readouterr().out
    assert_equal_weights(weights_of(again), plain)
    with pytest.raises(KeyboardInterrupt):
        train(config(world, tmp_path / "cut", **given), observers=[Interrupt(1, 1)])
    last = tmp_path / "cut" / "exp" / "weights" / "last.pt"  # a run that needs less memory goes on where the other ended
    resumed = train(TrainConfig(resume=last, plugins=world / "noisy.py", checkpoint_activations="attention"))
    assert_equal_weights(weights_of(resumed), plain)


def test_without_attention_it_is_refused_before_there_is_a_folder(world, tmp_path):
    with pytest.raises(UserError, match="has no attention; give --checkpoint-activations all"):
        train(config(world, tmp_path, checkpoint_activations="attention"))
    assert not list(tmp_path.iterdir())
