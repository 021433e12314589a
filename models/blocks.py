"""What a class from a paper's repository or a tutorial assumes to be there: ``from models.blocks import *`` at the top of a plugin.

The blocks take the arguments that they take in YOLOv5 and ultralytics, in the same order. ``register`` and ``rules`` are there too:

    from models.blocks import *

    @register("MyAttention", channels=rules.same_width)
    class MyAttention(nn.Module):
        ...
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention.ops.common import DropPath
from models.layers.c3k import C3k, C3k2
from models.layers.compact import CIB, C2fCIB, RepVGGDW, SCDown
from models.layers.conv import DFL, Conv, ConvTranspose, CrossConv, DWConv, Size, same_padding
from models.layers.csp import C2, C3, C3SPP, Bottleneck, BottleneckCSP, C2f, C3x, RepNBottleneck, RepNCSP
from models.layers.elan import ELAN1, RepNCSPELAN4
from models.layers.framework import DWConvTranspose2d
from models.layers.ghost import C3Ghost, GhostBottleneck, GhostConv
from models.layers.pooling import MP, SP, SPP, SPPCSPC, SPPELAN, SPPF, AConv, ADown
from models.layers.reparam import RepConv, RepConvN
from models.layers.routing import CBFuse, CBLinear, Concat, Contract, Expand, Focus, ReOrg, Silence
from models.layers.transformer import C3TR, TransformerBlock, TransformerLayer
from models.spec import channel_rules as rules
from models.spec.registry import register

RepBottleneck, RepCSP = RepNBottleneck, RepNCSP  # what ultralytics calls them

__all__ = [
    "C2",
    "C3",
    "C3SPP",
    "C3TR",
    "CIB",
    "DFL",
    "ELAN1",
    "MP",
    "SP",
    "SPP",
    "SPPCSPC",
    "SPPELAN",
    "SPPF",
    "AConv",
    "ADown",
    "Bottleneck",
    "BottleneckCSP",
    "C2f",
    "C2fCIB",
    "C3Ghost",
    "C3k",
    "C3k2",
    "C3x",
    "CBFuse",
    "CBLinear",
    "Concat",
    "Contract",
    "Conv",
    "ConvTranspose",
    "CrossConv",
    "DWConv",
    "DWConvTranspose2d",
    "DropPath",
    "Expand",
    "F",
    "Focus",
    "GhostBottleneck",
    "GhostConv",
    "ReOrg",
    "RepBottleneck",
    "RepCSP",
    "RepConv",
    "RepConvN",
    "RepNBottleneck",
    "RepNCSP",
    "RepNCSPELAN4",
    "RepVGGDW",
    "SCDown",
    "Silence",
    "Tensor",
    "TransformerBlock",
    "TransformerLayer",
    "autopad",
    "math",
    "nn",
    "np",
    "register",
    "rules",
    "torch",
]  # fmt: skip


def autopad(k: Size | list[int], p: Size | None = None, d: int = 1) -> Size:
    """Padding that keeps height and width at stride 1, unless ``p`` is given.

    Args:
        k: kernel size, a number or (height, width).
        p: what is given back where it is not None.
        d: dilation.
    """
    if p is not None:
        return p
    return same_padding((k[0], k[1]) if isinstance(k, (list, tuple)) else k, d)
