"""Full memory halves the micro-batches; the run continues as if it had started with them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import engine.training.step
from engine.evaluation import evaluate as evaluation
from engine.micro_batches import TrainingMicroBatches, mean_parts, split
from engine.training.saving import explain_interruption
from engine.training.step import TrainingStep
from models.checkpoints.checkpoint import load_checkpoint
from tests.tiny_training import HYP, config, make_world
from train import train
from utils import distributed
from utils.config import TrainConfig
from utils.errors import UserError
from utils.memory import free_bytes, is_out_of_memory
from utils.types import Batch, Letterbox, Targets

GIVEN = {"batch_size": 4, "hyp": HYP.replace(nbs=8, iou_loss="WIoU-v3"), "multi_scale": True, "epochs": 2}  # two batches a step
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB"
real_pass, real_forward = TrainingStep.forward_backward, evaluation.forward


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def full_above(images: int, *, first_at: tuple[int, int] = (0, 0), late: bool = True):
    """A pass that needs too much memory above so many images, from a moment on; ``late``: at its very end, when everything has changed."""

    def forward_backward(self, batch):
        is_full = len(batch.images) > images and (self.epoch, self.iteration) >= first_at
        result = real_pass(self, batch) if late or not is_full else None
        if is_full:
            raise torch.OutOfMemoryError(FULL)
        return result

    return forward_backward


def weights_of(result) -> dict[str, torch.Tensor]:
    return load_checkpoint(result.last_weights).weights


def micro_batches_from_start(monkeypatch, count: int) -> None:
    made = TrainingMicroBatches.__init__

    def init(self, *args) -> None:
        made(self, *args)
        self.count = count

    monkeypatch.setattr(TrainingMicroBatches, "__init__", init)


@pytest.mark.parametrize("late", [True, False])
def test_failed_pass_changes_no_state(world, tmp_path, monkeypatch, capsys, late):
    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "forward_backward", full_above(2, late=late))
        halved = train(config(world, tmp_path, name="halved", **GIVEN))
    warning = "epoch 1, iteration 1: the memory is full with 4 image(s) of 64 px; the network takes 2 at a time from here on"
    assert capsys.readouterr().err.count(warning) == 1
    micro_batches_from_start(monkeypatch, 2)
    begun_so = train(config(world, tmp_path, name="begun", **GIVEN))
    first, second = weights_of(halved), weights_of(begun_so)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_accumulated_gradients_survive_a_failed_pass(world, tmp_path, monkeypatch):
    """The second batch of a step fails, after the gradients of the first were summed, and micro-batches have one image in the end."""
    steps = []
    real_step = engine.training.step.optimizer_step

    def step(optimizer, scaler, **kwargs):
        steps.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
        return real_step(optimizer, scaler, **kwargs)

    monkeypatch.setattr(engine.training.step, "optimizer_step", step)
    given = {**GIVEN, "epochs": 1, "hyp": HYP.replace(nbs=8, warmup_epochs=0), "multi_scale": False}
    monkeypatch.setattr(TrainingStep, "forward_backward", full_above(1, first_at=(0, 1)))
    train(config(world, tmp_path, name="halved", **given))

    def plainly(self, batch, one_pass, *, place):
        """The first batch whole, of the others every image for itself, and torch adds up."""
        for part in split(batch, 4) if place == "epoch 1, iteration 2" else [batch]:
            result = one_pass(part)
        return result

    monkeypatch.setattr(TrainingStep, "forward_backward", real_pass)
    monkeypatch.setattr(TrainingMicroBatches, "run", plainly)
    train(config(world, tmp_path, name="plain", **given))
    assert len(steps) == 4
    for halved, plain in zip(steps[0], steps[2]):
        torch.testing.assert_close(halved, plain, rtol=1e-5, atol=1e-6)


def test_micro_batch_count_survives_a_resume(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(TrainingStep, "forward_backward", full_above(2, first_at=(0, 2)))
    whole = train(config(world, tmp_path, name="whole", **GIVEN))

    def interrupted(self, batch):
        if (self.epoch, self.iteration) == (1, 0):
            raise KeyboardInterrupt
        return full_above(2, first_at=(0, 2))(self, batch)

    monkeypatch.setattr(TrainingStep, "forward_backward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config(world, tmp_path, name="stopped", **GIVEN))
    monkeypatch.setattr(TrainingStep, "forward_backward", real_pass)
    capsys.readouterr()
    resumed = train(TrainConfig(resume=tmp_path / "stopped"))
    assert "memory is full" not in capsys.readouterr().err
    first, second = weights_of(whole), weights_of(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_out_of_memory_with_one_image_ends_the_run(world, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingStep, "forward_backward", full_above(0))
    says = r"epoch 1, iteration 1: the memory is full with a single image of 64 px, lower --imgsz \(CUDA out of memory.*\); .*resume with"
    with pytest.raises(UserError, match=says):
        train(config(world, tmp_path, **GIVEN))


def test_validation_splits_batches_too(world, tmp_path, monkeypatch, capsys):
    whole = train(config(world, tmp_path, name="whole", **GIVEN))

    def forward(predictor, images):
        if len(images) > 1:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory")
        return real_forward(predictor, images)

    monkeypatch.setattr(evaluation, "forward", forward)
    halved = train(config(world, tmp_path, name="halved", **GIVEN))
    assert "validation: the memory is full with 2 image(s)" in capsys.readouterr().err
    assert halved.last.map50 == pytest.approx(whole.last.map50, abs=1e-9)
    assert halved.last.losses.keys() == whole.last.losses.keys()


def test_means_of_micro_batches():
    parts = mean_parts([({"box": torch.tensor(1.0)}, 3), ({"box": torch.tensor(5.0)}, 1)])
    assert {name: value.item() for name, value in parts.items()} == {"box": 2.0}


def test_real_allocator_errors_are_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**60


def test_micro_batches_of_a_batch():
    hw = torch.arange(10).view(5, 2)
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.1, 0.1], [0, 2, 0.5, 0.5, 0.1, 0.1], [3, 0, 0.2, 0.2, 0.3, 0.3], [4, 1, 0.1, 0.1, 0.1, 0.1]])
    batch = Batch(torch.arange(5).view(5, 1, 1, 1), Targets.of_rows(targets), tuple("abcde"), Letterbox(hw, hw.float(), hw.float()), 2)
    first, second = split(batch, 2)
    assert (first.paths, second.paths) == (("a", "b"), ("c", "d", "e"))
    assert (first.max_boxes, second.max_boxes) == (2, 1)
    assert (first.targets.image.tolist(), second.targets.image.tolist()) == ([0, 0], [1, 2])
    assert torch.equal(second.targets.rows()[:, 1:], targets[2:, 1:])
    assert torch.equal(second.letterbox.original_hw, hw[2:])
    assert torch.equal(batch.targets.rows(), targets)
    assert targets[2, 0] == 3
    assert [len(p.images) for p in split(batch, 8)] == [1] * 5
    assert split(batch, 1) == [batch]


def test_several_ranks_end_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    run = SimpleNamespace(save_dir=tmp_path)
    message = r"the memory is full: .*smaller --batch-size or --imgsz; nothing was saved"
    with pytest.raises(UserError, match=message), explain_interruption(run):
        TrainingMicroBatches.run(SimpleNamespace(), SimpleNamespace(), one_pass=_fail, place="")


def _fail(batch):
    raise torch.OutOfMemoryError(FULL)
