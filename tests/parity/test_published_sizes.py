"""Parameters and GFLOPs of YOLOv10, v13, YOLO11, 12 and 26 as their published tables give them: deployed, for COCO, at 640 px."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from models import build_model

# millions of parameters, GFLOPs
PUBLISHED = {
    "yolov10n": (2.3, 6.7), "yolov10s": (7.2, 21.6), "yolov10m": (15.4, 59.1), "yolov10b": (19.1, 92.0), "yolov10l": (24.4, 120.3),
    "yolov10x": (29.5, 160.4),
    "yolo11n": (2.6, 6.5), "yolo11s": (9.4, 21.5), "yolo11m": (20.1, 68.0), "yolo11l": (25.3, 86.9), "yolo11x": (56.9, 194.9),
    "yolo12n": (2.6, 6.5), "yolo12s": (9.3, 21.4), "yolo12m": (20.2, 67.5), "yolo12l": (26.4, 88.9), "yolo12x": (59.1, 199.0),
    "yolo26n": (2.4, 5.4), "yolo26s": (9.5, 20.7), "yolo26m": (20.4, 68.2), "yolo26l": (24.8, 86.4), "yolo26x": (55.7, 193.9),
}  # fmt: skip
# YOLOv13's; its GFLOPs are those of a network that is not fused and of an image of one cell, times the cells of 640 px
PUBLISHED_V13 = {"yolov13n": (2.5, 6.4), "yolov13s": (9.0, 20.8), "yolov13l": (27.6, 88.4), "yolov13x": (64.0, 199.2)}
CELL = 32  # px, the largest stride
# parameters of networks in training, of forms without a vector
FORMS = {"yolo26n-p2": 2_662_400, "yolo26n-p6": 4_063_872, "yolo26s-p6": 15_876_448}


@pytest.mark.parametrize("name", [name if name.endswith("n") else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED])
def test_deployed_networks_have_the_published_size(name):
    with torch.device("meta"):
        network = build_model(name).deploy()
        gflops = 2e-9 * count_multiply_adds(network, torch.empty(1, 3, 640, 640))
    parameters = sum(p.numel() for p in network.parameters()) / 1e6
    assert (round(parameters, 1), round(gflops, 1)) == pytest.approx(PUBLISHED[name], abs=0.101)


@pytest.mark.parametrize("name", FORMS)
def test_forms_with_another_level_have_the_published_parameters(name):
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(name).parameters()) == FORMS[name]


@pytest.mark.parametrize("name", [name if name[-1] in "ns" else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED_V13])
def test_yolov13_has_the_published_size(name):
    """At one cell, a linear layer that works once an image counts as often as the others, as in the published figures."""
    with torch.device("meta"):
        network = build_model(name).eval()
        parameters = sum(p.numel() for p in network.deploy().parameters()) / 1e6
        counted = count_multiply_adds(network, torch.empty(1, 3, CELL, CELL), all_layers=True)
    gflops = 2e-9 * counted * (640 // CELL) ** 2
    assert (round(parameters, 1), gflops) == (PUBLISHED_V13[name][0], pytest.approx(PUBLISHED_V13[name][1], abs=0.07))


def count_multiply_adds(network: nn.Module, images: torch.Tensor, *, all_layers: bool = False) -> int:
    """Of convolutions, as published tables count, without attention's products; with ``all_layers`` of linear layers and norms too."""
    total = 0

    def add(layer: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += output[0, 0].numel() * layer.weight.numel()

    def add_linear(layer: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += output[..., 0].numel() * layer.weight.numel()

    def add_norm(layer: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel()  # one multiplication and one addition a value

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(add)
        elif all_layers and isinstance(module, nn.Linear):
            module.register_forward_hook(add_linear)
        elif all_layers and isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(add_norm)
    network(images)
    return total
