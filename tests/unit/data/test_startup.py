"""The bookkeeping of large data sets, at a small size: benchmarks/bench_startup.py measures it with ten thousand images."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from benchmarks import bench_startup
from data.dataset_spec import load_dataset_spec
from data.labels.files import list_images
from data.labels.source import split_labels


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return bench_startup.make_images(tmp_path_factory.mktemp("many"), 1000)


def test_cached_labels_are_read_from_one_file(world, monkeypatch):
    """Without a look into label files and images, so that a start takes seconds for any number of them."""
    spec = load_dataset_spec(world)
    files = list_images(spec.sources("train"))
    first, _ = split_labels(spec, "train", files, workers=1, progress=False)
    reads: list[str] = []
    for module in ("data.labels.yolo.read_image_labels", "data.labels.source.read_labels"):
        monkeypatch.setattr(module, lambda *given, **more: reads.append(str(given)))
    cached, _ = split_labels(spec, "train", files, workers=1, progress=False)
    assert reads == []
    assert len(cached) == 1000
    assert np.array_equal(first.boxes_cxcywh, cached.boxes_cxcywh)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_of_workers_is_flat_over_epochs(world):
    first, second, third = bench_startup.worker_memory(world, epochs=3, workers=1)
    assert first > 0
    assert third - second < 4 * 2**20, (first, second, third)
