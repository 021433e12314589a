"""What a network costs, by layer: parameters, multiply-adds counted at operator level, memory that training keeps, and time.

    python -m models.profiling yolov9-c-FocalModulation.yaml --imgsz 640 --sort time --csv cost.csv
    python -m models.profiling yolov8n.yaml yolov9-t.yaml --deploy      # several: one table with GFLOPs and FPS

models/analysis/operations.py says what counts as a multiply-add: convolutions and matrix products, attention included,
as in published figures.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.analysis.comparison import NetworkCost, comparison_table, counted_gflops, forward_and_decode, median_seconds
from models.analysis.operations import OperationCounter, multiply_adds
from models.build import build_model
from models.model import Model
from models.spec.channel_rules import LayerPlan
from utils.cli.parser import OneLineParser
from utils.cli.script import run_script
from utils.cli.sizes import height_and_width, multiple_of_stride
from utils.distributed import make_current, select_device
from utils.errors import UserError
from utils.text_table import csv_cell, text_table

__all__ = ["LayerCost", "multiply_adds", "profile"]
# what --sort takes: the name in the table's header -> the field
SORT_KEYS = {"row": "row", "parameters": "parameters", "mult-adds": "multiply_adds", "memory": "activation_bytes", "time": "seconds"}


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


def profile(model: Model, *, imgsz: int | tuple[int, int] = 640, batch: int = 1, repeats: int = 3) -> list[LayerCost]:
    """Costs of every row for ``batch`` images of ``imgsz`` (H, W) px, measured on the model's device."""
    device = next(model.parameters()).device
    images = torch.zeros(batch, model.ch, *height_and_width(imgsz), device=device)
    kept = KeptForBackward()
    costs: list[LayerCost] = []

    def call(plan: LayerPlan, layer: nn.Module, inputs: Any) -> Any:
        with OperationCounter() as counter:
            out = layer(inputs)
        parameters = sum(p.numel() for p in layer.parameters())
        size, seconds = kept.by(plan, layer, inputs), _median_seconds(layer, inputs, repeats)
        costs.append(LayerCost(plan.index, plan.name, plan.sources, _shapes(out), parameters, counter.total, size, seconds))
        return out

    was_training = model.training
    model.eval()
    with torch.no_grad():
        model.run_rows(images, call)
    model.train(was_training)
    return costs


