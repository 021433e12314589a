"""--batch-size -1: the search, and a run that uses what it found."""

from __future__ import annotations

import mmap

import pytest
import torch

from data.augment.on_device import finished
from engine.training import batch_size
from engine.training.batch_size import PeakMeter, make_trial, search
from engine.training.multi_scale import longest_side, rescale
from models import build_model
from models.checkpoints.checkpoint import load_checkpoint
from tests.fake_cuda import GPU, fake_cuda
from tests.tiny_training import config, make_world
from train import train
from utils.config import Hyperparameters
from utils.errors import UserError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


class Memory:
    """Bytes of a step: some, and so many an image; full above a limit."""

    def __init__(self, base: int, per_image: int, *, full: int = 10**12) -> None:
        self.base, self.per_image, self.full, self.tried = base, per_image, full, []

    def __call__(self, images: int) -> int | None:
        self.tried.append(images)
        taken = self.base + self.per_image * images
        return None if taken > self.full else taken


@pytest.mark.parametrize(("base", "per_image"), [(0, 10), (500, 10), (100, 7), (0, 999), (999, 1), (0, 501)])
def test_search_finds_the_largest_batch_that_fits(base, per_image):
    memory = Memory(base, per_image)
    assert search(memory, budget=1000, most=10_000) == (1000 - base) // per_image
    assert memory.tried[-1] == max((1000 - base) // per_image, 1) or memory(memory.tried[-1]) > 1000
    assert len(memory.tried) < 20


def test_search_returns_zero_if_no_batch_fits():
    assert search(Memory(2000, 1), budget=1000, most=100) == 0


def test_batch_never_exceeds_the_number_of_images():
    memory = Memory(0, 1)
    assert search(memory, budget=10**9, most=37) == 37
    assert max(memory.tried) == 37


def test_search_survives_out_of_memory_below_the_budget():
    memory = Memory(0, 10, full=600)
    found = search(memory, budget=1000, most=1000)
    assert 40 <= found <= 60
    assert memory.tried.count(found) == 1


def test_search_corrects_a_superlinear_memory_curve():
    assert 25 <= search(lambda n: n * n, budget=1000, most=1000) <= 31


def test_batch_size_minus_one_trains_as_the_found_size(world, tmp_path, capsys, monkeypatch):
    result = train(config(world, tmp_path, batch_size=-1, epochs=1))
    printed = capsys.readouterr()
    assert "--batch-size -1: 12, as many as there are images" in printed.out
    assert "warning: 1 batch(es) an epoch of 12 images" in printed.err
    saved = load_checkpoint(result.last_weights)
    assert saved.config["batch_size"] == 12
    plain = train(config(world, tmp_path, batch_size=12, epochs=1, name="plain"))  # the search leaves no trace
    weights = load_checkpoint(plain.last_weights).weights
    assert all(torch.equal(value, weights[name]) for name, value in saved.weights.items())

    monkeypatch.setattr(batch_size, "free_bytes", lambda device: 2)
    monkeypatch.setattr(PeakMeter, "peak_bytes", lambda self: 100)
    with pytest.raises(UserError, match=r"--batch-size -1: not even one image of 64 px fits into 0.00 GiB; lower --imgsz"):
        train(config(world, tmp_path, batch_size=-1, epochs=1, name="none"))


def test_peak_meter_counts_freed_memory():
    meter = PeakMeter(torch.device("cpu"))
    meter.begin()
    with mmap.mmap(-1, 2**26) as pages:  # new ones whatever the allocator still holds
        pages.write(bytes(2**25))
    assert 2**25 - 2**20 < meter.peak_bytes() < 2**28


def test_longest_side_is_the_largest_multi_scale_side():
    sides = {rescale(torch.zeros(1, 1, 64, 64), base_px=64, stride=8, key=(k,)).shape[-1] for k in range(200)}
    assert max(sides) == longest_side(64, stride=8) == 96


def test_a_trial_runs_the_network_in_the_precision_of_the_training(world, tmp_path):
    seen = []
    model = build_model(world / "tiny-v9.yaml", nc=2)
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))  # of the trial's copy too
    make_trial(model, config(world, tmp_path, amp="bf16", optimizer="SGD"), Hyperparameters(), torch.device("cpu"))(1)
    assert seen == [torch.bfloat16] * 2


def test_a_trial_on_a_gpu_colours_and_backs_up_the_buffers_as_a_training_does(world, tmp_path, monkeypatch):
    """The number of copies of the buffers that a step makes, and what is left to do to its images."""
    left, copies = [], []
    monkeypatch.setattr(batch_size, "finished", lambda batch: left.append(batch.finish) or finished(batch))
    for owner in (batch_size.NonFiniteGuard, batch_size.TrainingMicroBatches):
        made = owner.__init__
        monkeypatch.setattr(
            owner, "__init__", lambda self, *args, _made=made, **options: copies.append(type(self)) or _made(self, *args, **options)
        )
    for name in ("begin", "peak_bytes"):
        monkeypatch.setattr(PeakMeter, name, lambda self: 1)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    monkeypatch.setattr(batch_size, "release_memory", lambda _: None)
    with fake_cuda(monkeypatch):
        model = build_model(world / "tiny-v9.yaml", nc=2).to(GPU)
        assert make_trial(model, config(world, tmp_path, amp="off", optimizer="SGD"), Hyperparameters(), GPU)(2) == 1
    assert [finish.tables.shape for finish in left] == [(2, 3, 256)] * 2
    assert copies == [batch_size.NonFiniteGuard, batch_size.TrainingMicroBatches]
