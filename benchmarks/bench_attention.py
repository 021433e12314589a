"""Time and peak memory of attention modules, forward and backward, compared with direct implementations of the papers' formulas.

    python benchmarks/bench_attention.py                        # CPU, both shapes, both memory layouts
    python benchmarks/bench_attention.py --device cuda --only NLBlockND-embedded MHSA --shapes 1x256x80x80

Every figure is measured in a separate process, alternating between the plain form and the module, with the same weights and input. Memory
is the peak beyond weights, input and a first pass over a small map (resident set on a CPU, the allocator's peak on a GPU); time is the best
of several repeats, on a CPU in processor time, which other programs affect least. A plain form whose matrix of position pairs exceeds
``--limit-gb`` is not run, and its memory is given as ``> … MB``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

SHAPES = ("1x256x80x80", "8x256x40x40", "1x256x40x40")


class Case(NamedTuple):
    """A module and a plain implementation of the same function."""

    build: Callable[[int], nn.Module]
    plain: Callable[[Any, Tensor], Tensor]
    pair_floats: Callable[[int, int], float] = lambda n, c: 0.0  # floats of the largest tensor of pairs, for n positions, c channels


def main() -> None:
    """Prints the table row by row; with ``--one`` measures one side of one row and prints JSON."""
    args = _arguments()
    if args.one:
        print(json.dumps(_measure(args)))
        return
    columns = ("module", "shape", "layout", "plain ms", "ours ms", "faster", "plain MB", "ours MB", "less memory", "difference")
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)
    for name in args.only or _cases():
        for shape in args.shapes:
            for layout in ("nchw", "channels_last"):
                print("| " + " | ".join(_row(args, name, shape, layout)) + " |", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), help="BxCxHxW")
    parser.add_argument("--only", nargs="+", help="module names of the table")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-gb", type=float, default=4.0, help="largest tensor of pairs that a plain form may build")
    parser.add_argument("--one", nargs=4, metavar=("NAME", "SHAPE", "LAYOUT", "SIDE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _row(args: argparse.Namespace, name: str, shape: str, layout: str) -> list[str]:
    batch, channels, height, width = map(int, shape.split("x"))
    pairs_mb = 4 * batch * _cases()[name].pair_floats(height * width, channels) / 2**20
    ours = _child(args, name, shape, layout, "ours")
    head, own = [name, shape, layout], (f"{ours['ms']:.0f}", f"{ours['mb']:.0f}")
    if pairs_mb > args.limit_gb * 1024:
        return [*head, "–", own[0], "–", f"> {pairs_mb:.0f}", own[1], f"> {pairs_mb / max(ours['mb'], 1):.0f}x", "–"]
    plain = _child(args, name, shape, layout, "plain")
    faster, less = f"{plain['ms'] / ours['ms']:.1f}x", f"{plain['mb'] / max(ours['mb'], 1):.1f}x"
    return [*head, f"{plain['ms']:.0f}", own[0], faster, f"{plain['mb']:.0f}", own[1], less, f"{ours['difference']:.0e}"]


def _child(args: argparse.Namespace, *one: str) -> dict[str, float]:
    """Measures time in one process and memory in another, whose allocator returns freed tensors immediately (which costs time)."""
    command = [sys.executable, __file__, "--one", *one, "--device", args.device]
    command += ["--threads", str(args.threads), "--limit-gb", str(args.limit_gb), "--repeats"]
    exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    timed, sized = (
        json.loads(subprocess.run([*command, repeats], check=True, capture_output=True, text=True, env=environment).stdout)
        for repeats, environment in ((str(args.repeats), None), ("1", exact))
    )
    return {**timed, "mb": sized["mb"]}


def _measure(args: argparse.Namespace) -> dict[str, float]:
    """Measures one side of one row: milliseconds, megabytes, and (for ours, if the plain form fits) the largest relative difference."""
    name, shape, layout, side = args.one
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    case = _cases()[name]
    size = tuple(map(int, shape.split("x")))
    module = case.build(size[1]).to(args.device).eval()
    for parameter in module.parameters():  # a block that begins as the identity would compare nothing
        if parameter.dim() < 2:
            nn.init.normal_(parameter, 1.0, 0.1)
    x = torch.randn(size, device=args.device)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    run = module if side == "ours" else partial(case.plain, module)
    _seconds(run, x.detach()[:1, :, :16, :16].clone(memory_format=torch.preserve_format).requires_grad_())
    before = _peak_mb(args.device)
    result = {"ms": 1e3 * min(_seconds(run, x) for _ in range(args.repeats)), "mb": _peak_mb(args.device) - before}
    fits = 4 * size[0] * case.pair_floats(size[2] * size[3], size[1]) / 2**30 <= args.limit_gb
    if side == "ours" and fits:
        with torch.no_grad():
            expected = case.plain(module, x)
            result["difference"] = float((module(x) - expected).abs().max() / expected.abs().max())
    return result


def _seconds(run: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Times one forward and backward pass."""
    clock = time.process_time if x.device.type == "cpu" else time.perf_counter
    started = clock()
    y = run(x)
    y.backward(torch.ones_like(y))
    if x.device.type != "cpu":
        torch.cuda.synchronize()
    return clock() - started


