"""The later release of YOLOv12's own repository, which its authors call turbo, in the layout of the first one.

Its area attention has a convolution ``qk`` for queries and keys and one ``v`` for values, where the first release, the paper's, has ``qkv``
with query, key and value of each head side by side; both compute the same. What computes something else, the smaller kernel of the
position convolution and grouped convolutions, stands in the rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.layers.attention.yolov12 import HEAD_CHANNELS
from utils.errors import UserError

APART, JOINED = (".attn.qk.", ".attn.v."), ".attn.qkv."


def with_joined_projections(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with every ``attn.qk`` and ``attn.v`` as ``attn.qkv``; others as they are.

    Raises:
        UserError: the shapes are not those of one attention of heads of 32 channels.
    """
    out = {}
    for name, value in weights.items():
        joined, other = name.replace(APART[0], JOINED), name.replace(APART[0], APART[1])
        if APART[0] in name and other in weights:
            out[joined] = _by_head(name, value, weights[other])
        elif APART[1] not in name or name.replace(APART[1], APART[0]) not in weights:
            out[name] = value
    return out


def _by_head(name: str, queries_keys: Tensor, values: Tensor) -> Tensor:
    """(2 C, ...) and (C, ...) to (3 C, ...), head by head; a count of batches is that of both."""
    if queries_keys.dim() == 0:
        return queries_keys
    width = values.shape[0] if values.dim() else 0
    if queries_keys.shape != (2 * width, *values.shape[1:]) or width % HEAD_CHANNELS or not width:
        shapes = f"{list(queries_keys.shape)} beside values of {list(values.shape)}"
        raise UserError(f"{name}: of shape {shapes}, expected twice as many channels, in heads of {HEAD_CHANNELS}")
    parts = [part.unflatten(0, (-1, HEAD_CHANNELS)) for part in (*queries_keys.chunk(2), values)]
    return torch.cat(parts, dim=1).flatten(0, 1)
