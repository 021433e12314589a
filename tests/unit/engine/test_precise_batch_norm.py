"""Precise batch norm: running statistics of the averaged weights are the mean over training batches, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from engine import precise_batch_norm
from engine.precise_batch_norm import FirstBatches, measure
from models.checkpoints.checkpoint import load_checkpoint
from tests.fake_cuda import GPU, fake_cuda
from tests.tiny_training import config, make_world
from train import train
from utils import distributed
from utils.config import TrainConfig
from utils.types import Batch, Letterbox, Targets

CPU = torch.device("cpu")


def batch(seed: int, *, images_of_step: int | None = None) -> Batch:
    images = torch.randint(0, 255, (3, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    place = Letterbox(torch.tensor([[8, 8]] * 3), torch.ones(3, 2), torch.zeros(3, 2))
    return Batch(images, Targets.empty(), ("a", "b", "c"), place, 0, step_images=images_of_step)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.03), nn.SiLU(), nn.Dropout(0.5), nn.BatchNorm2d(4))
    return made.eval()


def test_statistics_are_the_mean_over_the_batches() -> None:
    model, batches = network(), [batch(i) for i in range(5)]
    maps = [model[0](b.images / 255) for b in batches]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    model[1].running_mean.fill_(7)
    model[1].num_batches_tracked.fill_(9)
    measure(model, [*batches, batch(9, images_of_step=0)], device=CPU)
    torch.testing.assert_close(model[1].running_mean, torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0))
    assert model[1].num_batches_tracked == 9
    assert model[1].momentum == 0.03
    assert not any(m.training for m in model.modules())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_measuring_waits_for_nothing_on_a_gpu_and_counts_calls_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that is called twice in a forward pass averages all its calls."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.norm(x) * 2 + 1)

    on_cpu, on_gpu, batches = Twice().eval(), Twice().eval(), [batch(i) for i in range(3)]
    measure(on_cpu, batches, device=CPU)
    first = torch.stack([b.images.div(255).mean((0, 2, 3)) for b in batches]).mean(0)
    torch.testing.assert_close(on_cpu.norm.running_mean, (first + 1) / 2)
    with fake_cuda(monkeypatch) as seen:
        on_gpu = on_gpu.to(GPU)
        measure(on_gpu, batches, device=GPU)
        assert not seen.syncs
        assert not seen.copies
        assert torch.equal(on_gpu.norm.running_mean.cpu(), on_cpu.norm.running_mean)
    assert not on_gpu.norm._forward_pre_hooks


def test_the_network_reads_the_images_in_its_precision() -> None:
    model, seen = network(), []
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    measure(model, [batch(0)], device=CPU, precision=torch.bfloat16)
    assert seen == [torch.bfloat16]


def test_frozen_layers_keep_theirs_and_so_do_all_without_batches_or_with_non_finite_ones() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.named_buffers()}
    measure(model, [batch(0)], device=CPU, frozen=[model[1]])
    assert torch.equal(model[1].running_mean, before["1.running_mean"])
    assert not torch.equal(model[4].running_mean, before["4.running_mean"])
    model = network()
    measure(model, [], device=CPU)
    with torch.no_grad():
        model[0].weight[0] = torch.nan
    measure(model, [batch(0)], device=CPU)
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]), name


def test_ranks_get_the_mean_of_all_their_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """This rank has one batch and the other two; layer by layer, as the other one's sums come by all_reduce."""
    alone = [network() for _ in range(3)]
    for i, model in enumerate(alone):
        measure(model[:2], [batch(i)], device=CPU)
    others = [2.0, *(sum(getattr(model[1], name) for model in alone[1:]) for name in ("running_mean", "running_var"))]
    theirs = iter(others)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda value: value + next(theirs))
    model = network()
    measure(model[:2], [batch(0)], device=CPU)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(model[1], name), torch.stack([getattr(m[1], name) for m in alone]).mean(0))


def test_the_first_batches_of_an_epoch_are_kept_where_none_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    made, kept = [batch(i) for i in range(4)], FirstBatches(2)
    for _ in range(2):  # epochs
        for index, one in enumerate(made):
            kept.see(index, one)
        assert [id(one) for one in kept.take(4)] == [id(one) for one in made[:2]]
    assert kept.take(4) == []
    kept.see(0, made[0])
    assert kept.take(1) == [made[0]]
    for index in (1, 2, 3):  # resumed after the first
        kept.see(index, made[index])
    assert kept.take(4) == []
    monkeypatch.setattr(precise_batch_norm, "MAX_KEPT_BYTES", 3 * 3 * 8 * 8)  # one batch
    for index, one in enumerate(made):
        kept.see(index, one)
    assert kept.take(4) == []


def last(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "weights" / "last.pt").weights


def test_a_run_is_repeatable_and_resumes_exactly_and_trains_on_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path / "world")
    seen: dict[str, list[tuple[str, ...]]] = {}

    def run(name: str, **flags: object) -> SimpleNamespace:
        from engine.logging.callbacks import Callback

        class Recorder(Callback):
            def on_batch(self, run: object, epoch: int, iteration: int, batch: Batch) -> None:
                seen.setdefault(name, []).append((*batch.paths, str(int(batch.images.sum()))))
                if name == "stopped" and (epoch, iteration) == (1, 0):
                    raise KeyboardInterrupt

        plugins = (str(world / "noisy.py"),)
        if "resume" in flags:
            return train(TrainConfig(plugins=plugins, **flags), callbacks=[Recorder()])
        flags = {"cfg": world / "noisy-v9.yaml", "plugins": plugins, "epochs": 2, **flags}
        return train(config(world, tmp_path, name=name, **flags), callbacks=[Recorder()])

    plain, first, again = run("plain", precise_bn=0), run("first", precise_bn=2), run("again", precise_bn=2)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", precise_bn=2)
    run("resumed", resume=str(tmp_path / "stopped/weights/last.pt"))
    assert seen["plain"] == seen["first"] == seen["again"]
    exact, usual = last(first.save_dir), last(plain.save_dir)
    for folder in (again.save_dir, tmp_path / "stopped"):
        other = last(folder)
        assert all(torch.equal(value, other[name]) for name, value in exact.items())
    parameters = {name for name in exact if not name.endswith(("running_mean", "running_var"))}
    assert all(torch.equal(exact[name], usual[name]) for name in parameters)
    assert any(not torch.equal(exact[name], usual[name]) for name in exact.keys() - parameters)
