"""Augmentation: labels stay on their pixels, sources stay untouched, empty is ordinary."""

import types

import numpy as np
import pytest

from data.augment.affine import random_transform, still_visible, warp_image, warp_instances
from data.augment.colour import hsv
from data.augment.copy_paste import copy_paste
from data.augment.flips import flip
from data.augment.letterbox import letterbox
from data.augment.mixup import mixup
from data.augment.mosaic import Scene, Tile, mosaic_scene, render_view, resize_tiles, single_scene, warp_canvas
from data.images.pixels import FILL
from utils.instances import Instances

KEYS = "hsv_h hsv_s hsv_v degrees translate scale shear perspective flipud fliplr mosaic mixup copy_paste"
OFF = dict.fromkeys(KEYS.split(), 0.0)


def hyp(**changes):
    return types.SimpleNamespace(**{**OFF, **changes})


def rng(seed=0):
    return np.random.default_rng(seed)


def objects(boxes, polygons=None):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    n = len(boxes)
    points = np.concatenate(polygons).astype(np.float32) if polygons else np.zeros((0, 2), np.float32)
    counts = np.array([len(p) for p in polygons]) if polygons else np.zeros(n, np.int64)
    return Instances(np.arange(n, dtype=np.float32), boxes, points, counts)


def marked(h, w, boxes, *, polygons=False):
    """A black image with a white filled rectangle for each box, and the objects."""
    image = np.zeros((h, w, 3), np.uint8)
    for x1, y1, x2, y2 in boxes:
        image[y1:y2, x1:x2] = 255
    corners = [np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)]) for x1, y1, x2, y2 in boxes]
    return image, objects(boxes, corners if polygons else None)


def extent(image):
    y, x = np.nonzero(image[:, :, 0] > 180)
    return np.array((x.min(), y.min(), x.max() + 1, y.max() + 1), np.float32)


def smooth(h, w, seed):
    """An image without sharp edges, so that two ways of resampling can be compared."""
    import cv2

    return cv2.resize(rng(seed).integers(0, 255, (6, 6, 3)).astype(np.uint8), (w, h), interpolation=cv2.INTER_CUBIC)


class TestLetterbox:
    @pytest.mark.parametrize("hw", [(30, 50), (50, 30), (64, 64), (100, 7), (1, 200)])
    @pytest.mark.parametrize("auto", [True, False])
    def test_recorded_geometry_matches_the_pixels(self, hw, auto):
        boxed = letterbox(np.full((*hw, 3), 200, np.uint8), (64, 96), auto=auto)
        h, w = boxed.image.shape[:2]
        assert (h % 32, w % 32) == (0, 0) if auto else (h, w) == (64, 96)
        inside = (boxed.image == 200).all(2)
        y, x = np.nonzero(inside)
        left, top = boxed.pad_xy
        assert (x.min(), y.min()) == (left, top)
        assert x.max() + 1 == round(hw[1] * boxed.scale_xy[0] + left)
        assert y.max() + 1 == round(hw[0] * boxed.scale_xy[1] + top)
        assert (boxed.image[~inside] == FILL).all()

    def test_one_channel_and_deep_images(self):
        boxed = letterbox(np.full((10, 20, 1), 60000, np.uint16), 40, auto=False)
        assert boxed.image.shape == (40, 40, 1)
        assert boxed.image.dtype == np.uint16
        assert boxed.image[20, 20, 0] == 60000


