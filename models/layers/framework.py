"""The framework's own layers under the names that YAML rows give them."""

from __future__ import annotations

from torch import nn

from models import channel_rules as rules
from models.registry import register

for _name in ("Upsample", "MaxPool2d", "AvgPool2d", "ZeroPad2d", "ReflectionPad2d", "Dropout2d", "SiLU", "ReLU", "LeakyReLU"):
    register(f"nn.{_name}", channels=rules.preserves)(getattr(nn, _name))
for _name in ("Conv2d", "ConvTranspose2d"):
    register(f"nn.{_name}", channels=rules.projects)(getattr(nn, _name))
register("nn.BatchNorm2d", channels=rules.attends)(nn.BatchNorm2d)
register("nn.PixelShuffle", channels=rules.folds(lambda c, factor: c // factor**2))(nn.PixelShuffle)
register("nn.PixelUnshuffle", channels=rules.folds(lambda c, factor: c * factor**2))(nn.PixelUnshuffle)
