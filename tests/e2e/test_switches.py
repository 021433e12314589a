"""Switches that change memory and speed leave the training as it is: recomputed activations, accumulation, bfloat16, compilation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine.doctor.checkup import noise_batch
from engine.logging.progress import LossMeter
from engine.training.initial_weights import FrozenLayers
from engine.training.run import Run
from engine.training.setup.build import build_run
from engine.training.setup.config import resolve_config
from models.checkpoints.checkpoint import load_checkpoint
from tasks import DETECT
from tests.e2e.test_train import ROOT, Interrupt, rows_of
from tests.tiny_training import HYP, config, make_world
from train import TrainResult, train, train_one_epoch
from utils.config import TrainConfig
from utils.errors import UserError
from utils.precision import autocast
from utils.types import Batch, Targets, to_unit_range


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def weights_of(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_checkpoint(result.last_weights).weights


def assert_equal_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert list(a) == list(b)
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def test_recomputed_activations_give_an_identical_run(world, tmp_path, capsys):
    given = {"cfg": world / "noisy-v9.yaml", "plugins": world / "noisy.py", "multi_scale": True, "amp": "bf16", "attention": "CBAM@3"}
    plain = weights_of(train(config(world, tmp_path, **given)))
    capsys.readouterr()
    again = train(config(world, tmp_path, checkpoint_activations="all", **given))
    assert "memory    activations of 5 modules are computed again in the backward pass" in capsys.readouterr().out
    assert_equal_weights(weights_of(again), plain)
    with pytest.raises(KeyboardInterrupt):
        train(config(world, tmp_path / "cut", **given), callbacks=[Interrupt(1, 1)])
    last = tmp_path / "cut" / "exp" / "weights" / "last.pt"  # a run that needs less memory goes on where the other ended
    resumed = train(TrainConfig(resume=last, plugins=world / "noisy.py", checkpoint_activations="attention"))
    assert_equal_weights(weights_of(resumed), plain)


@pytest.mark.slow
def test_recomputed_activations_work_with_two_ranks(world, tmp_path):
    flags = ["--imgsz", "64", "--batch", "4", "--epochs", "2", "--workers", "0", "--device", "cpu", "--noplots", "--attention", "CBAM@3"]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "train.py"), *flags]
    given = ["--cfg", str(world / "tiny-v9.yaml"), "--data", str(world / "data.yaml"), "--project", str(tmp_path)]
    weights = []
    for scope in ("off", "attention", "all"):
        scoped = [*run, *given, "--name", scope, "--checkpoint-activations", scope]
        done = subprocess.run(scoped, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        weights.append(load_checkpoint(tmp_path / scope / "weights" / "last.pt").weights)
    assert_equal_weights(weights[1], weights[0])
    assert_equal_weights(weights[2], weights[0])


def test_checkpoint_activations_without_attention_is_refused_early(world, tmp_path):
    with pytest.raises(UserError, match="has no attention; give --checkpoint-activations all"):
        train(config(world, tmp_path, checkpoint_activations="attention"))
    assert not list(tmp_path.iterdir())


class Fixed(list):
    """Batches that are the same in every epoch."""

    def set_epoch(self, *args, **options) -> None:
        pass


class MeanSquare(nn.Module):
    """A loss that is a mean over images, and has no normaliser of a batch's objects."""

    names = ("square",)

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """The same in all epochs."""

    def forward(self, output, batch: Batch) -> dict[str, Tensor]:
        maps = torch.cat([part.flatten(1) for part in output.main], dim=1)
        return {"square": (maps - batch.images.float().mean((1, 2, 3))[:, None] / 100).square().mean()}


def prepared(world: Path, folder: Path, batches: list[Batch], *, accumulate: int, own_loss: bool) -> Run:
    """A run over these batches, without warm-up and with the batch statistics that the network began with."""
    given = config(world, folder, batch_size=len(batches[0].images), accumulate=accumulate, hyp=HYP.replace(warmup_epochs=0), nosave=True)
    torch.manual_seed(0)
    run = build_run(*resolve_config(given), torch.device("cpu"))
    run.loaders.train = Fixed(batches)
    run.state.frozen = FrozenLayers(rows=tuple(range(len(run.state.model.model))))
    if not own_loss:
        run.state.loss, run.step.guard.parts, run.meter = MeanSquare(), MeanSquare.names, LossMeter(MeanSquare.names)
        run.step.micro_batches.loss = run.state.loss
    return run


