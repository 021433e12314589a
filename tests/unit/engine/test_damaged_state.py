"""A training state with a missing or wrong entry: one line of --resume that names the file."""

from __future__ import annotations

import signal

import pytest
import torch

import train
from engine.logging.callbacks import Callback
from tests.tiny_training import config, make_world
from utils.config import TrainConfig
from utils.errors import UserError


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that has one of two epochs, and the entries of its last.pt."""
    folder = tmp_path_factory.mktemp("run")
    world = make_world(folder)

    class Interrupt(Callback):
        def on_batch(self, run, epoch, iteration, batch) -> None:
            if (epoch, iteration) == (1, 1):
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="resume with --resume"):
        train.train(config(world, folder, epochs=2), callbacks=[Interrupt()])
    last = next(folder.rglob("last.pt"))
    return last, torch.load(last, weights_only=True)


WRONG = {
    "no-model": lambda t: t.pop("model"),
    "model-list": lambda t: t.update(model=[1, 2]),
    "model-other": lambda t: t.update(model={"a": torch.zeros(3)}),
    "no-optimizer": lambda t: t.pop("optimizer"),
    "optimizer-text": lambda t: t.update(optimizer="sgd"),
    "optimizer-groups": lambda t: t["optimizer"].update(param_groups=[]),
    "updates-text": lambda t: t.update(ema_updates="many"),
    "no-random": lambda t: t.pop("random", None) or [r.pop("random", None) for r in t.get("ranks", [])],
    "best-epoch": lambda t: t.pop("best_epoch"),
    "rows-number": lambda t: t.update(rows=7),
    "loss-number": lambda t: t.update(loss=7),
}


@pytest.mark.parametrize("name", WRONG)
def test_damaged_training_state_is_one_line(stopped, tmp_path, name):
    _, content = stopped
    training = {k: dict(v) if isinstance(v, dict) else list(v) if isinstance(v, list) else v for k, v in content["training"].items()}
    if "ranks" in training:
        training["ranks"] = [dict(rank) for rank in training["ranks"]]
    WRONG[name](training)
    path = tmp_path / "last.pt"
    torch.save({**content, "training": training}, path)
    with pytest.raises(UserError) as caught:
        train.train(TrainConfig(resume=str(path)))
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
