"""YOLOv7's r50-csp, row by row, has the published number of parameters; x50-csp builds from the same rows."""

from __future__ import annotations

import pytest

from models import build_model

ANCHORS = [[12, 16, 19, 36, 40, 28], [36, 75, 76, 55, 72, 146], [142, 110, 192, 243, 459, 401]]


def network(stage: str, neck: str) -> dict:
    backbone = [[-1, 1, "Stem", [128]], [-1, 3, stage, [128]]]
    for width, blocks in ((256, 4), (512, 6), (1024, 3)):
        backbone += [[-1, 1, "Conv", [width, 3, 2]], [-1, blocks, stage, [width]]]
    head: list = [[-1, 1, "SPPCSPC", [512]]]
    for source, width in ((5, 256), (3, 128)):
        head += [[-1, 1, "Conv", [width, 1, 1]], [-1, 1, "nn.Upsample", ["None", 2, "nearest"]], [source, 1, "Conv", [width, 1, 1]]]
        head += [[[-1, -2], 1, "Concat", [1]], [-1, 2, neck, [width]]]
    for source, width in ((13, 256), (8, 512)):
        head += [[-1, 1, "Conv", [width, 3, 1]], [-2, 1, "Conv", [width, 3, 2]], [[-1, source], 1, "Concat", [1]], [-1, 2, neck, [width]]]
    head += [[-1, 1, "Conv", [1024, 3, 1]], [[19, 23, 27], 1, "IDetect", ["nc", "anchors"]]]
    return {"nc": 80, "anchors": ANCHORS, "backbone": backbone, "head": head}


@pytest.mark.parametrize(("stage", "neck", "parameters"), [("ResCSPC", "ResCSPB", 34_299_578), ("ResXCSPC", "ResXCSPB", 32_299_962)])
def test_parameters(stage, neck, parameters):
    model = build_model(network(stage, neck))
    assert sum(p.numel() for p in model.parameters()) == parameters