def halves(world: Path, *, alike: bool) -> tuple[list[Batch], list[Batch]]:
    """Four batches of 8 images, and the same images in batches of 4."""
    model = nn.Module()
    model.ch, model.nc, model.task = 3, 2, DETECT
    whole, parts = [], []
    for i in range(4):
        batch = noise_batch(model, 64, 64)
        images = (batch.images.float() * (i + 1) / 4).to(torch.uint8)
        targets = joined(batch.targets, batch.targets, 2)
        first = batch._replace(images=torch.cat([images, images.flip(3)]), targets=targets, paths=("a",) * 4)
        second = first if alike else first._replace(images=255 - first.images)
        both = torch.cat([first.images, second.images])
        whole.append(first._replace(images=both, targets=joined(first.targets, second.targets, 4), paths=("a",) * 8))
        parts += [first, second]
    return whole, parts


def joined(first: Targets, second: Targets, images: int) -> Targets:
    """Targets of two batches as of one, the first of which has so many images."""
    return Targets.cat([first, second.replace(image=second.image + images)])


@pytest.mark.parametrize(("own_loss", "alike"), [(True, True), (False, False)], ids=["own loss", "mean over images"])
def test_batch_4_accumulated_twice_equals_batch_8(world, tmp_path, own_loss, alike):
    whole, parts = halves(world, alike=alike)
    runs = [
        prepared(world, tmp_path / name, batches, accumulate=n, own_loss=own_loss)
        for name, batches, n in (("8", whole, 1), ("4", parts, 2))
    ]
    start = [p.detach().clone() for p in runs[0].state.model.parameters()]
    for run in runs:
        for epoch in range(2):
            run.end_epoch(train_one_epoch(run, epoch))
    assert [run.state.ema.updates for run in runs] == [8, 8]
    assert max(float((p - q).detach().abs().max()) for p, q in zip(runs[0].state.model.parameters(), start)) > 1e-3
    for (name, p), q in zip(runs[0].state.model.named_parameters(), runs[1].state.model.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_last_step_of_an_epoch_uses_the_remaining_gradients(world, tmp_path):
    parts = halves(world, alike=True)[1][:5]
    run, steps = prepared(world, tmp_path, parts, accumulate=2, own_loss=True), []
    optimizer = run.state.optimizer
    take = optimizer.step
    optimizer.step = lambda: (steps.append(optimizer.param_groups[0]["params"][0].grad.clone()), take())
    for epoch in range(2):
        run.end_epoch(train_one_epoch(run, epoch))
        assert all(p.grad is None for p in run.state.model.parameters())
    assert len(steps) == run.state.ema.updates == 2 * 3


CALM = HYP.replace(
    warmup_epochs=0, nbs=4, mosaic=0, mixup=0, copy_paste=0, hsv_h=0, hsv_s=0, hsv_v=0, translate=0, scale=0, fliplr=0, lr0=0.01, lrf=0.1
)  # fmt: skip


def first_losses(world: Path, folder: Path, precision: torch.dtype | None) -> list[float]:
    """Of the same batches on the same weights, which do not change."""
    torch.manual_seed(0)
    run = build_run(*resolve_config(config(world, folder, hyp=CALM, attention="BRA@3")), torch.device("cpu"))
    run.loaders.train.set_epoch(0)
    run.state.set_training_mode()
    sums = []
    for batch in run.loaders.train:
        with autocast(run.device, precision):
            output = run.state.network(to_unit_range(batch.images))
        sums.append(sum(part.item() for part in run.state.loss(output, batch).values()))
    return sums


def test_bfloat16_on_a_cpu_trains_close_to_float32(world, tmp_path):
    full, half = (first_losses(world, tmp_path, precision) for precision in (None, torch.bfloat16))
    assert half == pytest.approx(full, rel=0.03)
    assert half != full
    result = train(config(world, tmp_path, hyp=CALM, attention="BRA@3", amp="bf16", optimizer="AdamW", epochs=40, noval=True, nosave=True))
    first, last = (sum(float(row[k]) for k in row if k.startswith("train/")) for row in (rows_of(result)[0], rows_of(result)[-1]))
    assert last < first / 2
    assert result.best.map50 > 0.9  # best.pt in float32
    assert result.last.map50 == pytest.approx(result.best.map50, abs=0.05)  # the same weights in bfloat16, as in every epoch
    assert result.last.map == pytest.approx(result.best.map, abs=0.1)


def test_batch_size_search_recomputes_activations(world, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("engine.training.batch_size.search", lambda measure_peak, **limits: (measure_peak(2), 4)[1])
    plain = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: (seen.append(self), plain(self, x))[1])
    counts = []
    for scope in ("off", "all"):
        seen.clear()
        build_run(*resolve_config(config(world, tmp_path, batch_size=-1, checkpoint_activations=scope)), torch.device("cpu"))
        counts.append(len(seen))
    assert counts[1] > counts[0]