class KeptForBackward:
    """Bytes that autograd keeps of a forward pass, row by row; a map that several rows keep counts where it is kept first."""

    def __init__(self) -> None:
        self._maps: set[int] = {-1}  # rows whose output is counted; the image exists anyway

    def by(self, plan: LayerPlan, layer: nn.Module, inputs: Any) -> int:
        """Runs the layer once more, with gradients."""
        given = [_leaf(value) for value in inputs] if isinstance(inputs, list) else [_leaf(inputs)]
        row_of = {_address(t): s for value, s in zip(given, plan.sources) for t in _tensors(value)}
        free = {_address(t) for t in (*layer.parameters(), *layer.buffers())}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            if _address(tensor) not in free:
                kept[_address(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = layer(given if isinstance(inputs, list) else given[0])  # held while counting, so that no address is used again
        row_of = {_address(t): plan.index for t in _tensors(out)} | row_of
        size = sum(count for address, count in kept.items() if row_of.get(address) not in self._maps)
        self._maps |= {row_of[address] for address in kept if address in row_of}
        return size


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _leaf(value: Any) -> Any:
    return tuple(_leaf(v) for v in value) if isinstance(value, tuple) else value.detach().requires_grad_()


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for part in value for t in _tensors(part)]


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
    lines = [("row", "module", "from", "output", "parameters", "M mult-adds", "kept MiB", "ms")]
    for c in costs:
        shape = "several" if isinstance(c.shape[0], tuple) else "x".join(map(str, c.shape[1:]))
        lines.append((str(c.row), c.module, ",".join(map(str, c.sources)), shape, *_numbers([c])))
    lines.append(("", "total", "", "", *_numbers(costs)))
    return text_table(lines, right=(0, 4, 5, 6, 7))


def _numbers(costs: Sequence[LayerCost]) -> tuple[str, str, str, str]:
    """Sums as text: parameters, M multiply-adds, MiB kept, ms."""
    parameters, operations, kept, seconds = (sum(getattr(c, key) for c in costs) for key in list(SORT_KEYS.values())[1:])
    return f"{parameters:,}", f"{operations / 1e6:.1f}", f"{kept / 2**20:.1f}", f"{seconds * 1e3:.2f}"


def compare_networks(models: Mapping[str, Model], *, imgsz: Mapping[str, tuple[int, int]], batch: int = 1) -> list[NetworkCost]:
    """Costs of several networks for ``batch`` images, measured in turn on their device.

    Args:
        models: by name, in evaluation mode.
        imgsz: (H, W) px of each.
        batch: images that pass at once.
    """
    images = {name: torch.zeros(batch, m.ch, *imgsz[name], device=next(m.parameters()).device) for name, m in models.items()}
    times = median_seconds({name: partial(forward_and_decode, m, images[name]) for name, m in models.items()})
    costs = []
    for name, model in models.items():
        parameters = sum(p.numel() for p in model.parameters())
        kept = sum(c.activation_bytes for c in profile(model, imgsz=imgsz[name], batch=batch, repeats=1))
        costs.append(
            NetworkCost(name, len(model.plans), parameters, *counted_gflops(model, images[name][:1]), kept, *times[name], batch)
        )  # fmt: skip
    return costs


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: prints the table of one network, or one that compares several; returns the exit status."""
    args = _arguments(argv)

    def body() -> None:
        if args.batch_size < 1:
            raise UserError(f"--batch-size {args.batch_size}: at least one image is needed")
        models = {cfg: _network(cfg, args) for cfg in dict.fromkeys(args.cfg)}
        sides = height_and_width(args.imgsz)
        sizes = {}
        for cfg, model in models.items():
            rounded = {side: multiple_of_stride(side, model.stride) for side in dict.fromkeys(sides)}
            sizes[cfg] = rounded[sides[0]], rounded[sides[1]]
        single = len(models) == 1
        costs: list[Any]
        if single:
            cfg, model = next(iter(models.items()))
            costs = profile(model, imgsz=sizes[cfg], batch=args.batch_size)
        else:
            costs = compare_networks(models, imgsz=sizes, batch=args.batch_size)
        costs = sort_costs(costs, args.sort)
        print(_table(costs) if single else comparison_table(costs))
        if args.csv:
            _write_csv(args.csv, costs)

    return run_script("models.profiling", body)


def sort_costs(costs: Sequence[Any], key: str) -> list[Any]:
    """Rows of one network, or networks, largest first; in their order for ``row``."""
    if key == "row":
        return list(costs)
    field = SORT_KEYS[key]
    attribute = {"multiply_adds": "gflops", "activation_bytes": "kept_bytes"}.get(field, field)
    return sorted(costs, key=lambda c: -getattr(c, attribute if isinstance(c, NetworkCost) else field))


def _network(cfg: str, args: argparse.Namespace) -> Model:
    make_current(device := select_device(args.device))
    model = build_model(cfg, nc=args.nc, ch=args.ch, plugins=args.plugins).to(device).eval()
    return model.deploy() if args.deploy else model


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="python -m models.profiling", description="the cost of a network by layer, or of several")
    parser.add_argument("cfg", nargs="+", help="model YAML, path or bare name; several are compared in one table")
    parser.add_argument("--imgsz", type=int, nargs="+", default=[640], help="side, or height and width, px")
    parser.add_argument("--batch-size", type=int, default=1, help="images that pass at once")
    parser.add_argument("--nc", type=int, help="number of classes, the YAML's if not given")
    parser.add_argument("--ch", type=int, help="number of input channels, the YAML's if not given")
    parser.add_argument("--device", default="cpu", help="cpu, mps or a GPU's number")
    parser.add_argument("--deploy", action="store_true", help="without auxiliary branches, fused")
    parser.add_argument("--sort", choices=SORT_KEYS, default="row", help="largest first, rows in order")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table to a file")
    parser.add_argument("--plugins", nargs="*", default=[], help="Python files with blocks of your own")
    return parser.parse_args(argv)


def _write_csv(path: Path, costs: Sequence[Any]) -> None:
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(costs[0])])
            writer.writeheader()
            writer.writerows({name: csv_cell(value) for name, value in asdict(c).items()} for c in costs)
    except OSError as error:
        raise UserError(f"--csv {path}: cannot be written ({error.strerror})") from error
