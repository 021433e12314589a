"""Inverted residual mobile block: attention on a dilated grid inside an inverted residual.

Rethinking Mobile Block for Efficient Attention-based Models (EMO), arXiv 2301.01146.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.layers.attention.ops.common import DropPath, NamedLayerNorm, pad_to_multiple
from models.layers.attention.ops.shared import divisor_up_to, global_mean
from models.layers.attention.ops.windows import Tiling, project, window_attention
from models.spec import channel_rules as rules
from models.spec.registry import register

NORMS = {
    "bn_2d": lambda c: nn.BatchNorm2d(c, eps=1e-6),
    "ln_2d": lambda c: NamedLayerNorm(c, eps=1e-6),
    "none": lambda c: nn.Identity(),
}
ACTIVATIONS = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "gelu": nn.GELU, "silu": nn.SiLU, "swish": nn.SiLU, "mish": nn.Mish, "hswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid, "hsigmoid": nn.Hardsigmoid, "tanh": nn.Tanh, "none": nn.Identity,
}  # fmt: skip


@register(
    "iRMB",
    channels=rules.out_width,
    kind="attention",
    paper="Rethinking Mobile Block for Efficient Attention-based Models, arXiv 2301.01146",
)
class iRMB(nn.Module):
    """x + proj(y + dwconv(y)), y = attention(v) among every n-th pixel (equations 2 to 5 of the paper).

    The map is padded to multiples of the window with zeros (they take part, as published); pixels with equal remainders attend to
    each other, so that a group spans the map.

    Args:
        dim_in: channels in.
        dim_out: channels out.
        norm_in: normalise the input.
        has_skip: add the input where widths and stride allow.
        exp_ratio: inner width, in multiples of ``dim_in``.
        norm_layer: of the input: ``bn_2d``, ``ln_2d`` (over the channels of each pixel) or ``none``.
        act_layer: activation after the value's projection: ``relu``, ``gelu``, ``silu``, ``none`` ...
        v_proj: without attention, whether the value is projected at all (then ``exp_ratio`` must be 1).
        dw_ks: kernel of the depth-wise convolution, odd.
        stride: of the depth-wise convolution.
        dilation: of the depth-wise convolution, which keeps the map's size whatever it is (the published one pads as for 1).
        se_ratio: above 0, squeeze and excitation of the depth-wise convolution's output, with this share of the inner width.
        dim_head: channels a head; the number of heads is ``dim_in // dim_head``, or the next smaller one that divides.
        window_size: pixels a side of each attention group; 0 for the whole map.
        attn_s: whether there is attention.
        qkv_bias: biases in the projections.
        attn_drop: dropout of the attention weights.
        drop: dropout after the last projection.
        drop_path: rate of stochastic depth.
        v_group: project the value within each head's channels alone.
        attn_pre: attend to the normalised input and project afterwards.

    Raises:
        ValueError: an unknown norm or activation, or with ``v_group`` an inner width that the heads do not divide.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        norm_in: bool = True,
        has_skip: bool = True,
        exp_ratio: float = 1.0,
        norm_layer: str = "bn_2d",
        act_layer: str = "relu",
        v_proj: bool = True,
        dw_ks: int = 3,
        stride: int = 1,
        dilation: int = 1,
        se_ratio: float = 0.0,
        *,
        dim_head: int = 64,
        window_size: int = 7,
        attn_s: bool = True,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        v_group: bool = False,
        attn_pre: bool = False,
    ) -> None:
        super().__init__()
        if norm_layer not in NORMS or act_layer not in ACTIVATIONS:
            known = f"norm_layer {list(NORMS)} and act_layer {list(ACTIVATIONS)}"
            raise ValueError(f"iRMB: norm_layer {norm_layer!r}, act_layer {act_layer!r}; known are {known}")
        hidden = int(dim_in * exp_ratio)
        self.attn_pre, self.window, self.attn_drop = attn_pre, window_size, attn_drop
        self.heads = divisor_up_to(dim_in, max(1, dim_in // dim_head))
        self.scale = (dim_in // self.heads) ** -0.5
        self.skip = has_skip and dim_in == dim_out and stride == 1
        self.norm = NORMS[norm_layer](dim_in) if norm_in else nn.Identity()
        self.qk = _Projection(dim_in, 2 * dim_in, bias=qkv_bias) if attn_s else None
        groups = self.heads if v_group else 1
        if hidden % groups:
            raise ValueError(f"iRMB: v_group: the inner width {hidden} should be a multiple of the {groups} heads")
        act = ACTIVATIONS[act_layer]
        self.v = _Projection(dim_in, hidden, bias=qkv_bias, act=act(), groups=groups) if attn_s or v_proj else nn.Identity()
        self.conv_local = _local(hidden, dw_ks, stride, dilation)
        self.se = _SqueezeExcite(hidden, max(1, round(hidden * se_ratio)), act()) if se_ratio > 0 else nn.Identity()
        self.proj = _Projection(hidden, dim_out, bias=False)
        self.proj_drop = nn.Dropout(drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim_in, H, W) -> (B, dim_out, H / stride, W / stride)."""
        shortcut, x = x, self.norm(x)
        x = self.v(x) if self.qk is None else self._attend(x, self.qk)
        local = self.se(self.conv_local(x))
        out = self.proj_drop(self.proj(x + local if self.skip else local))
        return shortcut + self.drop_path(out) if self.skip else out

    def _attend(self, x: Tensor, qk: _Projection) -> Tensor:
        """(B, dim_in, H, W) -> (B, hidden, H, W)."""
        height, width = x.shape[-2:]
        rows, columns = (self.window, self.window) if self.window > 0 else (height, width)
        x = pad_to_multiple(x, rows, columns)
        value = x if self.attn_pre else self.v(x)
        query, key = project(x, qk.conv).chunk(2, 1)
        tiling, drop = Tiling(rows, columns, self.heads, spread=True), self.attn_drop if self.training else 0.0
        out = window_attention(query, key, value, tiling, scale=self.scale, dropout=drop)
        return (self.v(out) if self.attn_pre else out)[:, :, :height, :width]


class _Projection(nn.Sequential):
    """A pointwise convolution and, where given, an activation: (B, channels, H, W) -> (B, out, H, W)."""

    conv: nn.Conv2d

    def __init__(self, channels: int, out: int, *, bias: bool, act: nn.Module | None = None, groups: int = 1) -> None:
        super().__init__()
        self.add_module("conv", nn.Conv2d(channels, out, 1, groups=groups, bias=bias))
        if act is not None:
            self.add_module("act", act)


class _SqueezeExcite(nn.Module):
    """x · σ(W₂ act(W₁ mean(x))), with biases, under the published keys ``conv_reduce`` and ``conv_expand``."""

    def __init__(self, channels: int, hidden: int, act: nn.Module) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, hidden, 1)
        self.act1 = act
        self.conv_expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x * self.conv_expand(self.act1(self.conv_reduce(global_mean(x)))).sigmoid()


def _local(channels: int, kernel: int, stride: int, dilation: int) -> nn.Sequential:
    """A depth-wise convolution to ceil(H / stride), batch norm and SiLU, under the published keys."""
    margin = -(-(dilation * (kernel - 1) + 1 - stride) // 2)
    layer = nn.Sequential()
    layer.add_module("conv", nn.Conv2d(channels, channels, kernel, stride, margin, dilation, groups=channels, bias=False))
    layer.add_module("norm", nn.BatchNorm2d(channels, eps=1e-6))
    layer.add_module("act", nn.SiLU())
    return layer