class TestTransform:
    def test_no_augmentation_gives_the_centre_of_the_canvas(self):
        transform = random_transform((200, 200), (100, 100), hyp(), rng())
        np.testing.assert_allclose(transform.matrix, [[1, 0, -50], [0, 1, -50], [0, 0, 1]], atol=1e-9)
        assert transform.is_axis_aligned

    def test_transform_parameters_stay_in_range(self):
        draws = [random_transform((80, 80), (40, 40), hyp(scale=0.5, translate=0.1), rng(i)) for i in range(300)]
        gains = np.array([d.gain for d in draws])
        assert 0.5 <= gains.min() < 0.55
        assert 1.45 < gains.max() <= 1.5
        middles = np.array([(d.matrix @ (40, 40, 1))[:2] for d in draws])
        assert 16 <= middles.min() < 16.5
        assert 23.5 < middles.max() <= 24

    @pytest.mark.parametrize("change", [{"degrees": 10}, {"shear": 5}, {"perspective": 0.001}])
    def test_rotation_shear_and_perspective_are_not_axis_aligned(self, change):
        assert not random_transform((80, 80), (40, 40), hyp(**change), rng()).is_axis_aligned

    def test_a_zoom_of_zero_is_never_drawn(self):
        assert min(random_transform((8, 8), (4, 4), hyp(scale=1.0), rng(i)).gain for i in range(50)) > 0

    @pytest.mark.parametrize("change", [{}, {"degrees": 90}, {"shear": 20}, {"perspective": 0.001}])
    def test_boxes_follow_their_pixels(self, change):
        image, instances = marked(120, 160, [(60, 40, 110, 90)], polygons=True)
        for seed in range(10):
            transform = random_transform((120, 160), (160, 160), hyp(scale=0.3, **change), rng(seed))
            warped = warp_image(image, transform.matrix, (160, 160))
            box = warp_instances(instances, transform.matrix, (160, 160)).boxes_xyxy[0]
            np.testing.assert_allclose(box, extent(np.where(warped == FILL, 0, warped)), atol=1.3)

    def test_a_polygon_gives_a_tighter_box_than_its_box_when_turned(self):
        matrix = np.array(((0.7071, 0.7071, 0), (-0.7071, 0.7071, 100), (0, 0, 1)))
        diamond = np.array([(50, 0), (100, 50), (50, 100), (0, 50)])
        tight = warp_instances(objects([(0, 0, 100, 100)], [diamond]), matrix, (400, 400)).boxes_xyxy[0]
        loose = warp_instances(objects([(0, 0, 100, 100)]), matrix, (400, 400)).boxes_xyxy[0]
        assert np.prod(tight[2:] - tight[:2]) < 0.6 * np.prod(loose[2:] - loose[:2])

    def test_boxes_and_polygons_mixed(self):
        mixed = Instances(
            np.zeros(2, np.float32), np.array([[0, 0, 9, 9], [10, 10, 20, 20]], np.float32),
            np.array([[10, 10], [20, 10], [15, 20]], np.float32), np.array([0, 3]),
        )  # fmt: skip
        moved = warp_instances(mixed, np.array(((1.0, 0, 5), (0, 1, 0), (0, 0, 1))), (50, 50))
        np.testing.assert_allclose(moved.boxes_xyxy, [[5, 0, 14, 9], [15, 10, 25, 20]], atol=1e-5)


def test_visibility_rules():
    before = np.array([[0, 0, 20, 20]] * 5, np.float32)
    after = np.array([[0, 0, 20, 20], [0, 0, 2, 20], [0, 0, 5, 5], [0, 0, 300, 2.5], [0, 0, 0, 0]], np.float32)
    assert still_visible(before, after).tolist() == [True, False, False, False, False]
    assert still_visible(before, after, min_area=0.01).tolist() == [True, False, True, False, False]
    assert still_visible(np.zeros((0, 4)), np.zeros((0, 4))).shape == (0,)


