"""A training of a tiny network on 12 images; an epoch takes about a second."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from utils.config import Hyperparameters, TrainConfig

TINY = """
nc: 80
depth_multiple: 1.0
width_multiple: 1.0
anchors: 3
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, {block}]
  - [-1, 1, Conv, [32, 3, 2]]
head:
  - [[3, 4], 1, DDetect, [nc]]
"""
# A block that uses torch's global random generator, as dropout does.
NOISY = """
import torch
from torch import nn
from models.spec import channel_rules as rules
from models.spec.registry import register

@register("NoisyForTests", channels=rules.keep_width)
class NoisyForTests(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.rand_like(x) if self.training else x
"""
HYP = Hyperparameters(warmup_epochs=1, warmup_min_iters=0, nbs=8, mixup=0.5, close_mosaic=1)


def make_world(root: Path, *, train: int = 12, val: int = 4) -> Path:
    """Fills a folder with 12 + 4 images of bright and dark squares, a tiny model and a plugin."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        for i in range(count):
            image = rng.integers(60, 120, (64, 64, 3)).astype(np.uint8)
            label, x, y = i % 2, *rng.integers(4, 30, 2)
            image[y : y + 24, x : x + 24] = 250 * label
            (root / "images" / split / f"{i}.png").write_bytes(cv2.imencode(".png", image)[1].tobytes())
            (root / "labels" / split / f"{i}.txt").write_text(f"{label} {(x + 12) / 64} {(y + 12) / 64} {24 / 64} {24 / 64}\n")
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: [dark, bright]\n")
    (root / "tiny-v9.yaml").write_text(TINY.format(block="Conv, [16, 1, 1]"))
    (root / "noisy-v9.yaml").write_text(TINY.format(block="NoisyForTests, []"))
    (root / "noisy.py").write_text(NOISY)
    return root


def config(world: Path, folder: Path, **changes) -> TrainConfig:
    given = {
        "cfg": world / "tiny-v9.yaml", "data": world / "data.yaml", "hyp": HYP, "imgsz": 64, "epochs": 3, "batch_size": 4, "workers": 0,
        "device": "cpu", "project": folder, "noplots": True, "seed": 3,
    }  # fmt: skip
    return TrainConfig(**{**given, **changes})
