"""Masks from polygons, from prototypes and their overlap, against the golden vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.golden import find
from utils.masks.decode import input_masks, mask_logits, original_masks, prototype_masks
from utils.masks.overlap import mask_iou
from utils.masks.rasterise import index_map, polygon_masks


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
