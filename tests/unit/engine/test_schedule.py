"""Schedules beyond the published vectors: ends, no warm-up, accumulation."""

from __future__ import annotations

import pytest

from engine.training.schedule import Schedule
from utils.config import Hyperparameters
from utils.errors import UserError


def schedule(kind="linear", *, epochs=10, iterations=20, batch_size=16, accumulate=None, **hyp):
    return Schedule(Hyperparameters(**hyp), kind, epochs=epochs, iterations=iterations, batch_size=batch_size, accumulate=accumulate)


def test_no_warmup_starts_at_lr0():
    first = schedule(warmup_epochs=0).at(0, 0)
    assert first == (0.01, 0.01, 0.937, 4)


@pytest.mark.parametrize(("minimum", "expected"), [(100, 100), (1000, 200), (0, 60)])
def test_warmup_lasts_at_least_the_minimum_and_at_most_the_training(minimum, expected):
    assert schedule(warmup_min_iters=minimum).warmup_iterations == expected


def test_without_minimum_warmup_leaves_the_last_epoch():
    assert schedule(warmup_min_iters=0, epochs=3).warmup_iterations == 40
    assert schedule(warmup_min_iters=0, epochs=1).warmup_iterations == 0


@pytest.mark.parametrize("kind", ["linear", "cosine", "flat-cosine", "fixed"])
@pytest.mark.parametrize("epochs", [1, 2, 7])
def test_factors_stay_between_start_and_final_value(kind, epochs):
    factors = [schedule(kind, epochs=epochs).factor(e) for e in range(epochs)]
    assert factors[0] == 1.0
    assert all(0.01 - 1e-12 <= f <= 1.0 for f in factors)
    assert factors == sorted(factors, reverse=True)


def test_accumulation_follows_the_nominal_batch():
    assert schedule().effective_batch == 64
    assert schedule(batch_size=48).full_accumulate == 1
    assert schedule(batch_size=256).at(9, 0).accumulate == 1
    assert schedule(accumulate=3, warmup_epochs=0).at(0, 0).accumulate == 3


def test_unknown_schedule_is_refused():
    with pytest.raises(UserError, match="one of linear, cosine"):
        schedule("step")
