"""Workers live through all epochs, and what an epoch is reaches them exactly."""

from __future__ import annotations

import types
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from data.dataset_spec import load_dataset_spec
from data.loader import LoaderOptions, build_loader

KEYS = "hsv_h hsv_s hsv_v degrees translate scale shear perspective flipud fliplr mosaic mixup copy_paste"
HYP = types.SimpleNamespace(**{**dict.fromkeys(KEYS.split(), 0.0), "mosaic": 1.0, "mixup": 0.3, "scale": 0.5, "hsv_v": 0.4, "fliplr": 0.5})


@pytest.fixture(scope="module")
def yaml_path(tmp_path_factory):
    root = tmp_path_factory.mktemp("persistent")
    for kind in ("images", "labels"):
        (root / kind).mkdir()
    for i in range(18):
        Image.fromarray(np.full((24, 32, 3), 10 * i, np.uint8)).save(root / f"images/{i:02d}.png")
        (root / f"labels/{i:02d}.txt").write_text(f"{i % 2} 0.5 0.5 0.5 0.5")
    (root / "set.yaml").write_text("train: images\nval: images\nnames: [a, b]\n")
    return root / "set.yaml"


def loader(yaml_path, workers):
    options = LoaderOptions(imgsz=32, batch_size=4, hyp=HYP, augment=True, workers=workers, mosaic_until=3)
    return build_loader(load_dataset_spec(yaml_path), "train", options)


def assert_same(expected, got):
    for a, b in zip(expected, got, strict=True):
        assert a.paths == b.paths
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets.rows(), b.targets.rows())


def test_epoch_first_batch_class_weights_and_end_of_mosaic_reach_living_workers(yaml_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    run = loader(yaml_path, 2)
    started = set()
    epochs = [(0, 0, None), (1, 2, None), (1, 0, (0.9, 0.1)), (2, 1, (0.0, 0.8)), (3, 0, None), (0, 0, None)]
    for epoch, start_batch, class_ap in epochs:
        fresh = loader(yaml_path, 0)
        for one in (run, fresh):
            one.set_epoch(epoch, start_batch, class_ap=class_ap)
        assert_same(list(fresh), list(run))
        started |= {worker.pid for worker in run._loader._iterator._workers}
    assert len(started) == 2


def test_an_epoch_that_was_left_leaves_no_batch_behind(yaml_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    run, fresh = loader(yaml_path, 2), loader(yaml_path, 0)
    assert len(list(islice(run, 2))) == 2
    for one in (run, fresh):
        one.set_epoch(1, 1)
    assert_same(list(fresh), list(run))
