"""What each variant of a study costs: the measurements of its runs as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from engine.study.records import Cost, RunRecord, Status


def variant_cost(records: Iterable[RunRecord]) -> Cost:
    """The cost of a variant from its runs: sizes and latency of the first run that has them, memory and time as means of finished runs."""
    records = list(records)
    latency: Cost = next((r.cost for r in records if r.cost.latency_ms), Cost())
    return Cost(
        parameters=_first(records, lambda cost: cost.parameters),
        gflops=_first(records, lambda cost: cost.gflops),
        customary_gflops=_first(records, lambda cost: cost.customary_gflops),
        latency_ms=latency.latency_ms,
        device=latency.device,
        peak_memory_mib=_mean(records, lambda cost: cost.peak_memory_mib),
        training_seconds=_mean(records, lambda cost: cost.training_seconds),
    )


def _first(records: list[RunRecord], value: Callable[[Cost], Any]) -> Any:
    return next((value(r.cost) for r in records if value(r.cost) is not None), None)


def _mean(records: list[RunRecord], value: Callable[[Cost], float | None]) -> float | None:
    found = [value(r.cost) for r in records if r.status is Status.FINISHED]
    known = [v for v in found if v is not None]
    return float(np.mean(known)) if known else None
