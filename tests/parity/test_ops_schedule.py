"""Schedules against learning rate, momentum and accumulation of the published loops, for every epoch and iteration."""

from __future__ import annotations

import numpy as np
import pytest

from engine.training.schedule import Schedule
from tests.golden import find
from utils.config import Hyperparameters

# case -> (hyper-parameters, column of the biases in the published order)
FAMILIES = {
    "lr_schedule_v9": (Hyperparameters(), 0),
    "lr_schedule_v7": (Hyperparameters(lrf=0.1, warmup_min_iters=1000, lr_reaches_lrf=1), 2),
    "lr_schedule_ultralytics": (Hyperparameters(warmup_min_iters=0), 0),
}
KINDS = {"linear": "linear", "cos": "cosine", "flat_cos": "flat-cosine", "fixed": "fixed"}
PUBLISHED = [
    *(("lr_schedule_v9", kind) for kind in KINDS),
    *((case, kind) for case in ("lr_schedule_v7", "lr_schedule_ultralytics") for kind in ("linear", "cos")),
]


@pytest.mark.parametrize(("case", "kind"), PUBLISHED)
def test_every_iteration_equals_the_published_schedule(case, kind):
    golden = find("ops", case)
    hyp, bias = FAMILIES[case]
    epochs, iterations = golden.arrays[f"{kind}_momentum"].shape
    schedule = Schedule(hyp, KINDS[kind], epochs=epochs, iterations=iterations, batch_size=golden.meta["args"]["batch"])

    mine = np.array([[schedule.at(e, i) for i in range(iterations)] for e in range(epochs)])  # (epochs, iterations, 4)

    lr = golden.arrays[f"{kind}_lr"]
    others = [g for g in range(lr.shape[2]) if g != bias]
    np.testing.assert_allclose(mine[..., 0], lr[..., bias], rtol=1e-9, atol=1e-12)
    for group in others:
        np.testing.assert_allclose(mine[..., 1], lr[..., group], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(mine[..., 2], golden.arrays[f"{kind}_momentum"], rtol=1e-9)
    np.testing.assert_array_equal(mine[..., 3], golden.arrays[f"{kind}_accumulate"])
