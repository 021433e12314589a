"""The kernels that a network is trained with change nothing that it computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from engine.memory_format import prefer_onednn
from engine.training.ema import ModelEMA
from engine.training.setup.network import wrap_network
from models import build_model
from utils.config import Hyperparameters, TrainConfig


def as_seen_by_torch(monkeypatch, *, threads: int, processor: str) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)


def dilations(model: nn.Module) -> set[tuple[int, ...]]:
    return {tuple(m.dilation) for m in model.modules() if type(m) is nn.Conv2d and m.kernel_size == (1, 1)}


@pytest.mark.parametrize("cfg", ["yolov8n.yaml", "gelan-t.yaml"])
def test_maps_and_gradients_are_those_of_the_network(cfg, monkeypatch) -> None:
    torch.manual_seed(0)
    plain = build_model(cfg, nc=2).double().train()
    changed = copy.deepcopy(plain)
    as_seen_by_torch(monkeypatch, threads=1, processor="AVX512")
    prefer_onednn(changed)
    assert dilations(changed) == {(2, 2)}
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    for model in (plain, changed):
        sum(m.square().mean() for m in model(images).main).backward()
    for expected, got in zip(plain(images).main, changed(images).main, strict=True):
        torch.testing.assert_close(got, expected)
    for expected, got in zip(plain.parameters(), changed.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-6, atol=1e-9)


def test_only_the_network_that_is_trained_is_changed(monkeypatch) -> None:
    as_seen_by_torch(monkeypatch, threads=1, processor="AVX512")
    model = build_model("yolov8n.yaml", nc=2)
    ema = ModelEMA(model)
    assert wrap_network(model, TrainConfig(), model.head.build_loss(Hyperparameters())) is model
    assert dilations(model) == {(2, 2)}
    assert dilations(ema.model) == dilations(ema.model.deploy()) == {(1, 1)}


@pytest.mark.parametrize(("threads", "processor"), [(1, "AVX2"), (2, "AVX512")])
def test_several_threads_and_other_processors_stay_as_they_are(monkeypatch, threads, processor) -> None:
    as_seen_by_torch(monkeypatch, threads=threads, processor=processor)
    network = build_model("yolov8n.yaml", nc=2)
    prefer_onednn(network)
    assert dilations(network) == {(1, 1)}
