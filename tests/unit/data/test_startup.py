"""The bookkeeping of large data sets, at a small size: benchmarks/bench_startup.py measures it with ten thousand images."""

from __future__ import annotations

import sys

import pytest

from benchmarks import bench_startup


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return bench_startup.make_images(tmp_path_factory.mktemp("many"), 1000)


def test_cached_labels_load_fast(world):
    assert bench_startup.startup_rates(world).cached > 3000  # images a processor second


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_of_workers_is_flat_over_epochs(world):
    first, second, third = bench_startup.worker_memory(world, epochs=3, workers=1)
    assert first > 0
    assert third - second < 4 * 2**20, (first, second, third)
