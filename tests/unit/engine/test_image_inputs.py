"""Images that are handed over from memory: the same pixels as from their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.inference.inputs import as_array

RAMP = (np.arange(40 * 50).reshape(40, 50) * 32).astype(np.uint16)  # up to 63968, most of it above 255


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_pillow_image_of_16_bits_is_read_as_its_file_and_its_array(channels, suffix, tmp_path):
    path = tmp_path / f"deep{suffix}"
    Image.fromarray(RAMP).save(path)
    with Image.open(path) as opened:
        assert opened.mode.startswith("I;16")
        found = as_array(opened, channels)
    assert found.dtype == np.uint16
    assert np.array_equal(found, np.repeat(RAMP[:, :, None], channels, axis=2))
    assert np.array_equal(found, as_array(path, channels))


def test_byte_order_of_a_pillow_image_does_not_matter():
    swapped = Image.frombytes("I;16B", (50, 40), RAMP.astype(">u2").tobytes())
    assert np.array_equal(as_array(swapped, 1)[:, :, 0], RAMP)


@pytest.mark.parametrize(("mode", "values"), [("I", RAMP.astype(np.int32)), ("F", RAMP.astype(np.float32) / 65535)])
def test_wider_pillow_images_keep_their_range(mode, values, tmp_path):
    image = Image.fromarray(values)
    assert image.mode == mode
    assert np.abs(as_array(image, 3).astype(np.int64) - RAMP[:, :, None]).max() <= 1
    image.save(tmp_path / "wide.tif")
    assert np.array_equal(as_array(image, 3), as_array(Path(tmp_path / "wide.tif"), 3))


def test_palette_and_transparency_are_resolved():
    rgb = np.zeros((8, 8, 3), np.uint8)
    rgb[:, 4:] = (200, 30, 60)
    palette = Image.fromarray(rgb).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(as_array(palette, 3), rgb)
    assert np.array_equal(as_array(Image.fromarray(rgb).convert("RGBA"), 3), rgb)
