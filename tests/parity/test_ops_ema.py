"""The moving average against the published one."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from engine.training.ema import ModelEMA
from tests.golden import assert_close, find


def test_decay_and_average_equal_the_published_ones():
    golden = find("ops", "ema")
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(golden.tensor("initial"))
    ema = ModelEMA(model)

    decays = [ema.decay(int(u)) for u in golden.arrays["updates"]]
    np.testing.assert_allclose(decays, golden.arrays["decay"], rtol=1e-9)

    for k, source in enumerate(golden.tensor("source")):
        with torch.no_grad():
            model.weight.copy_(source)
        ema.update()
        assert_close(ema.model.weight, golden.arrays["ema"][k], 1e-6, f"average after update {k + 1}")
