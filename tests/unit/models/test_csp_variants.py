"""YOLOv7's r50-csp, row by row, has the published number of parameters; x50-csp has that of the same rows with grouped bottlenecks."""

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


def conv(c1: int, c2: int, kernel: int = 1, groups: int = 1) -> int:
    """Parameters of a convolution without bias and its batch norm."""
    return c1 * c2 * kernel**2 // groups + 2 * c2


def count(ratio: float, groups: int) -> int:
    """Parameters of the network by hand: ``ratio`` is the inner width of a residual bottleneck, ``groups`` those of its 3x3 convolution."""

    def residuals(c: int, n: int) -> int:
        inner = int(c * ratio)
        return n * (conv(c, inner) + conv(inner, inner, 3, groups) + conv(inner, c))

    def stage(c: int, n: int) -> int:  # half of the width in the stack, a convolution behind it
        return 2 * conv(c, c // 2) + conv(c // 2, c // 2) + conv(c, c) + residuals(c // 2, n)

    def neck(c1: int, c: int) -> int:  # all of the width in the stack
        return conv(c1, c) + conv(c, c) + conv(2 * c, c) + residuals(c, 2)

    stem = conv(3, 64, 3) + conv(64, 64) + conv(64, 64, 3) + conv(128, 128)
    down = sum(conv(c, 2 * c, 3) for c in (128, 256, 512))
    stages = stage(128, 3) + stage(256, 4) + stage(512, 6) + stage(1024, 3)
    pools = 3 * conv(1024, 512) + 2 * conv(512, 512, 3) + conv(512, 512) + conv(2048, 512)
    up = 2 * conv(512, 256) + neck(512, 256) + 2 * conv(256, 128) + neck(256, 128)
    back = 2 * conv(128, 256, 3) + neck(512, 256) + 2 * conv(256, 512, 3) + neck(1024, 512) + conv(512, 1024, 3)
    head = sum(c + 255 * c + 255 + 255 for c in (256, 512, 1024))  # implicit addend, convolution with bias, implicit factor
    return stem + down + stages + pools + up + back + head


@pytest.mark.parametrize(("stage", "neck", "parameters", "by_hand"), [
    ("ResCSPC", "ResCSPB", 34_299_578, count(0.5, 1)),  # the published number
    ("ResXCSPC", "ResXCSPB", 32_299_962, count(1.0, 32)),  # none is published: the same rows with ResNeXt's bottlenecks, counted by hand
])  # fmt: skip
def test_parameters(stage, neck, parameters, by_hand):
    model = build_model(network(stage, neck))
    assert sum(p.numel() for p in model.parameters()) == parameters == by_hand
