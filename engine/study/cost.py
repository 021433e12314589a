"""What a variant's network costs: parameters, multiply-adds with and without the products inside attention, and latency.

All figures are of the network without auxiliary branches, at the variant's size. Parameters are those that are trained; multiply-adds and
latency are of the fused network. GFLOPs are two for each multiply-add.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.memory_format import channels_last
from engine.study.folder import hash_of
from engine.study.plan import PlannedVariant
from engine.study.records import Cost
from engine.study.run_files import read_json, write_json
from models.analysis.comparison import counted_gflops
from models.model import Model
from utils.errors import UserError
from utils.memory import is_out_of_memory
from utils.sizes import round_up_to_stride
from utils.stopwatch import Stopwatch
from utils.types import to_unit_range

COSTS_FILE, LATENCY_FILE = "costs.json", "latency.json"
BATCHES = (1, 32)
WARM_UPS = 2


def count_costs(folder: Path, variants: Sequence[PlannedVariant]) -> dict[str, Cost]:
    """Parameters and GFLOPs by the variants' names; what ``costs.json`` of the study folder has is not counted again."""
    known = _known(folder / COSTS_FILE)
    found: dict[str, Any] = {}
    if new := {_key(planned) for planned in variants} - known.keys():
        print(f"counts parameters and GFLOPs of {len(new)} networks", flush=True)
    for planned in variants:
        key = _key(planned)
        found[key] = known.get(key) or found.get(key) or _counted(planned)
    if new:
        write_json(folder / COSTS_FILE, found)
    return {planned.name: Cost(**found[_key(planned)]) for planned in variants}


def _counted(planned: PlannedVariant) -> dict[str, Any]:
    trained = Model(planned.spec).deploy(fuse=False)
    model, parameters = trained.fuse(), sum(p.numel() for p in trained.parameters())
    images = _images(model, planned, 1)
    gflops, customary = counted_gflops(model, images)
    return {"parameters": parameters, "gflops": gflops, "customary_gflops": customary}


def measure_latencies(
    folder: Path, variants: Sequence[PlannedVariant], costs: Mapping[str, Cost], *, device: torch.device, repeats: int
) -> dict[str, Cost]:
    """The costs with the latency of a forward pass and its decoding, batch 1 and 32, in ms: median and interquartile range.

    The variants alternate in each repetition, so that what disturbs the machine disturbs all alike. What ``latency.json`` of the study
    folder has, measured together on this device, is kept.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    keys = {planned.name: _key(planned) for planned in variants}
    wanted = {"device": name, "repeats": repeats, "keys": sorted(set(keys.values()))}
    known = _known(folder / LATENCY_FILE)
    if {key: known.get(key) for key in wanted} != wanted:
        print(f"measures latency of {len(set(keys.values()))} networks on {name}, {repeats} repetitions", flush=True)
        known = {**wanted, "latency_ms": _alternating({_key(planned): planned for planned in variants}, device, repeats)}
        write_json(folder / LATENCY_FILE, known)
    found = known["latency_ms"]
    return {
        variant: replace(costs[variant], device=name, latency_ms={int(b): tuple(values) for b, values in found[key].items()})
        for variant, key in keys.items()
    }


def _alternating(variants: Mapping[str, PlannedVariant], device: torch.device, repeats: int) -> dict[str, dict[int, list[float]]]:
    models = {key: channels_last(Model(planned.spec).deploy().to(device)) for key, planned in variants.items()}
    out: dict[str, dict[int, list[float]]] = {key: {} for key in models}
    for batch in BATCHES:
        calls = {key: _call(model, _images(model, variants[key], batch)) for key, model in models.items()}
        times: dict[str, list[float]] = {key: [] for key in models}
        watch = Stopwatch(device)
        for repeat in range(-WARM_UPS, repeats):
            for key, call in tuple(calls.items()):
                start = watch.now()
                try:
                    call()
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    del calls[key], times[key]  # of this batch there is no figure
                    continue
                if repeat >= 0:
                    times[key].append(1e3 * (watch.now() - start))
        for key, values in times.items():
            out[key][batch] = list(median_and_range(values))
    return out


def median_and_range(values: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range; 0 for one value."""
    if len(values) < 2:
        return (values[0] if values else math.nan), 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, high - low


def _call(model: Model, images: Tensor) -> Callable[[], object]:
    return lambda: model.predict(images)


def _images(model: Model, planned: PlannedVariant, batch: int) -> Tensor:
    side = round_up_to_stride(planned.variant.imgsz, model.stride)
    device = next(model.parameters()).device
    return to_unit_range(torch.full((batch, model.ch, side, side), 114, dtype=torch.uint8, device=device))


def _key(planned: PlannedVariant) -> str:
    return f"{hash_of(planned)}-{planned.variant.imgsz}"


def _known(path: Path) -> dict[str, Any]:
    """What was counted before; nothing where the file is missing or damaged."""
    try:
        return read_json(path) if path.is_file() else {}
    except UserError:
        return {}
