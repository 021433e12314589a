"""Every image mode, and images that are none."""

import cv2
import numpy as np
import pytest
from PIL import Image

from data.images.reading import ImageError, probe_image, read_image

H, W = 24, 40


@pytest.fixture
def rgb():
    y, x = np.mgrid[:H, :W]
    return np.stack((x * 6, y * 10, 255 - x * 6), 2).astype(np.uint8)


def near(a, b, tolerance=12):
    assert a.shape == b.shape
    assert np.abs(a.astype(int) - b.astype(int)).mean() < tolerance


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.jpg", "a.webp", "a.ppm", "Bläschen über 画像 (1).jpg"])
def test_formats_and_unicode_paths(tmp_path, rgb, name):
    Image.fromarray(rgb).save(tmp_path / name, quality=95)
    assert probe_image(tmp_path / name) == (H, W)
    image = read_image(tmp_path / name)
    assert image.dtype == np.uint8
    assert image.flags["C_CONTIGUOUS"]
    near(image, rgb)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16", "I", "F"])
def test_modes_become_rgb(tmp_path, rgb, mode):
    grey = np.asarray(Image.fromarray(rgb).convert("L"))
    expected = rgb
    if mode == "I;16":
        opened, expected = Image.fromarray(grey.astype(np.uint16) * 257), np.repeat(grey[:, :, None], 3, 2)
    elif mode == "I":
        opened, expected = Image.fromarray(grey.astype(np.int32) * 257), np.repeat(grey[:, :, None], 3, 2)
    elif mode == "F":
        opened, expected = Image.fromarray(grey.astype(np.float32) / 255), np.repeat(grey[:, :, None], 3, 2)
    else:
        opened = Image.fromarray(rgb).convert(mode)
        expected = np.asarray(opened.convert("RGB"))
    name = {"CMYK": "a.jpg", "I": "a.tif", "F": "a.tif"}.get(mode, "a.png")
    opened.save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.dtype == np.uint8
    near(image, expected)
    assert probe_image(tmp_path / name) == (H, W)


def test_sixteen_bit_colour_tiff(tmp_path, rgb):
    cv2.imwrite(str(tmp_path / "a.tif"), rgb[:, :, ::-1].astype(np.uint16) * 257)
    near(read_image(tmp_path / "a.tif"), rgb, 1)
    deep = read_image(tmp_path / "a.tif", dtype=np.uint16)
    assert deep.dtype == np.uint16
    near(deep, rgb.astype(np.uint16) * 257, 1)
    assert probe_image(tmp_path / "a.tif") == (H, W)


def test_images_are_read_with_the_requested_channels(tmp_path, rgb):
    Image.fromarray(rgb).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", channels=1).shape == (H, W, 1)
    with pytest.raises(ImageError, match="3 channels, 4 are expected"):
        read_image(tmp_path / "a.png", channels=4)
    Image.fromarray(rgb).convert("RGBA").save(tmp_path / "b.png")
    near(read_image(tmp_path / "b.png", channels=4)[:, :, :3], rgb, 1)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation(tmp_path, rgb, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(rgb).save(path, exif=exif, quality=95)
    assert probe_image(path) == (W, H)
    near(read_image(path), np.rot90(rgb, -1))


def broken(tmp_path, kind, rgb):
    path = tmp_path / "bad.jpg"
    if kind == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:1200])
    elif kind == "text":
        path.write_text("this is no image\n")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "small":
        Image.fromarray(rgb[:5, :5]).save(path)
    elif kind == "truncated png":
        path = tmp_path / "bad.png"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:1200])
    return path


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("truncated", "cut short"),
        ("truncated png", "bad.png"),
        ("text", "not an image"),
        ("empty", "empty"),
        ("small", "5x5 px"),
        ("missing", "no such file"),
    ],
)
def test_bad_images_are_named(tmp_path, rgb, kind, said):
    path = broken(tmp_path, kind, rgb)
    with pytest.raises(ImageError) as error:
        probe_image(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["text", "empty", "missing"])
def test_reading_a_bad_image_raises_image_error(tmp_path, rgb, kind):
    with pytest.raises(ImageError, match=r"bad\.jpg"):
        read_image(broken(tmp_path, kind, rgb))


def test_trailing_bytes_of_a_jpeg_are_ignored(tmp_path, rgb):
    path = tmp_path / "a.jpg"
    Image.fromarray(rgb).save(path)
    path.write_bytes(path.read_bytes() + b"\0" * 20)
    assert probe_image(path) == (H, W)
