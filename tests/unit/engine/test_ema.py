"""The moving average follows weights and buffers, stays float32 and comes back from a checkpoint."""

from __future__ import annotations

import torch
from torch import nn

from engine.training.ema import ModelEMA


def test_ema_averages_float_buffers_and_copies_integers():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    ema = ModelEMA(model, tau=1e-9, decay=0.5)
    start = ema.model[1].running_mean.clone()
    model[1].running_mean.fill_(4.0)
    model[1].num_batches_tracked.fill_(7)
    ema.update()
    assert torch.equal(ema.model[1].running_mean, start + (4 - start) / 2)
    assert ema.model[1].num_batches_tracked == 0
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())


def test_a_half_precision_model_has_a_float_average():
    model = nn.Linear(2, 2).half()
    ema = ModelEMA(model)
    ema.update()
    assert ema.model.weight.dtype is torch.float32


def test_ema_resumes_from_its_saved_state():
    model = nn.Linear(2, 2)
    ema = ModelEMA(model)
    for _ in range(5):
        with torch.no_grad():
            model.weight.add_(1)
        ema.update()
    state = {"weights": {k: v.clone() for k, v in ema.state_dict()["weights"].items()}, "updates": ema.updates}
    other = ModelEMA(model)
    other.load_state_dict(state)
    ema.update()
    other.update()
    assert other.updates == 6
    assert torch.equal(ema.model.weight, other.model.weight)


def test_skipped_step_leaves_the_ema_unchanged():
    model = nn.Linear(3, 2)
    ema, gated = ModelEMA(model, tau=1.0), ModelEMA(model, tau=1.0)
    with torch.no_grad():
        model.weight += 1
    before = ema.model.weight.clone()
    ema.update(torch.tensor(False))
    assert torch.equal(ema.model.weight, before)
    gated._blend_where(torch.tensor(False), gated._theirs, 0.3)  # what a GPU does
    assert torch.equal(gated.model.weight, before)
    gated._blend_where(torch.tensor(True), gated._theirs, 1 - ema.decay(2))
    ema.update(torch.tensor(True))
    assert torch.allclose(ema.model.weight, gated.model.weight, rtol=1e-6, atol=0)
    assert not torch.equal(ema.model.weight, before)