class TestMosaic:
    def images(self):
        sizes = ((48, 64), (64, 40), (64, 64), (30, 64))
        out = []
        for i, (h, w) in enumerate(sizes):
            image = smooth(h, w, i)
            out.append((image, objects([(5, 5, w - 9, h - 7), (0, 0, w, h)])))
        return out

    def test_corner_lies_in_the_middle_half(self):
        corners = np.array([(t.x, t.y) for i in range(300) for t in mosaic_scene(self.images(), 64, rng(i)).tiles[3:]])
        assert 32 <= corners.min() <= 34
        assert 93 <= corners.max() <= 96

    @pytest.mark.parametrize("seed", range(12))
    def test_tiles_resized_in_place_equal_the_warped_canvas(self, seed):
        scene = mosaic_scene(self.images(), 64, rng(seed))
        transform = random_transform(scene.hw, (64, 64), hyp(scale=0.6, translate=0.2), rng(seed))
        direct, before, after = resize_tiles(scene, transform, (64, 64))
        canvas, before2, after2 = warp_canvas(scene, transform, (64, 64), 0.0, rng())
        np.testing.assert_array_equal(before.boxes_xyxy, before2.boxes_xyxy)
        np.testing.assert_allclose(after.boxes_xyxy, after2.boxes_xyxy, atol=1.01)
        difference = np.abs(direct.astype(int) - canvas.astype(int)).max(2)
        assert np.median(difference) <= 12
        assert (difference > 60).mean() < 0.08  # tile borders may move by a pixel

    @pytest.mark.parametrize("change", [{}, {"degrees": 20, "shear": 5}])
    @pytest.mark.parametrize("polygons", [False, True])
    def test_objects_stay_on_their_pixels(self, change, polygons):
        seen = 0
        for seed in range(30):
            images = [marked(96, 128, [], polygons=polygons) for _ in range(3)]
            images.append(marked(96, 128, [(30, 20, 70, 60)], polygons=True) if change else marked(96, 128, [(30, 20, 70, 60)]))
            scene = mosaic_scene(images, 128, rng(seed))
            image, instances = render_view(scene, (128, 128), hyp(scale=0.4, translate=0.1, **change), rng(seed))
            if len(instances.classes):
                seen += 1
                np.testing.assert_allclose(instances.boxes_xyxy[0], extent(image), atol=1.3)
        assert seen > 10

    def test_the_box_of_a_whole_tile_falls_on_whole_pixels(self):
        for seed in range(20):
            image, instances = marked(37, 53, [(0, 0, 53, 37)])
            scene = single_scene(image, instances, (64, 64))
            transform = random_transform((64, 64), (64, 64), hyp(scale=0.4, translate=0.05), rng(seed))
            drawn, _, after = resize_tiles(scene, transform, (64, 64))
            np.testing.assert_allclose(after.boxes_xyxy[0], extent(drawn), atol=1e-3)

    def test_cached_images_are_not_modified(self):
        images = self.images()
        copies = [p[0].copy() for p in images]
        for seed in range(4):
            image, _ = render_view(mosaic_scene(images, 64, rng(seed)), (64, 64), hyp(), rng(seed))
            image[:] = 0
        for (image, _), copy in zip(images, copies):
            np.testing.assert_array_equal(image, copy)

    @pytest.mark.parametrize("change", [{}, {"degrees": 5}])
    def test_mosaic_of_grey_images_without_objects(self, change):
        images = [(np.zeros((64, 64, 1), np.uint8), Instances.empty())] * 4
        image, instances = render_view(mosaic_scene(images, 64, rng()), (64, 64), hyp(**change), rng())
        assert image.shape == (64, 64, 1)
        assert instances.boxes_xyxy.shape == (0, 4)

    def test_objects_outside_the_canvas_are_dropped(self):
        image, instances = marked(64, 64, [(0, 0, 20, 20), (40, 40, 60, 60)])
        scene = Scene((Tile(image, instances, -32, -32),), (64, 64))
        transform = random_transform((64, 64), (128, 128), hyp(), rng())
        drawn, _, after = resize_tiles(scene, transform, (128, 128))
        assert (after.boxes_xyxy[0, 2:] - after.boxes_xyxy[0, :2] == 0).all()
        np.testing.assert_allclose(after.boxes_xyxy[1], extent(drawn), atol=0.01)
        assert (drawn[:32] == FILL).all()

    def test_single_image_is_centred(self):
        image, instances = marked(32, 64, [(10, 10, 20, 20)])
        out, seen = render_view(single_scene(image, instances, (64, 64)), (64, 64), hyp(), rng())
        np.testing.assert_allclose(seen.boxes_xyxy, [[10, 26, 20, 36]])
        np.testing.assert_array_equal(out[16:48], image)


