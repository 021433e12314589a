"""What a variant's network costs: parameters, multiply-adds with and without the products inside attention, and latency.

All figures are of the network without auxiliary branches, at the variant's size. Parameters are those that are trained; multiply-adds and
latency are of the fused network. GFLOPs are two for each multiply-add.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from engine.logging.observing import reason_of
from engine.memory_format import channels_last
from engine.study.folder import hash_of
from engine.study.plan import PlannedVariant
from engine.study.records import Cost
from engine.study.run_files import read_json, write_json
from models.analysis.comparison import counted_gflops
from models.model import Model
from utils.errors import UserError, one_line
from utils.sizes import round_up_to_stride
from utils.stopwatch import Stopwatch
from utils.text_table import counted
from utils.types import to_unit_range

COSTS_FILE, LATENCY_FILE = "costs.json", "latency.json"
BATCHES = (1, 32)
WARM_UPS = 2
Result = TypeVar("Result")


def count_costs(folder: Path, variants: Sequence[PlannedVariant], notes: list[str] | None = None) -> dict[str, Cost]:
    """Parameters and GFLOPs by the variants' names; what ``costs.json`` of the study folder has is not counted again.

    Args:
        notes: gets a line for each variant whose network does not run, which has no figures.
    """
    known = _known(folder / COSTS_FILE)
    found: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    if new := {_key(planned) for planned in variants} - known.keys():
        print(f"counts parameters and GFLOPs of {counted(len(new), 'network')}", flush=True)
    for planned in variants:
        key = _key(planned)
        if key in known:
            found[key] = known[key]
        elif key not in found:
            found[key], reasons[key] = _counted(planned)
    if new:
        write_json(folder / COSTS_FILE, {key: values for key, values in found.items() if not reasons.get(key)})
    if notes is not None:
        notes += [f"{v.name}: GFLOPs were not counted ({reason})" for v in variants if (reason := reasons.get(_key(v)))]
    return {planned.name: Cost(**found[_key(planned)]) for planned in variants}


def _counted(planned: PlannedVariant) -> tuple[dict[str, Any], str]:
    """What could be counted, and why the rest could not."""
    found: dict[str, Any] = {}
    try:
        trained = Model(planned.spec).deploy(fuse=False)
        found["parameters"] = sum(p.numel() for p in trained.parameters())
        model = trained.fuse()
        found["gflops"], found["customary_gflops"] = counted_gflops(model, _images(model, planned, 1))
    except Exception as error:  # whatever a user's module raises costs its variant the figures, and no other variant anything
        return found, _line(error)
    return found, ""


def _line(error: Exception) -> str:
    return one_line(reason_of(error), most=200)


def measure_latencies(
    folder: Path, variants: Sequence[PlannedVariant], costs: Mapping[str, Cost], *, device: torch.device, repeats: int,
    notes: list[str] | None = None,
) -> dict[str, Cost]:  # fmt: skip
    """The costs with the latency of a forward pass and its decoding, batch 1 and 32, in ms: median and interquartile range.

    The variants alternate in each repetition, so that what disturbs the machine disturbs all alike. What ``latency.json`` of the study
    folder has, measured together on this device, is kept.

    Args:
        notes: gets a line for each variant that could not be measured.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {counted(torch.get_num_threads(), 'thread')}"
    keys = {planned.name: _key(planned) for planned in variants}
    wanted = {"device": name, "repeats": repeats, "keys": sorted(set(keys.values()))}
    known = _known(folder / LATENCY_FILE)
    if {key: known.get(key) for key in wanted} != wanted:
        print(f"measures latency of {counted(len(set(keys.values())), 'network')} on {name}, {counted(repeats, 'repetition')}", flush=True)
        measured = _Latencies({_key(planned): planned for planned in variants}, device, repeats)
        known = {**wanted, "latency_ms": measured.ms, "failures": measured.failures}
        write_json(folder / LATENCY_FILE, known)
    found, failures = known["latency_ms"], known.get("failures", {})
    if notes is not None:
        notes += [f"{variant}: {_missing(failures[key])}" for variant, key in keys.items() if key in failures]
    return {
        variant: replace(costs[variant], device=name, latency_ms={int(b): tuple(values) for b, values in found[key].items()})
        for variant, key in keys.items()
    }


