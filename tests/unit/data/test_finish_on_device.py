"""Colour and flips on the device: the images of the workers to a grey level, without a wait."""

from __future__ import annotations

import types
from itertools import pairwise

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from data.augment.colour import coloured, level_tables
from data.augment.on_device import finished, recoloured
from data.dataset_spec import load_dataset_spec
from data.loader import LoaderOptions, build_loader
from engine.micro_batches import split
from tests.fake_cuda import GPU, fake_cuda
from utils.types import to_unit_range

KEYS = "hsv_h hsv_s hsv_v degrees translate scale shear perspective flipud fliplr mosaic mixup copy_paste"
OFF = dict.fromkeys(KEYS.split(), 0.0)
HYP = types.SimpleNamespace(**{**OFF, "hsv_h": 0.2, "hsv_s": 0.7, "hsv_v": 0.4, "flipud": 0.5, "fliplr": 0.5, "mosaic": 0.7, "scale": 0.5})


def all_colours(step: int) -> np.ndarray:
    """An image (·, 256, 3) of every ``step``-th red with every ``step``-th green and every blue."""
    red, green, blue = np.meshgrid(np.arange(0, 256, step), np.arange(0, 256, step), np.arange(256), indexing="ij")
    return np.stack((red, green, blue), -1).reshape(-1, 256, 3).astype(np.uint8)


def as_batch(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image)[None].permute(0, 3, 1, 2)


@pytest.mark.parametrize("factors", [(1.0, 1.0, 1.0), (1.015, 0.4, 1.3), (0.985, 1.7, 0.6), (1.5, 1.0, 0.2)])
def test_colours_equal_those_of_opencv_to_a_grey_level(factors):
    image, factors = all_colours(7), np.array(factors)
    expected = coloured(image, factors)
    got = recoloured(as_batch(image), torch.from_numpy(level_tables(factors))[None])[0].permute(1, 2, 0).numpy()
    difference = np.abs(expected.astype(int) - got)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.5
    assert got.dtype == np.uint8


def test_hue_saturation_and_value_are_exactly_those_of_opencv():
    from data.augment.on_device import _rgb_to_hsv

    image = all_colours(5)
    got = torch.stack(_rgb_to_hsv(as_batch(image)), dim=-1)[0].numpy()
    np.testing.assert_array_equal(got, cv2.cvtColor(image, cv2.COLOR_RGB2HSV))


def test_levels_are_replaced_as_the_table_says():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    levels = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    for factors in (*rng.uniform(0.3, 1.7, (30, 3)), np.ones(3), np.full(3, 0.5)):
        tables = level_tables(factors)
        changed = np.stack([tables[i][levels[:, :, i]] for i in range(3)], axis=-1)
        np.testing.assert_array_equal(coloured(image, factors), cv2.cvtColor(changed, cv2.COLOR_HSV2RGB))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("finish")
    for kind in ("images", "labels", "grey"):
        (root / kind).mkdir()
    rng = np.random.default_rng(0)
    for i in range(9):
        pixels = cv2.resize(rng.integers(0, 255, (6, 8, 3)).astype(np.uint8), (64, 48), interpolation=cv2.INTER_CUBIC)
        Image.fromarray(pixels).save(root / f"images/{i}.png")
        (root / f"labels/{i}.txt").write_text("0 0.3 0.6 0.3 0.5")
    (root / "set.yaml").write_text("train: images\nval: images\nnames: [a]\n")
    (root / "grey.yaml").write_text("train: images\nval: images\nch: 1\nnames: [a]\n")
    return root


def batches(root, *, name="set.yaml", **options):
    arguments = {"imgsz": 64, "batch_size": 4, "hyp": HYP, "augment": True, "workers": 0, **options}
    return list(build_loader(load_dataset_spec(root / name), "train", LoaderOptions(**arguments)))


def assert_equal_to_a_grey_level(expected, got):
    for whole, batch in zip(expected, got, strict=True):
        assert batch.finish is None
        assert whole.paths == batch.paths
        assert torch.equal(whole.targets.rows(), batch.targets.rows())
        assert (whole.images.int() - batch.images.int()).abs().max() <= 1
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_finished_later_equal_those_of_the_workers(root, workers):
    left = batches(root, finish_on_device=True, workers=workers)
    assert all(batch.finish is not None for batch in left)
    assert_equal_to_a_grey_level(batches(root), [finished(batch) for batch in left])
    assert any((batch.images.int() - whole.images.int()).abs().max() > 20 for batch, whole in zip(left, batches(root)))


def test_micro_batches_are_finished_alike(root):
    for batch in batches(root, finish_on_device=True):
        parts = [finished(part).images for part in split(batch, 2)]
        assert torch.equal(torch.cat(parts), finished(batch).images)


def test_flips_alone_are_left_to_the_device_too(root):
    hyp = types.SimpleNamespace(**{**OFF, "flipud": 0.5, "fliplr": 0.5})
    left = batches(root, hyp=hyp, finish_on_device=True)
    assert all(batch.finish.tables is None for batch in left)
    for whole, batch in zip(batches(root, hyp=hyp), left):
        assert torch.equal(whole.images, finished(batch).images)


@pytest.mark.parametrize("options", [{"name": "grey.yaml"}, {"augment": False}])
def test_other_images_come_finished(root, options):
    for whole, batch in zip(batches(root, **options), batches(root, finish_on_device=True, **options)):
        assert batch.finish is None
        assert torch.equal(whole.images, batch.images)


def test_nothing_waits_for_the_device_and_no_python_number_is_copied(root):
    expected, left = batches(root), batches(root, finish_on_device=True)
    with pytest.MonkeyPatch.context() as patch, fake_cuda(patch) as seen:
        got = [finished(batch.to(GPU)) for batch in left]
        inputs = [to_unit_range(batch.images, torch.float16) for batch in got]
        assert not seen.syncs
        assert not seen.copies
        assert not seen.nondeterministic
        assert all(x.device == GPU for x in inputs)
        assert_equal_to_a_grey_level(expected, [b._replace(images=b.images.cpu(), targets=b.targets.cpu()) for b in got])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_numbers_of_the_cpu():
    image, factors = all_colours(5), np.array((1.015, 1.4, 0.8))
    tables = torch.from_numpy(level_tables(factors))[None]
    on_cpu, on_gpu = recoloured(as_batch(image), tables), recoloured(as_batch(image).cuda(), tables.cuda()).cpu()
    assert (on_cpu.int() - on_gpu.int()).abs().max() <= 1


def test_factors_near_a_level_boundary_are_cut_as_the_table_cuts_them():
    """0.7 * 10 is a little below 7 in floats of 64 bits, so the table says 6 or 7; the image must agree."""
    image = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2).repeat(4, axis=0)
    for low, high in pairwise(np.linspace(0.5, 1.5, 41)):
        for factor in (low, np.nextafter(low, high), np.nextafter(low, 0)):
            tables = level_tables(np.array((1.0, 1.0, factor)))
            np.testing.assert_array_equal(coloured(image, np.array((1.0, 1.0, factor)))[0, :, 0], tables[2])
