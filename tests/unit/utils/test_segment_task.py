"""Segmentation: rows, targets with and without overlap, mask AP equal to pycocotools, joined networks, turned views, united pieces."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from models.losses.mask_pixels import Grid
from tasks import DETECT, SEGMENT
from tasks.base import View, targets_of_images
from tasks.rows import InvalidRow, LabelRow
from utils.boxes import ltwh_to_xyxy
from utils.hyperparameters import Hyperparameters
from utils.instances import Instances
from utils.masks.packed import pack, unpack
from utils.metrics.coco_eval import read_instances, run_pycocotools, write_coco_json
from utils.nms import Suppression
from utils.types import Detections, Letterbox, Predictions, Targets


def squares(*corners, size: int = 16) -> Instances:
    """Squares with outlines, by their upper left corners."""
    start = np.array(corners, np.float32).reshape(-1, 2)
    boxes = np.concatenate((start, start + size), axis=1)
    points = boxes[:, (0, 1, 2, 1, 2, 3, 0, 3)].reshape(-1, 2)
    return Instances(np.zeros(len(boxes), np.float32), boxes, points, np.full(len(boxes), 4))


# Rows


def test_a_row_is_an_outline_or_a_box():
    outline = SEGMENT.parse_row(["1", "0.1", "0.1", "0.5", "0.1", "0.5", "0.4"])
    assert isinstance(outline, LabelRow)
    np.testing.assert_allclose(outline.box_cxcywh, (0.3, 0.25, 0.4, 0.3))
    assert outline.polygon.shape == (3, 2)
    box = SEGMENT.parse_row(["1", "0.3", "0.25", "0.4", "0.3"])
    assert isinstance(box, LabelRow)
    assert len(box.polygon) == 0


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("0 0.1 0.2 0.3 0.4 0.5", "6 columns, expected: class x1 y1"),
        ("0 0.1 0.1 0.4", "4 columns"),
        ("0 0.1 0.1 0.4 0.4 0.1 0.1", "an outline of 2 different points without area"),
        ("0 0.1 0.1 0.4 0.1 0.7 0.1", "an outline of 3 different points without area"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3", "an outline whose points lie on a line, dropped"),
        ("0 0.1 0.1 0.4 0.1 0.4 1.7", "coordinate 1.7 in column 7"),
        ("0 0.1 0.1 0.4 0.1 0.4 x", "not a number .* expected: class x1 y1"),
    ],
)
def test_a_wrong_row_is_one_clear_line(row, says):
    wrong = SEGMENT.parse_row(row.split())
    assert isinstance(wrong, InvalidRow)
    assert re.search(says, wrong.message)
    assert "\n" not in wrong.message


def test_a_row_with_a_bridge_to_a_hole_has_two_rings():
    hole = "0.2 0.2 0.2 0.4 0.4 0.4 0.4 0.2 0.2 0.2"
    row = SEGMENT.parse_row(f"0 0.1 0.1 {hole} 0.1 0.1 0.9 0.1 0.9 0.9 0.1 0.9".split())
    assert isinstance(row, LabelRow)
    assert sorted(row.rings) == [4, 4]
    assert len(row.polygon) == 8
    np.testing.assert_allclose(row.box_cxcywh, (0.5, 0.5, 0.8, 0.8))


# Targets


@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
def test_masks_are_at_a_fraction_of_the_image(ratio):
    task = SEGMENT.configured(Hyperparameters(mask_ratio=ratio))
    masks = task.targets(squares((16, 24)), (64, 88))["masks"]
    assert masks.shape == (1, 64 // ratio, -(-(88 // ratio) // 8))
    inside = unpack(masks, 88 // ratio)[0]
    assert inside[24 // ratio : 40 // ratio, 16 // ratio : 32 // ratio].all()
    assert abs(int(inside.sum()) - (16 // ratio) ** 2) <= 33 * (ratio < 4)  # the border is drawn at full size


@pytest.mark.parametrize("ratio", [3, 4, 13])
def test_the_loss_and_drawings_read_masks_where_they_were_made(ratio):
    """Neither side is a multiple of the ratio, and --multi-scale may have changed the proportion of the sides besides."""
    hw, outline = (64, 640), squares((560, 8), size=48)
    targets = targets_of_images([SEGMENT.configured(Hyperparameters(mask_ratio=ratio)).targets(outline, hw)])
    assert targets.masks is not None
    assert targets[torch.tensor([0])].to("cpu").mask_width == hw[1] // ratio
    for hw_px in ((64.0, 640.0), (64.0, 480.0)):
        grid = Grid((16, 160), hw_px, targets.masks, targets.mask_width)
        columns = torch.arange(160)
        covered = grid.bits(torch.tensor(0), torch.tensor(4), columns).nonzero().flatten()
        cells = max(ratio // 4, 1)
        assert abs(int(covered[0]) - 560 // 4) <= cells
        assert abs(int(covered[-1]) - 608 // 4) <= cells
    drawn = unpack(SEGMENT.detections_of_targets(targets, hw, count=1)[0].fields["masks"].numpy(), hw[1])[0].any(0).nonzero()[0]
    assert abs(int(drawn[0]) - 560) <= ratio
    assert abs(int(drawn[-1]) - 608) <= ratio


def test_overlap_belongs_to_the_smallest_object_or_to_all():
    both = Instances(
        np.zeros(2, np.float32), np.array(((8, 8, 24, 24), (0, 0, 48, 48)), np.float32),
        np.concatenate([squares((8, 8)).points, squares((0, 0), size=48).points]), np.array((4, 4)),
    )  # fmt: skip
    alone = {n: SEGMENT.configured(Hyperparameters(overlap_mask=n)).targets(both, (64, 64))["masks"] for n in (0, 1)}
    small, large = unpack(alone[0], 16)
    assert (small & large).sum() == small.sum() > 0
    exclusive = unpack(alone[1], 16)
    assert np.array_equal(exclusive[0], small)
    assert np.array_equal(exclusive[1], large & ~small & 1)


def test_an_object_without_outline_has_its_box_as_mask():
    only_box = squares((16, 24)).replace(points=np.zeros((0, 2), np.float32), counts=np.zeros(1, np.int64))
    assert np.array_equal(SEGMENT.targets(only_box, (64, 64))["masks"], SEGMENT.targets(squares((16, 24)), (64, 64))["masks"])


def test_switches_of_masks_are_read_from_a_recipe():
    hyp = Hyperparameters.from_dict({"mask_ratio": 2, "overlap_mask": False})
    task = SEGMENT.configured(hyp)
    assert (task.mask_ratio, task.overlap_mask) == (2, False)
    assert DETECT.configured(hyp) is DETECT


# The metric


def scene(seed: int, *, hw=(120, 150), objects: int = 5) -> np.ndarray:
    """Masks (n, h, w) of ellipses."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: hw[0], : hw[1]]
    centre, radius = rng.uniform(10, (hw[1] - 10, hw[0] - 10), (objects, 2)), rng.uniform(4, 40, (objects, 2))
    return np.stack([((x - c[0]) / r[0]) ** 2 + ((y - c[1]) / r[1]) ** 2 < 1 for c, r in zip(centre, radius)]).astype(np.uint8)