def _missing(failure: Mapping[str, Any]) -> str:
    return f"latency at batch {' and '.join(map(str, failure['batches']))} was not measured ({failure['reason']})"


class _Latencies:
    """Latencies of networks that alternate.

    Attributes:
        ms: of each network by batch size, median and interquartile range; without what could not be measured.
        failures: for the networks that failed: at which ``batches``, and the first ``reason``.
    """

    def __init__(self, variants: Mapping[str, PlannedVariant], device: torch.device, repeats: int) -> None:
        self.ms: dict[str, dict[int, list[float]]] = {key: {} for key in variants}
        self.failures: dict[str, dict[str, Any]] = {}
        built = {key: self._tried(key, BATCHES, partial(_deployed, planned, device)) for key, planned in variants.items()}
        models = {key: model for key, model in built.items() if model is not None}
        watch = Stopwatch(device)
        for batch in BATCHES:
            made = {key: self._tried(key, [batch], partial(_call, model, variants[key], batch)) for key, model in models.items()}
            for key, values in self._times({key: call for key, call in made.items() if call}, watch, batch, repeats).items():
                self.ms[key][batch] = list(median_and_range(values))

    def _times(self, calls: dict[str, Callable[[], object]], watch: Stopwatch, batch: int, repeats: int) -> dict[str, list[float]]:
        """Milliseconds of each call; without those that fail."""
        times: dict[str, list[float]] = {key: [] for key in calls}
        for repeat in range(-WARM_UPS, repeats):
            for key, call in tuple(calls.items()):
                ms = self._tried(key, [batch], partial(_timed, call, watch))
                if ms is None:
                    del calls[key], times[key]
                elif repeat >= 0:
                    times[key].append(ms)
        return times

    def _tried(self, key: str, batches: Sequence[int], call: Callable[[], Result]) -> Result | None:
        """What the call returns; None, and a reason, where it fails, so that it costs no other network its figure."""
        try:
            return call()
        except Exception as error:
            self.failures.setdefault(key, {"batches": [], "reason": _line(error)})["batches"] += batches
            return None


def _timed(call: Callable[[], object], watch: Stopwatch) -> float:
    """Milliseconds that the call takes."""
    start = watch.now()
    call()
    return 1e3 * (watch.now() - start)


def _deployed(planned: PlannedVariant, device: torch.device) -> Model:
    return channels_last(Model(planned.spec).deploy().to(device))


def median_and_range(values: Sequence[float]) -> tuple[float, float]:
    """Median and interquartile range; 0 for one value."""
    if len(values) < 2:
        return (values[0] if values else math.nan), 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, high - low


def _call(model: Model, planned: PlannedVariant, batch: int) -> Callable[[], object]:
    return partial(model.predict, _images(model, planned, batch))


def _images(model: Model, planned: PlannedVariant, batch: int) -> Tensor:
    side = round_up_to_stride(planned.variant.imgsz, model.stride)
    device = next(model.parameters()).device
    return to_unit_range(torch.full((batch, model.ch, side, side), 114, dtype=torch.uint8, device=device))


def _key(planned: PlannedVariant) -> str:
    """Identifies what is measured: rows, the plugins that they use, and the size; weights change nothing of it."""
    return "-".join([hash_of(planned), str(planned.variant.imgsz), *(digest[:16] for digest in sorted(planned.plugins))])


def _known(path: Path) -> dict[str, Any]:
    """What was counted before; nothing where the file is missing or damaged."""
    try:
        return read_json(path) if path.is_file() else {}
    except UserError:
        return {}
