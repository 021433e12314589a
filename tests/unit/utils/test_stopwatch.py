"""A stage pays for its own work, and sides are rounded up to whole strides."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from utils import stopwatch
from utils.sizes import round_up_to_stride
from utils.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    time = SimpleNamespace(now=0.0)
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: time.now)
    return time


def test_stages_are_summed_in_the_order_of_their_first_run(clock):
    watch = Stopwatch(torch.device("cpu"), ("model", "saving"))
    for seconds in (1.0, 3.0):
        with watch.stage("reading"):
            clock.now += seconds
        with watch.stage("model"):
            clock.now += 2 * seconds
    assert watch.seconds == {"model": 8.0, "saving": 0.0, "reading": 4.0}
    assert list(watch.ms_per_item(4).items()) == [("model", 2000.0), ("saving", 0.0), ("reading", 1000.0)]
    assert Stopwatch(torch.device("cpu"), ("model",)).ms_per_item(0) == {"model": 0.0}


def test_only_producing_items_is_timed(clock):
    def batches():
        for i in range(3):
            clock.now += 1.0
            yield i
        clock.now += 5.0  # the end of the iterator is no item

    watch, seen = Stopwatch(torch.device("cpu")), []
    for item in watch.draw(batches(), "reading"):
        clock.now += 10.0
        seen.append(item)
    assert (seen, watch.seconds) == ([0, 1, 2], {"reading": 3.0})


def test_gpu_is_synchronised_at_start_and_end(clock, monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    device = torch.device("cuda", 0)
    with Stopwatch(device).stage("model"):
        assert waits == [device]
    assert waits == [device, device]


def test_a_stage_that_fails_is_not_counted(clock):
    watch = Stopwatch(torch.device("cpu"))
    with pytest.raises(ValueError, match="x"), watch.stage("model"):
        raise ValueError("x")
    assert watch.seconds == {}


@pytest.mark.parametrize(("px", "expected"), [(0, 32), (1, 32), (32, 32), (33, 64), (639.5, 640), (640, 640)])
def test_sides_are_rounded_up_to_whole_strides(px, expected):
    assert round_up_to_stride(px, 32) == expected