def boxes_of(masks: np.ndarray) -> torch.Tensor:
    """(n, 4) xyxy px."""
    spans = [np.nonzero(m) for m in masks]
    return torch.tensor([[x.min(), y.min(), x.max() + 1, y.max() + 1] for y, x in spans]).float()


def test_box_and_mask_ap_are_those_of_pycocotools(tmp_path):
    names, content = ("a", "b"), {"images": [], "annotations": [], "categories": [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}]}
    found = []
    for image in range(12):
        truth, rng = scene(image), np.random.default_rng(100 + image)
        hw = truth.shape[1:]
        content["images"].append({"id": image + 1, "file_name": f"{image}.jpg", "height": hw[0], "width": hw[1]})
        labels = rng.integers(0, 2, len(truth))
        for number, (mask, label, box) in enumerate(zip(truth, labels, boxes_of(truth))):
            x1, y1, x2, y2 = box.tolist()
            alone = Detections(box[None], torch.ones(1), torch.zeros(1).long(), {"masks": torch.from_numpy(pack(mask[None]))})
            outline = SEGMENT.label_rows(alone, hw)
            polygon = (np.array(outline[0].split()[1:], float).reshape(-1, 2) * (hw[1], hw[0])).ravel().tolist()
            flat = mask.T.ravel()
            runs = np.diff([0, *np.flatnonzero(np.diff(flat, prepend=np.uint8(0))), flat.size]).tolist()
            segmentation = [polygon] if number % 2 else {"size": list(hw), "counts": runs}
            content["annotations"].append({
                "id": len(content["annotations"]) + 1, "image_id": image + 1, "category_id": (3, 7)[label], "iscrowd": int(number == 4),
                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": int(mask.sum()), "segmentation": segmentation,
            })  # fmt: skip
        moved = np.stack([np.roll(m, rng.integers(-4, 5, 2), (0, 1)) for m in np.concatenate((truth, scene(image + 50, objects=3)))])
        classes = torch.from_numpy(np.where(rng.random(8) < 0.8, np.append(labels, (0, 1, 0)), rng.integers(0, 2, 8)))
        masks = torch.from_numpy(pack(moved))
        found.append(Detections(boxes_of(moved), torch.from_numpy(rng.random(8)).float(), classes, {"masks": masks}, image_hw=hw))
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    truth = read_instances(path, names, masks=True)
    assert truth.remarks == ()
    metric = SEGMENT.metric(names)
    for start in (0, 5):
        files = [f"{i}.jpg" for i in range(start, 5 if start == 0 else 12)]
        metric.update(found[start : start + len(files)], truth.truth_of(files), images=truth.ids_of(files))
    result = metric.compute()
    assert 0.2 < result.own.map < 0.9
    written = tmp_path / "results.json"
    write_coco_json(written, metric, category_ids=truth.category_ids)
    for part, kind in ((result.box, "bbox"), (result.own, "segm")):
        theirs = run_pycocotools(path, written, kind=kind)
        assert part.coco_stats == pytest.approx(theirs, abs=2e-4), kind  # boxes in the file have four digits
    assert set(SEGMENT.columns) == set(result.columns)


