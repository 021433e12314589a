"""Masks from polygons, from prototypes and their overlap, against the golden vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.golden import find
from tests.plain_masks import input_masks, mask_iou, mask_logits, original_masks, prototype_masks
from utils.masks.packed import pack
from utils.masks.rasterise import index_map, polygon_masks
from utils.masks.rle import areas, decode_packed, encode, encode_polygons, mask_overlap
from utils.metrics.metrics import GroundTruth, MetricAccumulator
from utils.types import Detections


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_polygon_masks(ratio):
    golden = find("ops", "polygon_masks")
    shape = golden.arrays[f"shape_ratio{ratio}"]
    expected = np.unpackbits(golden.arrays[f"masks_ratio{ratio}"])[: shape.prod()].reshape(shape)
    found = polygon_masks(list(golden.arrays["polygons"]), tuple(golden.meta["args"]["imgsz"]), ratio=ratio)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("ratio", [1, 4])
def test_index_map_has_smaller_objects_on_top(ratio):
    golden = find("ops", "polygon_masks")
    masks = polygon_masks(list(golden.arrays["polygons"]), tuple(golden.meta["args"]["imgsz"]), ratio=ratio)
    indices, order = index_map(masks)
    areas = masks.sum((1, 2))
    theirs = golden.arrays[f"overlap_order_ratio{ratio}"]
    assert areas[order].tolist() == areas[theirs].tolist()
    if len(set(areas.tolist())) == len(areas):
        assert order.tolist() == theirs.tolist()
    named = np.concatenate(([-1], order))[indices]
    expected = np.concatenate(([-1], theirs))[golden.arrays[f"overlap_ratio{ratio}"]]
    contested = (masks.sum(0) > 1) & np.isin(named, [i for i in order if (areas == areas[i]).sum() > 1])
    assert np.array_equal(named[~contested], expected[~contested])


def test_mask_iou():
    golden = find("ops", "mask_iou")
    found = mask_iou(golden.tensor("masks1"), golden.tensor("masks2"))
    assert torch.allclose(found, golden.tensor("iou"), atol=1e-6)


def test_masks_of_prototypes_at_three_sizes():
    golden = find("ops", "process_mask")
    args = {key: tuple(value) for key, value in golden.meta["args"].items()}
    logits = mask_logits(golden.tensor("coefficients"), golden.tensor("protos"))
    assert torch.allclose(logits, golden.tensor("logits"), atol=1e-4)
    logits, boxes = golden.tensor("logits"), golden.tensor("boxes")
    assert torch.equal(prototype_masks(logits, boxes, args["input_shape"]), golden.tensor("mask_proto"))
    assert torch.equal(input_masks(logits, boxes, args["input_shape"]), golden.tensor("mask_input"))
    native = original_masks(logits, golden.tensor("boxes_native"), input_hw=args["input_shape"], original_hw=args["native_shape"])
    assert torch.equal(native, golden.tensor("mask_native"))


RULES = {"coco": "coco_ap_per_class", "ultralytics": "ap"}


@pytest.mark.parametrize("rule", RULES)
def test_mask_average_precision(rule):
    golden = find("ops", "map_masks_synth")
    args, gt, det = golden.meta["args"], golden.arrays["gt"], golden.arrays["det"]
    masks = {k: np.unpackbits(golden.arrays[f"{k}_masks"])[: len(golden.arrays[k]) * 48 * 64].reshape(-1, 48, 64) for k in ("gt", "det")}
    names = [str(c) for c in range(args["classes"])]
    metric = MetricAccumulator(names, rule=rule, similarity=mask_overlap, fields={"masks": encode}, area=areas)
    for image in range(args["images"]):
        own, known = det[:, 0] == image, gt[:, 0] == image
        fields = {"masks": torch.tensor(masks["det"][own])}
        found = Detections(torch.zeros(own.sum(), 4), torch.tensor(det[own, 2]), torch.tensor(det[own, 1]).long(), fields)
        boxes = torch.zeros(known.sum(), 4)
        truth = GroundTruth.of_boxes(torch.zeros(known.sum()).long(), torch.tensor(gt[known, 1]), boxes)
        area = torch.tensor(masks["gt"][known].sum((1, 2)))
        metric.update([found], truth.replace(area=area, fields={"masks": torch.tensor(masks["gt"][known])}), images=[image])
    result = metric.compute()
    expected = golden.arrays[RULES[rule]]
    assert np.allclose(result.ap.mean(1) if rule == "coco" else result.ap, expected, atol=1e-9)
    if rule == "coco":
        assert np.allclose(list(result.coco_stats.values()), golden.arrays["coco_stats"], atol=1e-9)
    else:
        assert np.allclose(result.precision_per_class, golden.arrays["precision"], atol=1e-9)
        assert np.allclose(result.recall_per_class, golden.arrays["recall"], atol=1e-9)
        assert np.allclose((result.map50, result.map), (golden.arrays["map50"], golden.arrays["map"]), atol=1e-9)


def test_codes_hold_masks_without_loss_and_compare_as_pycocotools_does():
    rng = np.random.default_rng(0)
    masks = (rng.random((5, 30, 41)) > 0.6).astype(np.uint8)
    assert np.array_equal(decode_packed(encode(masks), (30, 41)), pack(masks))
    assert decode_packed(encode(masks[:0]), (30, 41)).shape == (0, 30, 6)
    code = encode_polygons([[1, 1, 20, 1, 20, 11, 1, 11]], (30, 41))
    assert np.unpackbits(decode_packed([code], (30, 41))[0]).sum() == 19 * 10