def _peak_mb(device: str) -> float:
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return torch.cuda.max_memory_allocated() / 2**20


def _cases() -> dict[str, Case]:
    from models.layers.attention.bilevel_routing import BiLevelRoutingAttention
    from models.layers.attention.bilevel_routing_nchw import BiLevelRoutingAttentionNCHW
    from models.layers.attention.botnet import MHSA
    from models.layers.attention.cloformer import CloAttention
    from models.layers.attention.focalnet import FocalModulation
    from models.layers.attention.nonlocal_block import NLBlockND

    def square(n: int, c: int) -> float:
        return n * n

    def nonlocal_case(mode: str) -> Case:
        pairs = (lambda n, c: n * n * c) if mode == "concatenate" else square
        return Case(lambda c: NLBlockND(c, mode=mode), _plain_nonlocal, pairs)

    return {
        "BiLevelRoutingAttention": Case(BiLevelRoutingAttention, _plain_bilevel),
        "nchwBRA": Case(BiLevelRoutingAttentionNCHW, _plain_bilevel_nchw),
        "FocalModulation": Case(FocalModulation, _plain_focal),
        "CloAttention": Case(CloAttention, _plain_clo),
        **{f"NLBlockND-{mode}": nonlocal_case(mode) for mode in ("gaussian", "embedded", "dot", "concatenate")},
        "MHSA": Case(lambda c: MHSA(c, 20, 20, pos_emb=True), _plain_mhsa, lambda n, c: 4 * n * n),
        **_local_cases(),
    }


def _local_cases() -> dict[str, Case]:
    """Attention to neighbours, windows, axes and stripes."""
    import plain_local as plain  # beside this file

    from models.layers.attention.acmix import ACmix
    from models.layers.attention.axial import AxialAttention
    from models.layers.attention.ccnet import CrissCross
    from models.layers.attention.cotnet import CoTAttention
    from models.layers.attention.danet import DANet
    from models.layers.attention.dilateformer import MSDA
    from models.layers.attention.emo import iRMB
    from models.layers.attention.swin import SwinWindowAttention
    from models.layers.attention.yolov12 import AreaAttention

    return {
        "MSDA": Case(MSDA, plain.msda),
        "ACmix": Case(lambda c: ACmix(c, c), plain.acmix),
        "AxialAttention": Case(AxialAttention, plain.axial),
        "SwinWindowAttention": Case(SwinWindowAttention, plain.swin),
        "SwinWindowAttention-shifted": Case(lambda c: SwinWindowAttention(c, shift_size=3), plain.swin),
        "CrissCross": Case(CrissCross, plain.criss_cross),
        "DANet": Case(DANet, plain.dual, lambda n, c: n * n),
        "CoTAttention": Case(CoTAttention, plain.cot),
        "iRMB": Case(lambda c: iRMB(c, c), plain.irmb),
        "AreaAttention": Case(lambda c: AreaAttention(c, area=4), plain.area, lambda n, c: 2 * n * n),
    }


def _plain_focal(m: Any, x: Tensor) -> Tensor:
    """Linear layers on (B, H, W, C), the rest on (B, C, H, W)."""
    projected = F.linear(x.permute(0, 2, 3, 1), m.f.weight, m.f.bias).permute(0, 3, 1, 2).contiguous()
    query, context, gates = projected.split((m.dim, m.dim, m.levels + 1), dim=1)
    total = torch.zeros_like(context)
    for level, layer in enumerate(m.focal_layers):
        context = layer(context)
        total = total + context * gates[:, level : level + 1]
    total = total + F.gelu(context.mean(2, keepdim=True).mean(3, keepdim=True)) * gates[:, m.levels :]
    out = (query * m.h(total)).permute(0, 2, 3, 1).contiguous()
    return F.linear(out, m.proj.weight, m.proj.bias).permute(0, 3, 1, 2)