def test_masks_of_a_file_whose_sizes_are_a_pixel_off_are_compared(tmp_path):
    masks = np.zeros((2, 40, 61), np.uint8)
    masks[0, 4:20, 5:30], masks[1, 25:40, 30:61] = 1, 1
    boxes = boxes_of(masks)
    code = {"size": [41, 60], "counts": [30 * 41 + 25, *[15, 26] * 29, 15, 1]}
    polygon = [[5, 4, 30, 4, 30, 20, 5, 20]]
    annotations = [
        {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": (polygon, code)[i]}
        for i, (x1, y1, x2, y2) in enumerate(boxes.tolist())
    ]
    content = {"images": [{"id": 1, "file_name": "a.jpg", "height": 41, "width": 60}], "categories": [{"id": 1, "name": "a"}]}
    path, written = tmp_path / "instances.json", tmp_path / "results.json"
    path.write_text(json.dumps({**content, "annotations": annotations}))
    truth = read_instances(path, ("a",), masks=True)
    assert truth.remarks == ()
    metric, hws = SEGMENT.metric(("a",)), np.array([[40, 61]])
    fields = {"masks": torch.from_numpy(pack(masks))}
    found = Detections(boxes, torch.tensor((0.9, 0.8)), torch.zeros(2).long(), fields, image_hw=(40, 61))
    metric.update([found], truth.truth_of(["a.jpg"], hws=hws), images=truth.ids_of(["a.jpg"]))
    write_coco_json(written, metric, category_ids=truth.category_ids)
    own = metric.compute().own
    assert own.map > 0.9
    assert own.coco_stats == pytest.approx(run_pycocotools(path, written, kind="segm"), abs=1e-9)
    assert truth.other_sizes(["x/a.jpg"], hws) == ""
    line = truth.other_sizes(["x/a.jpg"], np.array([[60, 41]]))
    assert line == f"{path}: x/a.jpg is 41x60 px, but the file says 60x41, so its objects may lie elsewhere"


# Networks and views


def test_networks_that_are_joined_keep_their_own_prototypes():
    generator = torch.Generator().manual_seed(0)
    parts = [
        Predictions(
            torch.rand(1, n, 4, generator=generator) * 8 + torch.tensor([0.0, 0, 40, 40]), torch.rand(1, n, 1, generator=generator),
            {"coefficients": torch.randn(1, n, k, generator=generator)}, {"prototypes": torch.randn(1, k, 16, 16, generator=generator)},
        )
        for n, k in ((3, 2), (2, 4))
    ]  # fmt: skip
    joined = SEGMENT.join(parts)
    logits = torch.einsum("bnk,bkhw->bnhw", joined.fields["coefficients"], joined.shared["prototypes"])
    expected = torch.cat([torch.einsum("bnk,bkhw->bnhw", p.fields["coefficients"], p.shared["prototypes"]) for p in parts], dim=1)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("mirrored", [False, True])
def test_prototypes_of_a_view_are_turned_back(mirrored):
    hw, scale = (64, 96), (0.5, 0.5)
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(24.0), indexing="ij")
    maps = torch.stack((x, y, x * 0 + 1))[None]  # linear, so that sampling is exact inside
    seen = torch.nn.functional.interpolate(maps.flip(3) if mirrored else maps, size=(8, 12), mode="bilinear", align_corners=False)
    padded = torch.nn.functional.pad(seen, (0, 4, 0, 8))
    box = torch.tensor([[[8.0, 4, 24, 20]]])
    view = torch.tensor([[[96 - 24.0, 4, 96 - 8, 20]]]) / 2 if mirrored else box / 2
    turned = SEGMENT.from_view(Predictions(view, torch.ones(1, 1, 1), {"coefficients": torch.ones(1, 1, 3)}, {"prototypes": padded}),
                               View(hw, scale, mirrored))  # fmt: skip
    torch.testing.assert_close(turned.boxes, box)
    torch.testing.assert_close(turned.shared["prototypes"][0, :, 1:-1, 1:-1], maps[0, :, 1:-1, 1:-1])