class TestColour:
    def test_zero_gain_changes_nothing(self):
        image = smooth(20, 20, 0)
        assert hsv(image, hyp(), rng()) is image

    def test_gains_change_a_copy_of_the_image(self):
        image = smooth(20, 20, 0)
        copy = image.copy()
        changed = hsv(image, hyp(hsv_h=0.015, hsv_s=0.7, hsv_v=0.4), rng())
        np.testing.assert_array_equal(image, copy)
        assert np.abs(changed.astype(int) - image).mean() > 3

    def test_value_scales_grey(self):
        grey = np.full((4, 4, 3), 100, np.uint8)
        levels = [int(hsv(grey, hyp(hsv_v=0.4), rng(i))[0, 0, 0]) for i in range(200)]
        assert 60 <= min(levels) < 65
        assert 135 < max(levels) <= 140

    def test_hue_wraps_around(self):
        import cv2

        colour = cv2.cvtColor(np.full((4, 4, 3), (170, 255, 255), np.uint8), cv2.COLOR_HSV2RGB)
        wrapped = 0
        for seed in range(20):
            factor = rng(seed).uniform(-1, 1, 3)[0] * 0.5 + 1
            hue = int(cv2.cvtColor(hsv(colour, hyp(hsv_h=0.5), rng(seed)), cv2.COLOR_RGB2HSV)[0, 0, 0])
            assert abs(hue - int(170 * factor % 180)) <= 1
            wrapped += 170 * factor >= 180
        assert wrapped > 3

    def test_16_bit_images_pass_unchanged(self):
        deep = np.full((4, 4, 3), 30000, np.uint16)
        assert hsv(deep, hyp(hsv_h=0.4, hsv_s=0.4), rng()) is deep


class TestFlip:
    @pytest.mark.parametrize("change", [{"flipud": 1.0}, {"fliplr": 1.0}, {"flipud": 1.0, "fliplr": 1.0}])
    def test_boxes_are_flipped_with_the_image(self, change):
        image, instances = marked(40, 60, [(5, 10, 20, 35)])
        turned, after = flip(image, instances, hyp(**change), rng())
        np.testing.assert_array_equal(after.boxes_xyxy[0], extent(turned))
        assert not np.array_equal(turned, image)

    def test_flip_probability_is_respected(self):
        image, instances = marked(40, 60, [(5, 10, 20, 30)])
        turned = sum(flip(image, instances, hyp(fliplr=0.5), rng(i))[1] is not instances for i in range(200))
        assert 70 < turned < 130


class TestCopyPaste:
    def test_pasted_copy_is_mirrored_with_its_label(self):
        image, instances = marked(100, 100, [(5, 10, 30, 40)], polygons=True)
        pasted, after = copy_paste(image, instances, 1.0, rng())
        np.testing.assert_array_equal(after.boxes_xyxy, [[5, 10, 30, 40], [70, 10, 95, 40]])
        assert (pasted[12:38, 72:93] == 255).all()
        assert not image[:, 50:].any()
        assert after.counts.tolist() == [4, 4]

    def test_pasted_copy_never_covers_other_objects(self):
        image, instances = marked(100, 100, [(5, 10, 30, 40), (68, 12, 92, 38)], polygons=True)
        _, after = copy_paste(image, instances, 1.0, rng())
        assert len(after.classes) == 2

    def test_copy_paste_without_polygons_changes_nothing(self):
        image, instances = marked(50, 50, [(5, 5, 9, 9)])
        assert copy_paste(image, instances, 1.0, rng())[0] is image

    def test_copy_paste_runs_within_a_mosaic(self):
        images = [marked(64, 64, [(2, 20, 20, 50)], polygons=True) for _ in range(4)]

        def count(part):
            views = [render_view(mosaic_scene(images, 64, rng(i)), (64, 64), hyp(copy_paste=part), rng(i)) for i in range(20)]
            return sum(len(instances.classes) for _, instances in views)

        assert count(1.0) > count(0.0) > 20

    def test_copy_paste_runs_only_in_mosaics(self):
        image, instances = marked(64, 64, [(2, 20, 20, 50)], polygons=True)
        assert len(render_view(single_scene(image, instances, (64, 64)), (64, 64), hyp(copy_paste=1.0), rng())[1].classes) == 1


def test_mixup_keeps_both_sets_of_objects():
    first, second = marked(20, 20, [(1, 1, 9, 9)]), marked(20, 20, [(10, 10, 19, 19)])
    image, instances = mixup(first, second, rng())
    assert len(instances.classes) == 2
    assert 90 < image[5, 5, 0] < 165
    assert int(image[5, 5, 0]) + int(image[15, 15, 0]) in (254, 255, 256)