def _plain_bilevel(m: Any, x: Tensor) -> Tensor:
    """Windows on (B, n², h w, C); keys and values gathered from all pairs of windows, softmax over a matrix of logits."""
    n, dim, heads = m.n_win, m.dim, m.num_heads
    height, width = x.shape[2:]
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, -width % n, 0, -height % n))
    batch, rows, columns, _ = x.shape
    h, w = rows // n, columns // n
    qkv = m.qkv.qkv(x.reshape(batch, n, h, n, w, dim).transpose(2, 3).reshape(batch, n * n, h * w, dim))
    query, key, value = qkv.split(dim, dim=-1)
    index = torch.topk((query.mean(2) * m.scale).detach() @ key.mean(2).detach().transpose(1, 2), m.topk, dim=-1).indices
    pairs = torch.cat([key, value], dim=-1).unsqueeze(1).expand(-1, n * n, -1, -1, -1)
    chosen = index[..., None, None].expand(-1, -1, -1, h * w, 2 * dim)
    k, v = torch.gather(pairs, 2, chosen).flatten(2, 3).chunk(2, dim=-1)
    q, k, v = (t.unflatten(-1, (heads, dim // heads)).transpose(2, 3) for t in (query, k, v))
    out = ((q * m.scale) @ k.transpose(-1, -2)).softmax(-1) @ v
    out, value = (
        t.reshape(batch, n, n, h, w, dim).transpose(2, 3).reshape(batch, rows, columns, dim)
        for t in (out.transpose(2, 3).flatten(3), value)
    )
    out = out + m.lepe(value.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return F.linear(out, m.wo.weight, m.wo.bias)[:, :height, :width].permute(0, 3, 1, 2)


def _plain_bilevel_nchw(m: Any, x: Tensor) -> Tensor:
    """As published, channels first: windows of H // n_win by W // n_win, keys and values gathered from all pairs of windows."""
    height, width = x.shape[2:]
    h, w = max(height // m.n_win, 1), max(width // m.n_win, 1)
    qkv = m.qkv_linear(x)
    padded = F.pad(qkv, (0, -width % w, 0, -height % h))
    rows, columns = padded.shape[2] // h, padded.shape[3] // w
    windows = padded.unflatten(3, (columns, w)).unflatten(2, (rows, h)).permute(0, 2, 4, 3, 5, 1).flatten(1, 2).flatten(2, 3)
    query, key, value = windows.chunk(3, dim=-1)  # (B, windows, h w, C)
    index, count = m._route(x, h, w), rows * columns
    pairs = torch.cat([key, value], dim=-1).unsqueeze(1).expand(-1, count, -1, -1, -1)
    k, v = torch.gather(pairs, 2, index[..., None, None].expand(-1, -1, -1, h * w, 2 * m.dim)).flatten(2, 3).chunk(2, dim=-1)
    q, k, v = (t.unflatten(-1, (m.num_heads, -1)).transpose(2, 3) for t in (query, k, v))
    out = (((q * m.scale) @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(2, 3).flatten(3)  # (B, windows, h w, C)
    out = out.unflatten(2, (h, w)).unflatten(1, (rows, columns)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return m.output_linear(out[..., :height, :width] + m.lepe(qkv[:, 2 * m.dim :]))


def _plain_clo(m: Any, x: Tensor) -> Tensor:
    parts = []
    for project, mix, act in zip(m.qkvs, m.convs, m.act_blocks):
        query, key, value = mix(project(x)).chunk(3, dim=1)
        parts.append(torch.tanh(act(query * key) * m.scale) * value)
    pooled = F.avg_pool2d(x, m.window_size, ceil_mode=True, count_include_pad=False)
    query, (key, value) = m.global_q(x), m.global_kv(pooled).chunk(2, dim=1)
    q, k, v = (t.flatten(2).unflatten(1, (m.global_heads, -1)) for t in (query, key, value))
    out = v @ (m.scale * q.transpose(2, 3) @ k).softmax(-1).transpose(2, 3)
    return m.proj(torch.cat([*parts, out.reshape(query.shape)], dim=1))


def _plain_nonlocal(m: Any, x: Tensor) -> Tensor:
    value = m.g(x).flatten(2).transpose(1, 2)
    theta, phi = (x, x) if m.mode == "gaussian" else (m.theta(x), m.phi(x))
    theta, phi = theta.flatten(2), phi.flatten(2)
    count = value.shape[1]
    if m.mode == "concatenate":
        first = theta.unsqueeze(3).expand(-1, -1, -1, count)
        pairs = torch.cat([first, phi.unsqueeze(2).expand(-1, -1, count, -1)], dim=1)
        weights = m.W_f(pairs).squeeze(1) / count
    else:
        weights = theta.transpose(1, 2) @ phi
        weights = weights / count if m.mode == "dot" else weights.softmax(-1)
    y = (weights @ value).transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])
    return m.W_z(y) + x


def _plain_mhsa(m: Any, x: Tensor) -> Tensor:
    q, k, v = (layer(x).flatten(2).unflatten(1, (m.heads, -1)) for layer in (m.query, m.key, m.value))
    place = m._positions(x).flatten(3)  # (1, heads, d, N)
    logits = q.transpose(2, 3) @ k + place.transpose(2, 3) @ q
    return (v @ logits.softmax(-1).transpose(2, 3)).reshape(x.shape)


if __name__ == "__main__":
    main()
