"""Adaptive hypergraph computation, and the depth-wise separable blocks around it.

YOLOv13: Real-Time Object Detection with Hypergraph-Enhanced Adaptive Visual Perception, arXiv 2506.17733.
Its neck is models/necks/hyperace.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.layers.attention.ops.shared import divisor_up_to
from models.layers.conv import Activation, Conv, FusedConv, Size, fuse_conv_bn, make_activation, same_padding
from models.layers.csp import C3, SplitAggregation
from models.layers.explained import PlaneMap, Query, View
from models.spec import channel_rules as rules
from models.spec.registry import register

HEAD_CHANNELS = 16  # YOLOv13's
CONTEXTS = {"mean": 1, "max": 1, "both": 2}  # what the prototypes' offsets are computed from: vectors a pixel's width
LARGER_SCALES = ("l", "x")  # of a file with scales, in which every DSC3k2 is one of DSC3k
INNER_BOTTLENECKS = 2  # of each DSC3k in a DSC3k2
PAPER = "YOLOv13: Real-Time Object Detection with Hypergraph-Enhanced Adaptive Visual Perception, arXiv 2506.17733"


class AdaHyperedgeGen(nn.Module):
    """How much each pixel takes part in each hyperedge (section 3.2 of the paper, adaptive hyperedge generation).

    Prototypes of the hyperedges are learned vectors plus offsets computed from the image; the participation is a softmax over the pixels of
    the similarity of pixel and prototype, the mean over heads of q · p / √d. A mean of heads' products is one product of whole vectors, so
    that no tensor has a dimension for heads.

    Args:
        node_dim: channels of a pixel.
        num_hyperedges: number of hyperedges.
        num_heads: number of heads.
        dropout: of the similarities, in training.
        context: offsets from the image's mean, its maximum, or both: ``"mean"``, ``"max"`` or ``"both"``.

    Raises:
        ValueError: ``num_heads`` does not divide ``node_dim``, there is no hyperedge, or ``context`` is not known.
    """

    def __init__(self, node_dim: int, num_hyperedges: int, num_heads: int = 4, dropout: float = 0.1, context: str = "both") -> None:
        super().__init__()
        if node_dim % num_heads:
            raise ValueError(f"hypergraph: {num_heads} heads should divide {node_dim} channels")
        if num_hyperedges < 1:
            raise ValueError(f"hypergraph: num_hyperedges should be at least 1, not {num_hyperedges}")
        if context not in CONTEXTS:
            raise ValueError(f"hypergraph: context should be one of {', '.join(CONTEXTS)}, not {context!r}")
        self.context = context
        self.scale = 1 / (num_heads * math.sqrt(node_dim // num_heads))
        self.prototype_base = nn.Parameter(torch.empty(num_hyperedges, node_dim))
        nn.init.xavier_uniform_(self.prototype_base)
        self.context_net = nn.Linear(CONTEXTS[context] * node_dim, num_hyperedges * node_dim)
        self.pre_head_proj = nn.Linear(node_dim, node_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, N, C) to participations (B, N, E), which sum to 1 over the pixels."""
        offsets = self.context_net(self._context(pixels)).unflatten(1, self.prototype_base.shape)
        prototypes = self.prototype_base + offsets  # (B, E, C)
        similarity = self.pre_head_proj(pixels) @ (self.scale * prototypes).transpose(1, 2)
        return self.dropout(similarity).softmax(1)

    def _context(self, pixels: Tensor) -> Tensor:
        """(B, N, C) -> (B, C), or (B, 2 C) for both."""
        if self.context == "mean":
            return pixels.mean(1)
        if self.context == "max":
            return pixels.amax(1)
        return torch.cat((pixels.mean(1), pixels.amax(1)), 1)


