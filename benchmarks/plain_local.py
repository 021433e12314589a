"""Direct implementations of attention to neighbours, windows, axes and stripes: unfolded copies and full matrices of logits.

Each function takes a module of this project, whose weights it uses, and a feature map, and returns the output that the module must give.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.attention.ops.windows import MASKED


def msda(m: Any, x: Tensor) -> Tensor:
    """DilateFormer: keys and values of a dilated neighbourhood unfolded, a softmax over it."""
    height, width = x.shape[2:]
    groups = len(m.dilation)
    out = []
    for query, key, value, dilation in zip(*(part.chunk(groups, 1) for part in m.qkv(x).chunk(3, 1)), m.dilation):
        q = query.flatten(2).unflatten(1, (m.heads, -1)).permute(0, 1, 3, 2).unsqueeze(3)  # (B, heads, N, 1, d)
        margin = dilation * (m.kernel // 2)
        k, v = (
            F.unfold(part, m.kernel, dilation, margin).unflatten(1, (m.heads, -1, m.kernel**2)).permute(0, 1, 4, 2, 3)
            for part in (key, value)
        )  # (B, heads, N, d, taps)
        weights = (q @ k * m.scale).softmax(-1)
        out.append((weights @ v.transpose(3, 4)).squeeze(3).transpose(2, 3).reshape(query.shape))
    return m.proj(torch.cat(out, 1)).reshape(-1, x.shape[1], height, width)


def acmix(m: Any, x: Tensor) -> Tensor:
    """ACmix: keys, values and positions of a mirrored neighbourhood unfolded."""
    height, width = x.shape[2:]
    query, key, value = m.conv1(x), m.conv2(x), m.conv3(x)
    heads, taps, margin = m.heads, m.kernel_att**2, m.dilation * (m.kernel_att // 2)
    rows, columns = (torch.linspace(-1, 1, n, device=x.device) for n in (height, width))
    place = m.conv_p(torch.stack((columns.expand(height, width), rows[:, None].expand(height, width)))[None])  # (1, d, H, W)

    def unfolded(part: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, taps, H, W)
        padded = F.pad(part, [margin] * 4, mode="reflect")
        return F.unfold(padded, m.kernel_att, m.dilation).unflatten(2, (height, width)).unflatten(1, (-1, taps))

    q = query.unflatten(1, (heads, -1)) * (query.shape[1] // heads) ** -0.5  # (B, heads, d, H, W)
    keys, values = (unfolded(part).unflatten(1, (heads, -1)) for part in (key, value))  # (B, heads, d, taps, H, W)
    distance = place.unsqueeze(2) - unfolded(place)
    weights = (q.unsqueeze(3) * (keys + distance.unsqueeze(1))).sum(2).softmax(2)  # (B, heads, taps, H, W)
    attended = (weights.unsqueeze(2) * values).sum(3).flatten(1, 2)
    maps = torch.cat([part.unflatten(1, (heads, -1)).flatten(3) for part in (query, key, value)], 1)
    mixed = m.fc(maps).permute(0, 2, 1, 3).reshape(x.shape[0], -1, height, width)
    return m.rate1 * attended + m.rate2 * m.dep_conv(mixed)


def axial(m: Any, x: Tensor) -> Tensor:
    """Axial attention: a matrix of logits a column and head, then a row and head."""
    out = torch.zeros_like(x)
    for axis in m.axial_attentions:
        lines = x.permute(0, 3, 2, 1) if axis.axis == 2 else x.permute(0, 2, 3, 1)  # (B, lines, pixels, C)
        query = F.linear(lines, axis.fn["to_q"].weight)
        key, value = F.linear(lines, axis.fn["to_kv"].weight).chunk(2, -1)
        q, k, v = (t.unflatten(3, (axis.heads, -1)).transpose(2, 3) for t in (query, key, value))
        mixed = (q @ k.transpose(3, 4) * q.shape[-1] ** -0.5).softmax(-1) @ v
        mixed = F.linear(mixed.transpose(2, 3).flatten(3), axis.fn["to_out"].weight, axis.fn["to_out"].bias)
        out = out + (mixed.permute(0, 3, 2, 1) if axis.axis == 2 else mixed.permute(0, 3, 1, 2))
    return out


def swin(m: Any, x: Tensor) -> Tensor:
    """Swin: windows on (B, H, W, C), a matrix of logits a window and head, padding masked out."""
    height, width = x.shape[2:]
    rows, columns = m.window
    pixels = F.linear(x.permute(0, 2, 3, 1), m.qkv.weight, m.qkv.bias)
    padding = (0, 0, 0, -width % columns, 0, -height % rows)
    inside = F.pad(torch.ones_like(pixels[:1, ..., :1]), padding)
    pixels = F.pad(pixels, padding)
    if m.shift:
        region = torch.zeros_like(inside)
        for low, high in ((-m.shift, None), (-rows, -m.shift)):
            region[:, low:high] += 4 if high is None else 2
            region[:, :, low:high] += 16 if high is None else 8
        pixels, inside = pixels.roll((-m.shift, -m.shift), (1, 2)), inside.roll((-m.shift, -m.shift), (1, 2)) + 64 * region

    def windows(t: Tensor) -> Tensor:  # (B, H', W', C) -> (B, windows, N, C)
        return t.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

    query, key, value = (t.unflatten(3, (m.heads, -1)).transpose(2, 3) for t in windows(pixels).chunk(3, -1))
    region = windows(inside)[0]
    mask = (region != region.transpose(1, 2)).unsqueeze(1) * MASKED
    bias = m.relative_position_bias_table[m.relative_position_index].permute(2, 0, 1)
    logits = query @ key.transpose(3, 4) * query.shape[-1] ** -0.5 + bias + mask  # (B, windows, heads, N, N)
    out = (logits.softmax(-1) @ value).transpose(2, 3).flatten(3)
    grid = out.unflatten(2, (rows, columns)).unflatten(1, (pixels.shape[1] // rows, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    grid = grid.roll((m.shift, m.shift), (1, 2))[:, :height, :width]
    return F.linear(grid, m.proj.weight, m.proj.bias).permute(0, 3, 1, 2)


def criss_cross(m: Any, x: Tensor) -> Tensor:
    """CCNet: logits along the column and the row of every pixel, one softmax over both."""
    height, width = x.shape[2:]
    query, key, value = m.query_conv(x), m.key_conv(x), m.value_conv(x)
    down = torch.einsum("bchw,bcgw->bhwg", query, key)
    down = down.masked_fill(torch.eye(height, dtype=torch.bool, device=x.device)[:, None], float("-inf"))
    across = torch.einsum("bchw,bchv->bhwv", query, key)
    down, across = torch.cat((down, across), 3).softmax(3).split((height, width), 3)
    return x + m.gamma * (torch.einsum("bhwg,bcgw->bchw", down, value) + torch.einsum("bhwv,bchv->bchw", across, value))


def cot(m: Any, x: Tensor) -> Tensor:
    """Contextual transformer: the values of every neighbourhood unfolded, each weighted by its local matrix."""
    static, taps = m.key_embed(x), m.kernel**2
    matrices = m.attention_embed(torch.cat((static, x), 1)).unflatten(1, (m.heads, 1, taps))
    values = F.unfold(m.value_embed(x), m.kernel, padding=m.kernel // 2).unflatten(2, x.shape[2:])
    values = values.unflatten(1, (m.heads, -1, taps))  # (B, heads, C / heads, taps, H, W)
    dynamic = F.silu(m.bn((values * matrices).sum(3).flatten(1, 2)))
    choice = m.fuse((static + dynamic).mean((2, 3), keepdim=True)).unflatten(1, (2, -1)).softmax(1)
    return static * choice[:, 0] + dynamic * choice[:, 1]


def irmb(m: Any, x: Tensor) -> Tensor:
    """iRMB: every n-th pixel in a window, a matrix of logits a window and head."""
    height, width = x.shape[2:]
    side = m.window
    padded = F.pad(m.norm(x), (0, -width % side, 0, -height % side))
    grid = (padded.shape[2] // side, padded.shape[3] // side)

    def groups(t: Tensor) -> Tensor:  # (B, C, H', W') -> (B groups, heads, N, d)
        t = t.reshape(t.shape[0], m.heads, -1, side, grid[0], side, grid[1])
        return t.permute(0, 4, 6, 1, 3, 5, 2).reshape(t.shape[0] * grid[0] * grid[1], m.heads, side * side, -1)

    query, key, value = (groups(t) for t in (*m.qk(padded).chunk(2, 1), m.v(padded)))
    out = (query @ key.transpose(2, 3) * m.scale).softmax(-1) @ value
    out = out.reshape(x.shape[0], *grid, m.heads, side, side, -1).permute(0, 3, 6, 4, 1, 5, 2)
    out = out.reshape(x.shape[0], -1, side * grid[0], side * grid[1])[:, :, :height, :width]
    return x + m.proj(out + m.conv_local(out))


def area(m: Any, x: Tensor) -> Tensor:
    """Area attention: a matrix of logits a stripe and head; the stripes divide the map."""
    pixels = m.qkv(x).flatten(2).unflatten(2, (m.area, -1)).transpose(1, 2)  # (B, area, 3 C, N / area)
    query, key, value = pixels.unflatten(2, (m.heads, -1)).chunk(3, 3)  # (B, area, heads, d, N / area)
    weights = (query.transpose(3, 4) @ key * query.shape[3] ** -0.5).softmax(-1)
    out, value = ((t.flatten(2, 3).transpose(1, 2).reshape(x.shape)) for t in (value @ weights.transpose(3, 4), value))
    return m.proj(out + m.pe(value))


def dual(m: Any, x: Tensor) -> Tensor:
    """DANet: a matrix of logits between all pixels, another between all channels."""
    query, key, value = (layer(x).flatten(2) for layer in (m.query_conv, m.key_conv, m.value_conv))
    by_position = value @ (query.transpose(1, 2) @ key).softmax(2).transpose(1, 2)
    pixels = x.flatten(2)
    by_channel = (pixels @ -pixels.transpose(1, 2)).softmax(2) @ pixels
    first, second = (part.reshape(x.shape) for part in (by_position, by_channel))
    return m.position_out(x + m.alpha * first) + m.channel_out(x + m.beta * second)
