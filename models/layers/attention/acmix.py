"""Attention and convolution from the same projections: ACmix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.attention.ops.neighbourhood import Neighbourhood, neighbourhood_attention
from models.layers.attention.ops.shared import reflect_pad, unit_line
from models.spec import channel_rules as rules
from models.spec.registry import register


@register(
    "ACmix", channels=rules.out_width, kind="attention", paper="On the Integration of Self-Attention and Convolution, arXiv 2111.14556"
)
class ACmix(nn.Module):
    """α · neighbourhood attention + β · convolution, both from the same q, k, v (equations 10 to 13 of the paper).

    The position term p(i) - p(j) enters the logits as -q · p(j): the centre's term is the same for all neighbours and cancels in
    the softmax. So neighbours are shifted views of one padded map of k - p. The border is mirrored, as published. Unlike the published
    module it works in half precision, with any dilation, and with a stride on any size. ``dep_conv`` has no bias, as in its weights.

    Args:
        in_planes: channels in.
        out_planes: channels out, a multiple of ``head``.
        kernel_att: side of the neighbourhood, odd.
        head: number of heads.
        kernel_conv: side of the convolution, 3.
        stride: the output is (ceil(H / stride), ceil(W / stride)).
        dilation: of the neighbourhood.

    Raises:
        ValueError: ``head`` does not divide ``out_planes``, ``kernel_att`` is even, or ``kernel_conv`` is not 3.
    """

    def __init__(
        self, in_planes: int, out_planes: int, kernel_att: int = 7, head: int = 4, kernel_conv: int = 3, stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        if out_planes % head or kernel_att % 2 == 0 or kernel_conv != 3:
            raise ValueError(
                f"ACmix: head {head} should divide {out_planes}, kernel_att {kernel_att} be odd and kernel_conv {kernel_conv} be 3"
            )
        width = out_planes // head
        self.heads, self.kernel_att, self.stride, self.dilation = head, kernel_att, stride, dilation
        self.conv1 = nn.Conv2d(in_planes, out_planes, 1)
        self.conv2 = nn.Conv2d(in_planes, out_planes, 1)
        self.conv3 = nn.Conv2d(in_planes, out_planes, 1)
        self.conv_p = nn.Conv2d(2, width, 1)
        self.fc = nn.Conv2d(3 * head, kernel_conv**2, 1, bias=False)
        self.dep_conv = nn.Conv2d(kernel_conv**2 * width, out_planes, kernel_conv, stride, kernel_conv // 2, groups=width, bias=False)
        self.rate1 = nn.Parameter(torch.full((1,), 0.5))
        self.rate2 = nn.Parameter(torch.full((1,), 0.5))
        self._start_as_shifts()

    @torch.no_grad()
    def _start_as_shifts(self) -> None:
        """Kernel t of a group passes pixel t of its window on: the sum over t is then a convolution of q, k and v."""
        count = self.dep_conv.in_channels // self.dep_conv.groups
        self.dep_conv.weight.copy_(torch.eye(count).view(1, count, *self.dep_conv.kernel_size).expand_as(self.dep_conv.weight))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_planes, H, W) -> (B, out_planes, ceil(H / stride), ceil(W / stride))."""
        query, key, value = self.conv1(x), self.conv2(x), self.conv3(x)
        return self.rate1 * self._attend(query, key, value) + self.rate2 * self._convolve(query, key, value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        margin = self.dilation * (self.kernel_att // 2)
        key = key - self.conv_p(_positions(key)).repeat(1, self.heads, 1, 1)
        query = query[:, :, :: self.stride, :: self.stride]
        at = Neighbourhood(self.kernel_att, self.heads, self.dilation, self.stride)
        scale = (query.shape[1] // self.heads) ** -0.5
        return neighbourhood_attention(query, reflect_pad(key, margin), reflect_pad(value, margin), at, scale=scale)

    def _convolve(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        height = query.shape[2]
        # the three maps as (B, 3 heads, d, H W): a pixel and channel of a head is a place for the 1x1 convolution
        stacked = torch.cat([part.unflatten(1, (self.heads, -1)).flatten(3) for part in (query, key, value)], 1)
        mixed = self.fc(stacked).transpose(1, 2).flatten(1, 2)  # (B, d kernel², H W), channel-major
        return self.dep_conv(mixed.unflatten(2, (height, -1)))


def _positions(like: Tensor) -> Tensor:
    """Columns and rows from -1 to 1: (1, 2, H, W)."""
    height, width = like.shape[-2:]
    rows, columns = unit_line(height, like), unit_line(width, like)
    grid = torch.stack((columns.expand(height, width), rows[:, None].expand(height, width)))
    return grid.unsqueeze(0).to(like.dtype)
