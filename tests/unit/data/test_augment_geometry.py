"""Polygons and keypoints stay on their pixels through every step of augmentation: drawn into the image, augmented, and found again."""

import types

import cv2
import numpy as np
import pytest

from data.augment.affine import random_transform, warp_image, warp_instances
from data.augment.copy_paste import copy_paste
from data.augment.flips import flip
from data.augment.letterbox import letterbox
from data.augment.mixup import mixup
from data.augment.mosaic import mosaic_scene, render_view, resize_tiles, single_scene, warp_canvas
from utils.instances import Instances, concatenate

KEYS = "hsv_h hsv_s hsv_v degrees translate scale shear perspective flipud fliplr mosaic mixup copy_paste"
SWAP = (1, 0)  # the two keypoints are a left and a right one
LEFT, RIGHT = 1, 2  # channels that they are drawn in; the polygon is drawn in channel 0
BRIGHT, DOT_PX = 180, 3


def hyp(**changes):
    return types.SimpleNamespace(**{**dict.fromkeys(KEYS.split(), 0.0), **changes})


def rng(seed=0):
    return np.random.default_rng(seed)


def drawn(h, w, seed=0, *, x_max=None):
    """A black image with one polygon and its two keypoints on it, and the object."""
    r = rng(seed)
    reach = x_max or w
    centre = r.uniform((0.35 * reach, 0.35 * h), (0.65 * reach, 0.65 * h))
    angles = np.arange(6) * (np.pi / 3) + r.uniform(0, 0.7, 6)
    polygon = centre + 0.3 * min(h, reach) * np.stack((np.cos(angles), np.sin(angles)), 1)
    polygon = cv2.convexHull(polygon.astype(np.float32))[:, 0]
    keypoints = centre + np.array(((-0.12, -0.05), (0.12, 0.08))) * min(h, reach)
    image = np.zeros((h, w, 3), np.uint8)
    image[:, :, 0] = raster(polygon, (h, w)) * 255
    for channel, (x, y) in zip((LEFT, RIGHT), keypoints):
        plane = np.zeros((h, w), np.uint8)
        cv2.rectangle(plane, (round(x) - DOT_PX, round(y) - DOT_PX), (round(x) + DOT_PX - 1, round(y) + DOT_PX - 1), 255, -1)
        image[:, :, channel] = plane
    keypoints = np.concatenate((np.round(keypoints), np.full((2, 1), 2)), 1)[None].astype(np.float32)
    box = np.concatenate((polygon.min(0), polygon.max(0)))[None].astype(np.float32)
    return image, Instances(np.zeros(1, np.float32), box, polygon.astype(np.float32), np.array([len(polygon)]), keypoints)


def raster(polygon, hw):
    """(H, W) uint8 mask of a polygon whose coordinates count from pixel corners."""
    mask = np.zeros(hw, np.uint8)
    cv2.fillPoly(mask, [np.round((polygon - 0.5) * 256).astype(np.int32)], 1, shift=8)
    return mask


def blank(h, w):
    return np.zeros((h, w, 3), np.uint8), Instances.empty()


def assert_on_pixels(image, instances, *, tolerance_px=1.5):
    """Every visible keypoint on its dot, no dot where none is visible, and polygons where their pixels are."""
    hw = image.shape[:2]
    expected = np.zeros(hw, bool)
    for polygon in instances.polygons():
        expected |= raster(polygon, hw) > 0
    found = image[:, :, 0] > BRIGHT
    overlap, union = (expected & found).sum(), (expected | found).sum()
    assert union == 0 or overlap / union > 0.9 or union - overlap < 40, (overlap, union)
    for number, channel in enumerate((LEFT, RIGHT)):
        dots = image[:, :, channel] > BRIGHT
        for x, y, visibility in instances.keypoints[:, number]:
            if visibility:
                ys, xs = np.nonzero(dots[max(int(y) - 9, 0) : int(y) + 9, max(int(x) - 9, 0) : int(x) + 9])
                assert len(xs), f"no dot at ({x}, {y})"
                at = np.array((xs.mean() + 0.5 + max(int(x) - 9, 0), ys.mean() + 0.5 + max(int(y) - 9, 0)))
                near_border = min(x, y, hw[1] - x, hw[0] - y) < 2 * DOT_PX
                assert np.abs(at - (x, y)).max() < (tolerance_px + DOT_PX if near_border else tolerance_px)
            else:
                assert not dots[max(int(y), 0) : int(y) + 1, max(int(x), 0) : int(x) + 1].any()
        if not (instances.keypoints[:, number, 2] > 0).any():
            assert dots.sum() < (2 * DOT_PX) ** 2 * 2  # at most the rest of a dot whose middle is outside


@pytest.mark.parametrize("changes", [{"flipud": 1.0}, {"fliplr": 1.0}, {"flipud": 1.0, "fliplr": 1.0}, {}])
def test_flips_move_all_fields(changes):
    image, instances = drawn(60, 90)
    turned, after = flip(image, instances, hyp(**changes), rng(), flip_idx=SWAP)
    if len(changes) == 1:  # in a mirror image what was left is right: its dot is the other channel's
        turned = turned[:, :, [0, RIGHT, LEFT]]
    assert_on_pixels(turned, after)
    assert after.counts.tolist() == instances.counts.tolist()


