"""YOLOv5's candidates against published ones, row by row."""

from __future__ import annotations

import torch

from models.assigners.anchor_ratio import Scene, anchor_grid, assign_by_ratio
from models.assigners.targets import pad_targets
from tests import golden
from utils.types import Targets


def test_build_targets_match_the_reference():
    case = golden.find("ops", "build_targets_v5")
    args = case.meta["args"]
    strides, (h, w) = args["strides"], args["imgsz"]
    anchors = torch.tensor(args["anchors_px"]).view(3, 3, 2) / torch.tensor(strides).view(-1, 1, 1)
    maps = [torch.zeros(args["batch"], 1, h // s, w // s) for s in strides]
    targets = case.tensor("targets")
    padded = pad_targets(Targets.of_rows(targets), int(targets[:, 0].long().bincount().max()), batch_size=args["batch"], hw_px=(h, w))
    grid = anchor_grid(maps, anchors, strides)
    scene = Scene(maps, grid, anchors, strides, padded, False)
    matches = assign_by_ratio(scene, anchor_t=args["anchor_t"])
    image, row = matches.mask.nonzero(as_tuple=True)
    place, box = matches.place[image, row], matches.box[image, row]
    true = padded.boxes_xyxy[image, box]
    stride = grid.stride[place, None]
    centre = (true[:, :2] + true[:, 2:]) / 2 - grid.corner_px[place]
    boxes = torch.cat((centre, true[:, 2:] - true[:, :2]), dim=1) / stride
    columns = (image, padded.labels[image, box], *(grid.corner_px[place] / stride).T, *boxes.T, *(grid.anchor_px[place] / stride).T)
    got = torch.stack([c.float() for c in columns], dim=1)
    for level in range(3):
        case_columns = ("img", "cls", "gi", "gj", "tbox", "anchors")
        wanted = torch.cat([case.tensor(f"{n}_{level}").float().view(len(case.arrays[f"img_{level}"]), -1) for n in case_columns], dim=1)
        here = got[grid.level[place] == level]
        assert len(here) == len(wanted)
        golden.assert_close(in_order(here), in_order(wanted), 1e-5, f"level {level}")


def in_order(rows: torch.Tensor) -> torch.Tensor:
    return torch.tensor(sorted(rows.tolist(), key=lambda r: [round(v, 3) for v in r]))
