"""Outlines from label files and COCO files through the augmentations: cut where the image ends, with holes and pieces, none lost."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from data.augment.affine import random_transform, warp_image, warp_instances
from data.augment.mosaic import mosaic_scene, render_view
from data.dataset_spec import load_dataset_spec
from data.labels.cache import load, save
from data.labels.coco import load_coco
from data.labels.files import list_images
from data.labels.source import split_labels
from data.labels.table import breaks_of, build_table
from data.labels.yolo import parse_labels
from tasks import DETECT, SEGMENT
from utils.errors import UserError
from utils.hyperparameters import Hyperparameters
from utils.instances import Instances, concatenate, cut_rings
from utils.masks.rasterise import polygon_masks

HW = (96, 128)


def ring_shape(x: float, y: float, outer: float, inner: float) -> list[np.ndarray]:
    """A disc with a hole."""
    angle = np.linspace(0, 2 * np.pi, 33)[:-1]
    circle = np.stack((np.cos(angle), np.sin(angle)), 1)
    return [(circle * r + (x, y)).astype(np.float32) for r in (outer, inner)]


def objects(*outlines: list[np.ndarray]) -> Instances:
    """Objects with these rings, and boxes tight about them."""
    points = [np.concatenate(rings) for rings in outlines]
    boxes = np.array([[*p.min(0), *p.max(0)] for p in points], np.float32)
    breaks = breaks_of([[len(r) for r in rings] for rings in outlines])
    counts = np.array([len(p) for p in points])
    return Instances(np.arange(len(points), dtype=np.float32), boxes, np.concatenate(points), counts, breaks=breaks)


def filled(instances: Instances, hw: tuple[int, int]) -> np.ndarray:
    return polygon_masks(instances.outlines(), hw)


def two_discs() -> Instances:
    return objects(ring_shape(40, 40, 30, 14), [ring_shape(90, 50, 20, 3)[0]])


def test_rings_of_an_object_stay_together():
    whole = two_discs()
    assert [len(rings) for rings in whole.outlines()] == [2, 1]
    assert [len(rings) for rings in whole.select(np.array([True, False])).outlines()] == [2]
    assert [len(rings) for rings in whole.select(np.array([False, True])).outlines()] == [1]
    both = concatenate([objects([ring_shape(10, 10, 5, 1)[0]]), whole])
    assert [len(rings) for rings in both.outlines()] == [1, 2, 1]
    mask = filled(whole, HW)
    assert not mask[0, 40, 40]
    assert mask[0, 40, 15]
    for moved, back in ((whole.mirrored(128), lambda m: m[:, :, ::-1]), (whole.flipped(96), lambda m: m[:, ::-1])):
        differing = (filled(moved, HW) != back(mask)).sum()
        assert differing <= 0.06 * mask.sum()  # the border is one pixel, on the other side
    assert Instances.empty().outlines() == []


def test_polygons_are_cut_where_the_image_ends():
    whole = objects(ring_shape(10, 20, 25, 10), [np.array(((90, -30), (150, 30), (150, 60), (80, 20)), np.float32)])
    canvas = filled(whole.shifted(50, 50), (196, 228))[:, 50 : 50 + 96, 50 : 50 + 128]
    cut = whole.cut(HW)
    assert (cut.points >= 0).all()
    assert (cut.points <= (128, 96)).all()
    differing = (filled(cut, HW) != canvas).sum(axis=(1, 2))
    assert (differing <= 2 * (128 + 96) * 0.5).all()
    inner = (slice(None), slice(2, 94), slice(2, 126))  # apart from the lines along the border
    assert (filled(cut, HW)[inner] != canvas[inner]).sum() <= 0.02 * canvas.sum()
    again = cut.clipped(HW).boxes_xyxy
    np.testing.assert_allclose(again, whole.clipped(HW).boxes_xyxy, atol=0.5)


def test_what_lies_outside_has_no_area_and_what_lies_inside_stays():
    inside = two_discs()
    assert inside.cut(HW).points is inside.points
    gone = inside.shifted(500, 0).cut(HW)
    assert gone.counts.tolist() == [0, 0]
    assert ((gone.boxes_xyxy[:, 2:] - gone.boxes_xyxy[:, :2]).prod(1) == 0).all()
    points, ring = cut_rings(np.zeros((0, 2), np.float32), np.zeros(0, np.int64), HW)
    assert (len(points), len(ring)) == (0, 0)


@pytest.mark.parametrize("perspective", [0.0, 0.001])
def test_outlines_lie_on_their_pixels_after_a_warp(perspective):
    whole = two_discs()
    image = np.repeat(filled(whole, HW).max(0)[:, :, None] * np.uint8(255), 3, 2)
    hyp = Hyperparameters(degrees=30, shear=10, perspective=perspective, translate=0.3, scale=0.4)
    for seed in range(6):
        transform = random_transform(HW, HW, hyp, np.random.default_rng(seed))
        seen = warp_image(image, transform.matrix, HW)[:, :, 0] > 127
        expected = filled(warp_instances(whole, transform.matrix, HW), HW).max(0) > 0
        assert (seen != expected).sum() <= 0.12 * max(expected.sum(), 100)


@pytest.mark.parametrize("paste", [0.0, 1.0])
def test_mosaics_keep_the_mask_of_every_object(paste):
    hyp = Hyperparameters(scale=0.5, translate=0.2, copy_paste=paste, degrees=10 if paste else 0)
    tiles = [(np.zeros((96, 128, 3), np.uint8), two_discs().shifted(0, 3 * i)) for i in range(4)]
    for seed in range(8):
        rng = np.random.default_rng(seed)
        _, found = render_view(mosaic_scene(tiles, 128, rng), (128, 128), hyp, rng)
        assert (found.counts > 0).all()
        masks = filled(found, (128, 128))
        assert masks.any((1, 2)).all()
        boxes = SEGMENT.targets(found, (128, 128))["boxes"] * 128
        for mask, (cx, cy, w, h) in zip(masks, boxes):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            extent = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
            box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
            np.testing.assert_allclose(extent, box, atol=4)  # a slanted edge leaves the image over some px


# Files


def coco_file(path, segmentations) -> None:
    annotations = [
        {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 9, "iscrowd": crowd, "segmentation": segmentation}
        for i, (box, segmentation, crowd) in enumerate(segmentations)
    ]
    images = [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}))


def test_coco_outlines_have_pieces_and_holes(tmp_path):
    mask = np.zeros((30, 40), np.uint8)
    mask[4:20, 6:26] = 1
    mask[8:14, 10:18] = 0
    runs = np.diff([0, *np.flatnonzero(np.diff(mask.T.ravel(), prepend=np.uint8(0))), mask.size]).tolist()
    coco_file(tmp_path / "c.json", [
        ([6, 4, 20, 16], {"size": [30, 40], "counts": runs}, 0),
        ([1, 1, 30, 20], [[1, 1, 9, 1, 9, 9], [20, 12, 31, 12, 31, 21]], 0),
        ([0, 0, 40, 30], {"size": [30, 40], "counts": [0, 1200]}, 1),
        ([2, 3, 10, 10], [[1, 2, 3, 4]], 0),
    ])  # fmt: skip
    labels = load_coco(tmp_path / "c.json", ["x"]).labels_of(1, (30, 40), "a.jpg")
    assert [p.message for p in labels.problems] == [
        "annotation 4 of c.json: segmentation: a polygon of 2 points, 3 or more are expected; its box is used"
    ]
    assert labels.is_usable
    table = build_table([labels])
    found = table.instances(0, hw=(30, 40))
    assert [len(rings) for rings in found.outlines()] == [2, 2, 0]
    masks = filled(found, (30, 40))
    assert np.array_equal(masks[0], mask)
    assert masks[1].any((0, 1)).sum() > 0
    assert SEGMENT.targets(found, (32, 40))["masks"].any((1, 2)).all()
    save(tmp_path / "c.npz", "key", table)
    again = load(tmp_path / "c.npz", "key")
    assert again is not None
    assert np.array_equal(again.breaks, table.breaks)
    kept = table.select(np.array([True]))
    assert [len(rings) for rings in kept.instances(0, hw=(30, 40)).outlines()] == [2, 2, 0]


def test_label_rows_with_holes_are_read_as_rings():
    mask = np.zeros((40, 40), np.uint8)
    cv2.rectangle(mask, (5, 5), (30, 30), 1, -1)
    cv2.rectangle(mask, (12, 12), (20, 20), 0, -1)
    from tasks.segment import joined, rings_of_packed
    from utils.masks.packed import pack

    polygon = joined(rings_of_packed(pack(mask[None]))[0]) / 40
    text = "0 " + " ".join(f"{v:.6g}" for v in polygon.ravel()) + "\n0 0.1 0.1 0.4 0.1 0.4 0.4\n"
    labels = parse_labels(text, "a.txt", (40, 40), parse_row=SEGMENT.parse_row)
    found = build_table([labels]).instances(0, hw=(40, 40))
    assert [len(rings) for rings in found.outlines()] == [2, 1]
    assert np.array_equal(filled(found, (40, 40))[0], mask)


def make_set(root, rows):
    for kind in ("images/train", "labels/train"):
        (root / kind).mkdir(parents=True)
    cv2.imwrite(str(root / "images/train/a.png"), np.zeros((32, 32, 3), np.uint8))
    (root / "labels/train/a.txt").write_text(rows)
    (root / "data.yaml").write_text("train: images/train\nval: images/train\nnames: [x]\n")
    return load_dataset_spec(root / "data.yaml")


def test_objects_without_outlines_are_said_and_a_set_of_boxes_is_refused(tmp_path):
    box, outline = "0 0.5 0.5 0.2 0.2\n", "0 0.1 0.1 0.3 0.1 0.3 0.3\n"
    mixed = make_set(tmp_path / "mixed", box + outline)
    _, remarks = split_labels(mixed, "train", list_images(mixed.sources("train")), task=SEGMENT, workers=1, progress=False)
    assert any("1 of 2 objects have a box and no outline: their masks are their boxes" in line for line in remarks)
    boxes = make_set(tmp_path / "boxes", box)
    files = list_images(boxes.sources("train"))
    with pytest.raises(UserError, match="none of its 1 objects has an outline"):
        split_labels(boxes, "train", files, task=SEGMENT, workers=1, progress=False)
    split_labels(boxes, "train", files, task=DETECT, workers=1, progress=False)