def test_a_flip_without_flip_idx_keeps_the_order_of_keypoints():
    image, instances = drawn(60, 90)
    assert_on_pixels(*flip(image, instances, hyp(fliplr=1.0), rng()))


@pytest.mark.parametrize("changes", [{"scale": 0.4}, {"degrees": 90}, {"shear": 20}, {"perspective": 0.001}, {"translate": 0.9}])
def test_warp_moves_all_fields(changes):
    image, instances = drawn(120, 160, 3)
    hidden = 0
    for seed in range(15):
        transform = random_transform((120, 160), (140, 150), hyp(**changes), rng(seed))
        after = warp_instances(instances, transform.matrix, (140, 150))
        assert_on_pixels(warp_image(image, transform.matrix, (140, 150)), after)
        hidden += int((after.keypoints[..., 2] == 0).sum())
    assert hidden > 3 if "translate" in changes else hidden < 10


@pytest.mark.parametrize("changes", [{"scale": 0.4, "translate": 0.2}, {"scale": 0.3, "translate": 0.1, "degrees": 15, "shear": 4}])
def test_mosaic_and_single_view_move_all_fields(changes):
    seen = 0
    for seed in range(25):
        scenes = [single_scene(*drawn(90, 120, seed), (128, 128))]
        scenes += [mosaic_scene([blank(128, 100), blank(90, 128), blank(128, 128), drawn(100, 128, seed)], 128, rng(seed))]
        for scene in scenes:
            image, after = render_view(scene, (128, 128), hyp(**changes), rng(seed))
            if len(after):
                seen += 1
                assert_on_pixels(image, after, tolerance_px=2.0)
    assert seen > 30


def test_keypoints_beyond_the_canvas_of_a_mosaic_are_not_visible():
    scene = mosaic_scene([drawn(128, 128, i) for i in range(4)], 128, rng(3))
    transform = random_transform(scene.hw, (128, 128), hyp(scale=0.0), rng(0))
    outside = [t.instances.keypoints[0, :, :2] + (t.x, t.y) for t in scene.tiles]
    beyond = np.array([((xy < 0) | (xy > 256)).any(1) for xy in outside])
    for place in (resize_tiles, lambda *given: warp_canvas(*given, 0.0, rng())):
        _, before, after = place(scene, transform, (128, 128))
        assert ((before.keypoints[..., 2] == 0) == beyond).all()
        assert (after.keypoints[..., 2][beyond] == 0).all()


def test_copy_paste_moves_all_fields():
    image, instances = drawn(100, 200, 2, x_max=90)
    pasted, after = copy_paste(image, instances, 1.0, rng(), flip_idx=SWAP)
    assert len(after) == 2
    assert_on_pixels(pasted[:, :100], after.select(np.array([True, False])))
    mirrored = after.select(np.array([False, True])).shifted(-100, 0)
    assert_on_pixels(pasted[:, 100:, [0, RIGHT, LEFT]], mirrored)


def test_mixup_keeps_polygons_and_keypoints_of_both():
    first, second = drawn(80, 80, 1), drawn(80, 80, 2)
    _, both = mixup(first, second, rng())
    np.testing.assert_array_equal(both.keypoints, np.concatenate((first[1].keypoints, second[1].keypoints)))
    assert both.counts.tolist() == [*first[1].counts, *second[1].counts]
    _, one = mixup(first, blank(80, 80), rng())
    np.testing.assert_array_equal(one.keypoints, first[1].keypoints)


@pytest.mark.parametrize("hw", [(64, 128), (128, 64), (50, 200)])
def test_letterbox_moves_all_fields(hw):
    image, instances = drawn(90, 120, 4)
    fitted = letterbox(image, hw, auto=False)
    assert_on_pixels(fitted.image, instances.scaled(*fitted.scale_xy).shifted(*fitted.pad_xy))


def test_absent_keypoints_stay_absent():
    _, instances = drawn(40, 60)
    plain = instances.replace(keypoints=None)
    steps = (
        plain.select(np.array([True])), plain.shifted(1, 2), plain.scaled(2, 3), plain.mirrored(60, flip_idx=SWAP), plain.flipped(40),
        plain.cut((20, 20)), plain.clipped((20, 20)), concatenate([plain, plain]), Instances.empty(),
    )  # fmt: skip
    assert all(step.keypoints is None for step in steps)


def test_keypoints_of_only_some_objects_are_refused():
    _, instances = drawn(40, 60)
    with pytest.raises(ValueError, match="keypoints"):
        concatenate([instances, instances.replace(keypoints=None)])


def test_no_objects_keep_the_number_of_keypoints():
    none = drawn(40, 60)[1].select(np.array([False]))
    for step in (none.shifted(1, 2), none.mirrored(60, flip_idx=SWAP), none.flipped(40), none.clipped((9, 9)), concatenate([none, none])):
        assert step.keypoints.shape == (0, 2, 3)
    assert warp_instances(none, np.eye(3), (9, 9)).keypoints.shape == (0, 2, 3)


@pytest.mark.parametrize("name", ["mirrored", "flipped"])
def test_two_flips_cancel(name):
    _, instances = drawn(40, 60)
    twice = instances
    for _ in range(2):
        twice = getattr(twice, name)(60, **({"flip_idx": SWAP} if name == "mirrored" else {}))
    for field in ("boxes_xyxy", "points", "keypoints"):
        np.testing.assert_allclose(getattr(twice, field), getattr(instances, field), atol=1e-4)
