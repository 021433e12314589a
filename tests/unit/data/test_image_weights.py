"""Images of rare and badly found classes are drawn more often, the same on all processes, and look different each time."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from data.sampler import EpochSampler, SamplerOptions, draw, image_weights
from utils.errors import UserError


def table(*images):
    """Labels of images that hold objects of these classes."""
    classes = np.array([c for image in images for c in image], dtype=np.int64)
    return SimpleNamespace(classes=classes, starts=np.cumsum([0, *map(len, images)]))


def sampler(weights, **options):
    made = EpochSampler(len(weights), SamplerOptions(**{"batch_size": 4, "hw": (64, 64), "shuffle": True, "seed": 1, **options}))
    made.weights = np.array(weights)
    return made


def keys(made, epoch=0):
    made.epoch = epoch
    return [key for batch in made for key in batch]


def test_weights_match_hand_computed_ones():
    # class 0: 4 objects, (1 - 0.5)² / 4 = 1/16; class 1: 1 object, 1; class 2 is not there
    weights = image_weights(table([0, 0, 0], [0, 1], []), [0.5, 0.0, 0.9])
    total = 3 / 16 + 17 / 16
    np.testing.assert_allclose(weights, [3 / 16 / total, 17 / 16 / total, 0.0])


def test_classes_that_were_not_measured_count_as_the_mean():
    labels = table([0], [1])
    np.testing.assert_allclose(image_weights(labels, [0.2, np.nan]), image_weights(labels, [0.2, 0.2]))
    np.testing.assert_allclose(image_weights(labels, [np.nan, np.nan]), [0.5, 0.5])
    np.testing.assert_allclose(image_weights(labels, [1.0, 1.0]), [0.5, 0.5])


def test_data_set_without_objects_is_refused():
    with pytest.raises(UserError, match="no training image has an object"):
        image_weights(table([], []), [0.0])


def test_draw_frequencies_match_weights_and_repeats_are_numbered():
    weights = np.array([0.5, 0.3, 0.2, 0.0])
    drawn = np.concatenate([draw(weights, np.random.default_rng(i)) % 4 for i in range(2000)])
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / len(drawn), weights, atol=0.02)
    codes = draw(np.full(50, 0.02), np.random.default_rng(0))
    assert len(set(codes.tolist())) == 50  # no two look the same
    for image, times in Counter((codes % 50).tolist()).items():
        assert sorted((codes[codes % 50 == image] // 50).tolist()) == list(range(times))


def test_draws_depend_on_seed_and_epoch_only():
    weights = [0.1] * 10
    whole = keys(sampler(weights))
    assert whole == keys(sampler(weights))
    assert whole != keys(sampler(weights), epoch=1)
    assert whole != keys(sampler(weights, seed=2))
    later = sampler(weights)
    later.start_batch = 1
    assert keys(later) == whole[4:]


def test_ranks_share_one_draw():
    weights = [0.05] * 20
    whole = sampler(weights, batch_size=4)
    batches = list(whole)
    parts = [list(sampler(weights, batch_size=4, world_size=2, rank=rank)) for rank in (0, 1)]
    for batch, first, second in zip(batches, *parts, strict=True):
        assert {(k.index, k.repeat) for k in batch} == {(k.index, k.repeat) for k in (*first, *second)}