class AdaHGConv(nn.Module):
    """x + φ(A ψ(Aᵀ x)), φ and ψ a linear layer and GELU, A of :class:`AdaHyperedgeGen`: pixels to hyperedges and back (section 3.2).

    Args: as :class:`AdaHyperedgeGen` has them, ``embed_dim`` for the channels of a pixel.
    """

    def __init__(self, embed_dim: int, num_hyperedges: int = 16, num_heads: int = 4, dropout: float = 0.1, context: str = "both") -> None:
        super().__init__()
        self.edge_generator = AdaHyperedgeGen(embed_dim, num_hyperedges, num_heads, dropout, context)
        self.edge_proj = nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.GELU())
        self.node_proj = nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.GELU())

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        participation = self.edge_generator(pixels)
        hyperedges = self.edge_proj(participation.transpose(1, 2) @ pixels)  # (B, E, C)
        return pixels + self.node_proj(participation @ hyperedges)


@register("AdaHGComputation", channels=rules.same_width, kind="attention", paper=PAPER)
class AdaHGComputation(nn.Module):
    """Hypergraph convolution of a map's pixels: memory grows with pixels times hyperedges (section 3.2 of the paper).

    Args:
        embed_dim: channels in and out.
        num_hyperedges: number of hyperedges.
        num_heads: number of heads; None for about 16 channels a head.
        dropout: of the similarities, in training.
        context: what the prototypes' offsets are computed from, as :class:`AdaHyperedgeGen` has it.

    Raises:
        ValueError: as of :class:`AdaHyperedgeGen`.
    """

    def __init__(
        self, embed_dim: int, num_hyperedges: int = 16, num_heads: int | None = None, dropout: float = 0.1, context: str = "both"
    ) -> None:
        super().__init__()
        if num_heads is None:
            num_heads = divisor_up_to(embed_dim, max(1, embed_dim // HEAD_CHANNELS))
        self.hgnn = AdaHGConv(embed_dim, num_hyperedges, num_heads, dropout, context)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return self.hgnn(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)

    def explain(self, x: Tensor, query: Query) -> tuple[View, ...]:
        """What one pixel receives from each pixel through all hyperedges, and the participation in each hyperedge."""
        participation = self.hgnn.edge_generator(x.flatten(2).transpose(1, 2))[0]  # (N, E)
        height, width = x.shape[2:]
        received = participation @ participation[query.cell_number(height, width)]
        views = [PlaneMap("exchange with the query over all hyperedges", received.unflatten(0, (height, width)), at_query=True)]
        for number, part in enumerate(participation.T):
            views.append(PlaneMap(f"participation in hyperedge {number}", part.unflatten(0, (height, width))))
        return tuple(views)


@register("C3AH", channels=rules.out_width, kind="attention", paper=PAPER)
class C3AH(nn.Module):
    """CSP block with adaptive hypergraph computation on one path (figure 3 of the paper); (B, c1, H, W) to (B, c2, H, W).

    Args:
        c1: input channels.
        c2: output channels.
        e: inner channels per output channel.
        num_hyperedges: number of hyperedges.
        context: as :class:`AdaHGComputation` has it.
    """

    def __init__(self, c1: int, c2: int, e: float = 1.0, num_hyperedges: int = 8, context: str = "both") -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden)
        self.cv2 = Conv(c1, hidden)
        self.m = AdaHGComputation(hidden, num_hyperedges, context=context)
        self.cv3 = Conv(2 * hidden, c2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c1, H, W) -> (B, c2, H, W)."""
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


@register("DSConv", channels=rules.out_width, paper=PAPER)
class DSConv(nn.Module):
    """Depth-wise convolution, pointwise convolution, batch norm, activation; (B, c1, H, W) to (B, c2, ceil(H/s), ceil(W/s)).

    Args:
        c1: input channels.
        c2: output channels.
        k: kernel size of the depth-wise convolution.
        s: its stride.
        p: its padding; None keeps the size at stride 1.
        d: its dilation.
        bias: of both convolutions.
        act: True for the network's default activation, a module for that one, False or None for none.
    """

    def __init__(
        self, c1: int, c2: int, k: Size = 3, s: int = 1, p: Size | None = None, d: int = 1, bias: bool = False, act: Activation = True
    ) -> None:
        super().__init__()
        self.dw = nn.Conv2d(c1, c1, k, s, same_padding(k, d) if p is None else p, d, groups=c1, bias=bias)
        self.pw = nn.Conv2d(c1, c2, 1, bias=bias)
        self.bn = nn.BatchNorm2d(c2)
        self.act = make_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.pw(self.dw(x))))

    def fused(self) -> FusedDSConv:
        """The same function in eval mode with the batch norm folded into the pointwise convolution."""
        return FusedDSConv(self.dw, FusedConv(fuse_conv_bn(self.pw, self.bn), self.act)).train(self.training)


class FusedDSConv(nn.Module):
    """The inference form of :class:`DSConv`."""

    def __init__(self, dw: nn.Conv2d, pw: FusedConv) -> None:
        super().__init__()
        self.dw, self.pw = dw, pw

    def forward(self, x: Tensor) -> Tensor:
        return self.pw(self.dw(x))


@register("DSBottleneck", channels=rules.out_width, paper=PAPER)
class DSBottleneck(nn.Module):
    """A bottleneck of two :class:`DSConv`, the second with a large kernel; (B, c1, H, W) to (B, c2, H, W).

    Args:
        c1: input channels.
        c2: output channels.
        shortcut: add the input where the widths allow it.
        e: inner channels per output channel.
        k1: kernel size of the first.
        k2: kernel size of the second.
        d2: its dilation.
    """

    def __init__(self, c1: int, c2: int, shortcut: bool = True, e: float = 0.5, k1: int = 3, k2: int = 5, d2: int = 1) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = DSConv(c1, hidden, k1)
        self.cv2 = DSConv(hidden, c2, k2, d=d2)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


@register("DSC3k", channels=rules.out_width_repeated, paper=PAPER)
class DSC3k(C3):
    """:class:`C3` with :class:`DSBottleneck`; (B, c1, H, W) to (B, c2, H, W).

    Args:
        c1: input channels.
        c2: output channels.
        n: number of bottlenecks.
        shortcut: whether each adds its input.
        g: has no effect; published rows count it.
        e: inner channels per output channel.
        k1: kernel size of each first convolution.
        k2: kernel size of each second convolution.
        d2: its dilation.
    """

    def __init__(
        self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5, k1: int = 3, k2: int = 5, d2: int = 1
    ) -> None:
        super().__init__(c1, c2, 0, e=e)
        c = int(c2 * e)
        self.m = nn.Sequential(*(DSBottleneck(c, c, shortcut, 1.0, k1, k2, d2) for _ in range(n)))


@register("DSC3k2", channels=rules.out_width_repeated, paper=PAPER)
class DSC3k2(SplitAggregation):
    """C2f whose inner blocks are depth-wise separable (figure 4 of the paper); (B, c1, H, W) to (B, c2, H, W).

    Args:
        c1: input channels.
        c2: output channels.
        n: number of inner blocks.
        dsc3k: they are :class:`DSC3k` of two bottlenecks, not single bottlenecks; always so at scales l and x of a file with scales.
        e: inner channels per output channel.
        g: has no effect; published rows count it.
        shortcut: whether each bottleneck adds its input.
        k1: kernel size of each first convolution.
        k2: kernel size of each second convolution.
        d2: its dilation.
    """

    def __init__(
        self,
        c1: int,
        c2: int,
        n: int = 1,
        dsc3k: bool = False,
        e: float = 0.5,
        g: int = 1,
        shortcut: bool = True,
        k1: int = 3,
        k2: int = 7,
        d2: int = 1,
    ) -> None:
        def block(c: int) -> nn.Module:
            if dsc3k:
                return DSC3k(c, c, INNER_BOTTLENECKS, shortcut, g, 1.0, k1, k2, d2)
            return DSBottleneck(c, c, shortcut, 1.0, k1, k2, d2)

        super().__init__(c1, c2, n, e, block)

    @classmethod
    def row_options(cls, placed: Mapping[str, Any], scale: str) -> dict[str, Any]:
        """``dsc3k`` at the larger scales, whatever the row has in its place: published files rely on it."""
        return {"dsc3k": True} if scale in LARGER_SCALES else {}
