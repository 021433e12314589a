"""Partners of mosaics: of the same window of the epoch's order, decoded once, other ones in every epoch, the same for any division."""

from __future__ import annotations

import types
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data.dataset import draw_partners
from data.dataset_spec import load_dataset_spec
from data.loader import LoaderOptions, build_loader, is_small
from data.sampler import WINDOW, EpochSampler, SamplerOptions, windows_of

KEYS = "hsv_h hsv_s hsv_v degrees translate scale shear perspective flipud fliplr mosaic mixup copy_paste"
HYP = types.SimpleNamespace(**{**dict.fromkeys(KEYS.split(), 0.0), "mosaic": 1.0, "mixup": 0.2, "scale": 0.5})
COUNT = 4 * WINDOW


@pytest.fixture(scope="module")
def yaml_path(tmp_path_factory):
    root = tmp_path_factory.mktemp("partners")
    for kind in ("images", "labels"):
        (root / kind).mkdir()
    for i in range(COUNT):
        Image.fromarray(np.full((24, 32, 3), 3 * i, np.uint8)).save(root / f"images/{i:02d}.png")
        (root / f"labels/{i:02d}.txt").write_text("0 0.5 0.5 0.5 0.5")
    (root / "set.yaml").write_text("train: images\nval: images\nnames: [a]\n")
    return root / "set.yaml"


@pytest.fixture
def large():
    """As if no worker could keep the whole set."""
    with pytest.MonkeyPatch.context() as patch:  # a test undoes its own
        patch.setattr("data.loader.is_small", lambda count, *, image_bytes: False)
        yield


def loader(yaml_path, **options):
    arguments = {"imgsz": 32, "batch_size": 16, "hyp": HYP, "augment": True, "workers": 0, **options}
    return build_loader(load_dataset_spec(yaml_path), "train", LoaderOptions(**arguments))


def decodes(run, monkeypatch):
    """How often each image of an epoch is decoded when the cache holds one window and no more."""
    store, seen = run.dataset.store, Counter()
    store.recent_limit = WINDOW * 32 * 32 * 3
    decode = store.decode
    monkeypatch.setattr(store, "decode", lambda i: seen.update((i,)) or decode(i))
    assert sum(len(batch.paths) for batch in run)
    return seen


@pytest.mark.parametrize("batch_size", [4, 16, 32])
def test_one_decode_serves_a_sample(yaml_path, large, monkeypatch, batch_size):
    seen = decodes(loader(yaml_path, batch_size=batch_size), monkeypatch)
    assert seen == Counter(range(COUNT))


def test_every_rank_decodes_its_share_once(yaml_path, large, monkeypatch):
    shares = [decodes(loader(yaml_path, batch_size=32, rank=rank, world_size=2), monkeypatch) for rank in (0, 1)]
    assert shares[0] + shares[1] == Counter(range(COUNT))


def test_every_worker_decodes_its_batches_once(yaml_path, large, monkeypatch):
    for worker in (0, 1):
        run = loader(yaml_path)
        batches = list(run.sampler)[worker::2]  # as torch's loader hands them out
        monkeypatch.setattr(run.sampler.__class__, "__iter__", lambda _, kept=batches: iter(kept))
        seen = decodes(run, monkeypatch)
        monkeypatch.undo()
        assert seen == Counter(key.index for keys in batches for key in keys)


def keys_of(epoch=0, *, count=100, **options):
    sampler = EpochSampler(count, SamplerOptions(**{"batch_size": 8, "hw": (32, 32), "shuffle": True, **options}))
    sampler.epoch = epoch
    return [key for batch in sampler for key in batch]


def test_windows_cover_the_order_and_none_is_short():
    for count in (1, 3, WINDOW, 2 * WINDOW - 1, 2 * WINDOW, 5 * WINDOW + 3):
        windows = windows_of(np.arange(count))
        assert [i for window in windows for i in window] == list(range(count))
        assert min(map(len, windows)) >= min(count, WINDOW)
        assert max(map(len, windows)) < 2 * WINDOW


@pytest.mark.parametrize(
    "options", [{"batch_size": 5}, {"batch_size": 64}, {"world_size": 3, "rank": 1}, {"world_size": 2, "rank": 1, "whole_batches": True}]
)
def test_windows_do_not_depend_on_how_the_epoch_is_divided(options):
    whole = {key.index: key.window for key in keys_of()}
    assert all(index in window for index, window in whole.items())
    assert all(key.window == whole[key.index] for key in keys_of(**options))


def test_every_image_meets_every_other_in_time():
    met = [Counter() for _ in range(100)]
    for epoch in range(120):
        for key in keys_of(epoch):
            met[key.index].update(draw_partners(key.window, key.index, 3, np.random.default_rng((epoch, key.index))))
    for index, partners in enumerate(met):
        assert index not in partners
        assert len(partners) > 90  # of 99; with equal chances 97 are expected
        assert max(partners.values()) < 16  # 3.6 are expected
    views = sum(met, Counter())
    assert max(views.values()) < 1.4 * min(views.values())


def test_partners_are_others_as_far_as_there_are_any():
    rng = np.random.default_rng(0)
    assert sorted(draw_partners((1, 2, 3, 4), 2, 3, rng)) == [1, 3, 4]
    assert set(draw_partners((1, 2), 2, 3, rng)) == {1}
    assert draw_partners((2,), 2, 3, rng) == [2, 2, 2]
    assert draw_partners((), 2, 1, rng) == [2]


def test_partners_follow_the_weights_of_images():
    sampler = EpochSampler(40, SamplerOptions(batch_size=8, hw=(32, 32), shuffle=True))
    sampler.weights = np.r_[np.zeros(20), np.full(20, 0.05)]
    keys = [key for batch in sampler for key in batch]
    assert {i for key in keys for i in key.window} == {key.index for key in keys}
    assert min(key.index for key in keys) >= 20


def test_without_mosaic_no_window_travels_to_the_workers():
    assert {key.window for key in keys_of(3, mosaic_until=3)} == {()}


def test_images_of_a_small_set_are_combined_freely(yaml_path):
    run = loader(yaml_path)
    keys = [key for keys in run.sampler for key in keys]
    assert all(sorted(key.window) == list(range(COUNT)) for key in keys)
    assert run.dataset.store.recent_limit >= COUNT * 32 * 32 * 3


@pytest.mark.parametrize(("count", "side", "small"), [(218, 640, True), (219, 640, False), (873, 320, True), (3000, 640, False)])
def test_a_small_set_fits_in_the_cache_of_a_worker(count, side, small):
    assert is_small(count, image_bytes=3 * side**2) is small