def test_pieces_of_an_object_become_one_mask():
    masks = np.zeros((3, 8, 20), np.uint8)
    masks[0, :, :8], masks[1, :, 8:15], masks[2, 3, 18] = 1, 1, 1
    found = Detections(torch.zeros(3, 4), torch.ones(3), torch.zeros(3).long(), {"masks": torch.from_numpy(pack(masks))})
    united = unpack(SEGMENT.unite(found, torch.tensor([0, 0]), torch.tensor([1, 2])).fields["masks"].numpy(), 20)
    assert np.array_equal(united[0], masks.max(0))
    assert np.array_equal(united[1:], masks[1:])


def test_a_batch_of_original_sizes_has_exact_ground_truth():
    images = [(squares((2, 3), (30, 10)), (64, 96)), (squares(), (10, 12)), (squares((0, 0)), (20, 40))]
    truth = SEGMENT.exact_truth(images)
    assert truth.image.tolist() == [0, 0, 2]
    assert truth.area.tolist() == [256.0] * 3
    found = []
    for own, hw in images:
        masks = np.zeros((len(own), *hw), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, own.boxes_xyxy.astype(int)):
            mask[y1:y2, x1:x2] = 1
        fields = {"masks": torch.from_numpy(pack(masks))}
        found.append(Detections(torch.from_numpy(own.boxes_xyxy), torch.ones(len(own)), torch.zeros(len(own)).long(), fields, image_hw=hw))
    metric = SEGMENT.metric(("square",))
    metric.update(found, truth, images=["a", "b", "c"])
    assert metric.compute().own.map == pytest.approx(1.0)
    assert torch.equal(ltwh_to_xyxy(truth.boxes_ltwh[:1]).float(), found[0].boxes[:1])


def test_detections_carry_prototypes_until_masks_are_drawn():
    prototypes = torch.full((2, 1, 16, 16), -1.0)
    prototypes[0, 0, 4:8, 4:8] = 1.0
    boxes = torch.tensor([[[16.0, 16, 32, 32]], [[0.0, 0, 64, 64]]])
    predictions = Predictions(boxes, torch.full((2, 1, 1), 0.9), {"coefficients": torch.ones(2, 1, 1)}, {"prototypes": prototypes})
    found = SEGMENT.postprocess(predictions, Suppression())
    assert [d[torch.tensor([True])].shared["prototypes"].shape for d in found] == [(1, 16, 16)] * 2
    place = Letterbox(torch.tensor([[128, 128], [64, 64]]), torch.tensor([[0.5, 0.5], [1.0, 1.0]]), torch.zeros(2, 2))
    first, second = SEGMENT.to_original(found, place)
    assert first.image_hw == (128, 128)
    area = int(unpack(first.fields["masks"].numpy(), 128).sum())
    assert 0.95 * 32 * 32 < area <= 32 * 32  # the corners are rounded by the interpolation
    assert not second.fields["masks"].any()
    assert SEGMENT.label_rows(second, (64, 64))[0].split() == ["0", "0.5", "0.5", "1", "1"]


def test_targets_of_a_batch_join_their_masks():
    parts = [SEGMENT.targets(i, (32, 48)) for i in (squares((0, 0)), squares(), squares((8, 8), (20, 10)))]
    targets = targets_of_images(parts)
    assert isinstance(targets, Targets)
    assert targets.masks is not None
    assert targets.masks.shape == (3, 8, 2)
