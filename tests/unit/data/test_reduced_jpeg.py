"""Large JPEG files are decoded at a reduced scale in training, the same with and without a cache, and whole in validation."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image

from data.images.jpeg import jpeg_size, reduced_flag
from data.images.reading import is_image, read_image
from data.images.store import ImageStore
from utils.files import read_bounded


def photograph(h, w):
    """A smooth colour image."""
    coarse = np.random.default_rng(0).integers(0, 255, (6, 8, 3)).astype(np.uint8)
    return cv2.resize(coarse, (w, h), interpolation=cv2.INTER_CUBIC)


@pytest.fixture
def path(tmp_path):
    def written(h, w, *, name="a.jpg", **options):
        Image.fromarray(photograph(h, w)).save(tmp_path / name, quality=95, **options)
        return tmp_path / name

    return written


@pytest.mark.parametrize(
    ("hw", "least_side", "expected"),
    [
        ((480, 640), 320, (240, 320)), ((480, 641), 321, (240, 321)), ((479, 639), 321, (479, 639)), ((640, 479), 160, (160, 120)),
        ((480, 640), 80, (60, 80)), ((480, 640), 10, (60, 80)), ((480, 640), 0, (480, 640)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_the_scale_is_the_smallest_that_leaves_enough(path, hw, least_side, expected, channels):
    image = read_image(path(*hw), channels=channels, least_side=least_side)
    assert image.shape == (*expected, channels)
    whole = read_image(path(*hw), channels=channels)
    shrunk = cv2.resize(whole, expected[::-1], interpolation=cv2.INTER_AREA).reshape(image.shape)
    assert np.abs(shrunk.astype(int) - image).mean() < 2


@pytest.mark.parametrize("progressive", [False, True])
def test_the_size_stands_in_the_header(path, progressive):
    data = np.frombuffer(read_bounded(path(37, 53, progressive=progressive, comment=b"x" * 300), limit=10**6), np.uint8)
    assert jpeg_size(data) == (37, 53)
    for end in (0, 1, 2, 3, 20, 60):
        assert jpeg_size(data[:end]) is None
    assert jpeg_size(np.r_[data[:2], np.zeros(5000, np.uint8)]) is None
    assert jpeg_size(np.r_[data[:2], np.full(5000, 255, np.uint8)]) is None


def test_a_reduced_image_is_turned_as_its_file_says(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = path(240, 320, name="turned.jpg", exif=exif)
    small, whole = read_image(turned, least_side=160), read_image(turned)
    assert small.shape == (160, 120, 3)
    assert np.abs(cv2.resize(whole, (120, 160), interpolation=cv2.INTER_AREA).astype(int) - small).mean() < 2


def test_other_formats_and_damaged_files_are_decoded_as_ever(path, tmp_path):
    assert read_image(path(64, 96, name="a.png"), least_side=24).shape == (64, 96, 3)
    assert reduced_flag(np.frombuffer(b"GIF89a", np.uint8), 1) == 0


@pytest.mark.parametrize("hw", [(480, 640), (640, 431)])
def test_training_reads_the_same_image_with_and_without_a_cache(path, hw):
    name = str(path(*hw))
    plain, ram, disk = (ImageStore((name,), imgsz=160) for _ in range(3))
    assert not ram.keep_in_ram(progress=False)
    assert not disk.keep_on_disk(progress=False)
    assert max(plain.get(0).shape) == 160
    np.testing.assert_array_equal(plain.get(0), ram.get(0))
    np.testing.assert_array_equal(plain.get(0), disk.get(0))
    (cache,) = (p for p in path(*hw).parent.iterdir() if p.suffix == ".npy")
    assert not is_image(cache)


def test_validation_decodes_files_whole(path):
    name = str(path(480, 640))
    shrunk = cv2.resize(read_image(name), (160, 120), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(ImageStore((name,), imgsz=160, smooth=True).get(0), shrunk)
