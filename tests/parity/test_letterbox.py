"""Letterbox against the published one: same shape, same pixels but for rounding, same geometry."""

import numpy as np
import pytest

from data.augment.letterbox import letterbox
from tests.golden import find

GOLDEN = find("ops", "letterbox")
CASES = GOLDEN.meta["args"]["cases"]


# The kept file leaves out one case that changes nothing, for its size.
@pytest.mark.parametrize("i", [i for i in range(len(CASES)) if f"in_{i}" in GOLDEN.arrays])
def test_letterbox_equals_the_published_one(i):
    options = dict(CASES[i])
    shape = options.pop("new_shape")
    if "scaleFill" in options:
        options["scale_fill"] = options.pop("scaleFill")
    if "color" in options:
        options["color"] = tuple(options["color"])
    source = GOLDEN.arrays[f"in_{i}"]
    boxed = letterbox(source, shape if isinstance(shape, int) else tuple(shape), **options)
    expected = GOLDEN.arrays[f"out_{i}"]
    assert boxed.image.shape == expected.shape
    assert np.abs(boxed.image.astype(int) - expected.astype(int)).max() <= 1
    ratio_w, ratio_h, pad_x, pad_y = GOLDEN.arrays[f"ratio_pad_{i}"]
    # The published numbers are before rounding to whole pixels; ours are what was done to the image.
    h, w = source.shape[:2]
    assert abs(boxed.scale_xy[0] - ratio_w) * w <= 0.5
    assert abs(boxed.scale_xy[1] - ratio_h) * h <= 0.5
    assert boxed.pad_xy == (round(pad_x - 0.1), round(pad_y - 0.1))
