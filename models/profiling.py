"""What a network costs, by layer: parameters, multiply-adds counted at operator level, memory that training keeps, and time.

    python -m models.profiling yolov9-c-FocalModulation.yaml --imgsz 640 --sort time

Multiply-adds come from torch's FlopCounterMode, which sees every convolution and matrix product, attention included; element-wise work
(activations, norms, pooling, prefix sums) is not counted, as in every published figure.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.channel_rules import LayerPlan
from models.detector import Detector, build_model
from utils.errors import UserError

SORT_KEYS = ("row", "parameters", "multiply_adds", "activation_bytes", "seconds")


@dataclass(frozen=True)
class LayerCost:
    """The cost of one row for one batch."""

    row: int
    module: str
    sources: tuple[int, ...]
    shape: Any  # of the output, several for a layer with several
    parameters: int
    multiply_adds: int
    activation_bytes: int  # what autograd keeps for the backward pass, parameters left out
    seconds: float  # forward, median of the repeats


def profile(model: Detector, *, imgsz: int | tuple[int, int] = 640, batch: int = 1, repeats: int = 3) -> list[LayerCost]:
    """Costs of every row for ``batch`` images of ``imgsz`` (H, W) px, measured on the model's device."""
    height, width = (imgsz, imgsz) if isinstance(imgsz, int) else imgsz
    device = next(model.parameters()).device
    images = torch.zeros(batch, model.ch, height, width, device=device)
    costs: list[LayerCost] = []

    def call(plan: LayerPlan, layer: nn.Module, inputs: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            out = layer(inputs)
        parameters = sum(p.numel() for p in layer.parameters())
        kept = _kept_for_backward(layer, inputs)
        seconds = _median_seconds(layer, inputs, repeats)
        adds = counter.get_total_flops() // 2
        costs.append(LayerCost(plan.index, plan.name, plan.sources, _shapes(out), parameters, adds, kept, seconds))
        return out

    was_training = model.training
    model.eval()
    with torch.no_grad():
        model.run_rows(images, call)
    model.train(was_training)
    return costs


def multiply_adds(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of one forward pass, matrix products and attention included."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() // 2


def _kept_for_backward(layer: nn.Module, inputs: Any) -> int:
    """Bytes of distinct tensors that autograd saves in one forward pass, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    saved = []  # holds the outputs, so that no storage is freed and its address used again while counting

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        leaves = [_leaf(i) for i in inputs] if isinstance(inputs, list) else _leaf(inputs)
        saved.append(layer(leaves))
    return sum(kept.values())


def _leaf(value: Any) -> Any:
    return tuple(_leaf(v) for v in value) if isinstance(value, tuple) else value.detach().requires_grad_()


def _median_seconds(layer: nn.Module, inputs: Any, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        _synchronise()
        start = time.perf_counter()
        layer(inputs)
        _synchronise()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _shapes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return tuple(_shapes(v) for v in value)


def _table(costs: Sequence[LayerCost]) -> str:
    lines = [f"{'row':>4} {'module':<28} {'from':<16} {'output':<24} {'parameters':>12} {'M mult-adds':>12} {'kept MiB':>9} {'ms':>8}"]
    for c in costs:
        shape = "several" if isinstance(c.shape[0], tuple) else "x".join(map(str, c.shape[1:]))
        source = ",".join(map(str, c.sources))
        lines.append(
            f"{c.row:>4} {c.module:<28} {source:<16} {shape:<24} {c.parameters:>12,} {c.multiply_adds / 1e6:>12.1f} "
            f"{c.activation_bytes / 2**20:>9.1f} {c.seconds * 1e3:>8.2f}"
        )
    total = [sum(getattr(c, key) for c in costs) for key in SORT_KEYS[1:]]
    lines.append(
        f"{'':>4} {'total':<28} {'':<16} {'':<24} {total[0]:>12,} {total[1] / 1e6:>12.1f} {total[2] / 2**20:>9.1f} {total[3] * 1e3:>8.2f}"
    )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: prints the table of one network."""
    parser = argparse.ArgumentParser(prog="python -m models.profiling", description="the cost of a network, a row a layer")
    parser.add_argument("cfg", help="model YAML, path or bare name")
    parser.add_argument("--imgsz", type=int, nargs="+", default=[640], help="side, or height and width, px")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--nc", type=int, help="number of classes, the YAML's if not given")
    parser.add_argument("--ch", type=int, help="number of input channels, the YAML's if not given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--deploy", action="store_true", help="without auxiliary branches, fused")
    parser.add_argument("--sort", choices=SORT_KEYS, default="row", help="largest first, rows in order")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table to a file")
    parser.add_argument("--plugins", nargs="*", default=[], help="Python files with blocks of your own")
    args = parser.parse_args(argv)
    try:
        model = build_model(args.cfg, nc=args.nc, ch=args.ch, plugins=args.plugins).to(args.device)
    except UserError as error:
        sys.exit(f"error: {error}")
    costs = profile(model.deploy() if args.deploy else model, imgsz=(args.imgsz[0], args.imgsz[-1]), batch=args.batch_size)
    costs.sort(key=lambda c: c.row if args.sort == "row" else -getattr(c, args.sort))
    print(_table(costs))
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(LayerCost)])
            writer.writeheader()
            writer.writerows(asdict(c) for c in costs)


if __name__ == "__main__":
    main()
