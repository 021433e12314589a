"""Cells, distances from them, and widths, against published numbers."""

from __future__ import annotations

import pytest
import torch

from models.assigners.grid import anchor_points, row_order
from models.losses.dfl import distribution_focal_loss
from models.spec.channel_rules import make_divisible
from tests import golden
from utils.boxes import xyxy_to_cxcywh


def test_cell_centres_and_decoded_boxes_match_the_reference():
    case = golden.find("ops", "anchors_dist_v9")
    args = case.meta["args"]
    maps = [torch.zeros(1, 1, h, w) for h, w in args["maps"]]
    centres, strides = anchor_points(maps, args["strides"])
    golden.assert_close(centres.T / strides.T, case.tensor("anchor_points"), 1e-6)
    golden.assert_close(strides.T, case.tensor("stride_tensor"), 1e-6)
    distance = case.tensor("distance")
    order = row_order(maps, args["strides"], branches=1)
    boxes = torch.addcmul(order.centre[order.row], order.reach[order.row], distance) / strides.T
    golden.assert_close(boxes, case.tensor("xyxy"), 1e-6)
    golden.assert_close(xyxy_to_cxcywh(boxes), case.tensor("xywh"), 1e-6)


@pytest.mark.parametrize("reg_max", [4, 15])
def test_the_distribution_ends_before_its_last_bin(reg_max):
    """For log-probabilities that are linear in the bin, the loss is linear in the target, and so shows where targets are cut off."""
    case = golden.find("ops", "anchors_dist_v9")
    logits = torch.arange(reg_max + 1, dtype=torch.float64)
    distance = case.tensor("distance").double()
    loss = distribution_focal_loss(logits.expand(*distance.shape, -1), distance)
    golden.assert_close(logits.logsumexp(0) - loss, case.tensor(f"back_regmax{reg_max}"), 1e-6)


def test_make_divisible_matches_the_reference():
    case = golden.find("ops", "make_divisible")
    for divisor in (4, 8, 16):
        assert [make_divisible(x, divisor) for x in case.arrays["x"].tolist()] == case.arrays[f"d{divisor}"].tolist()
