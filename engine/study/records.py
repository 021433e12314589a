"""What one training of a study left behind: the value that runs give and that statistics, tables and figures read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any


class Status(Enum):
    """How a training of a study ended."""

    FINISHED = "finished"
    FAILED = "failed"  # ``reason`` says why
    STOPPED = "stopped early"  # by the study's rule
    PENDING = "not trained yet"


@dataclass(frozen=True)
class Cost:
    """What a variant's network costs; None where it was not measured."""

    parameters: int | None = None
    gflops: float | None = None  # attention counted
    customary_gflops: float | None = None  # as papers print it: without the products inside attention
    latency_ms: Mapping[int, tuple[float, float]] = field(default_factory=dict)  # by batch size: median and interquartile range
    device: str = ""  # on which the latency was measured
    peak_memory_mib: float | None = None  # of the training
    training_seconds: float | None = None


@dataclass(frozen=True)
class RunRecord:
    """One training: a variant with one seed.

    Attributes:
        metrics: of the weights that the study compares, by the names of results.csv, such as ``metrics/mAP_0.5:0.95``, in 0-1.
        curves: the columns of results.csv, a value an epoch; NaN where an epoch has none.
        per_class: by class name: ``P``, ``R``, ``AP50``, ``AP75``, ``AP`` in 0-1 and ``objects``.
        per_size: AP of ``small``, ``medium`` and ``large`` objects, in 0-1; NaN without such objects.
        pr_curves: by class name or ``all``: precision (n,) at n recalls evenly spaced over 0-1, IoU 0.5; empty where it was not kept.
        image_noise: by the names of ``metrics``: standard deviation over resampled validation images, for the same weights.
    """

    variant: str
    seed: int
    status: Status
    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    per_class: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    per_size: Mapping[str, float] = field(default_factory=dict)
    pr_curves: Mapping[str, Sequence[float]] = field(default_factory=dict)
    image_noise: Mapping[str, float] = field(default_factory=dict)
    cost: Cost = Cost()
    folder: Path | None = None
    reason: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)  # what the caption states: data, imgsz, epochs, batch_size, hyp


@dataclass(frozen=True)
class Stop:
    """The rule's end of a variant: after how many epochs, and why."""

    epoch: int
    reason: str


@dataclass(frozen=True)
class Study:
    """Every run of a study, and what it is compared by.

    Attributes:
        records: in the order of the table: variant by variant, each seed.
        baseline: the variant that all others are compared with.
        metric: the name of the compared metric in ``RunRecord.metrics``.
        notes: lines for the report, such as the rule that stopped variants early.
    """

    records: tuple[RunRecord, ...]
    baseline: str
    metric: str = "metrics/mAP_0.5:0.95"
    notes: tuple[str, ...] = ()

    @property
    def variants(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(record.variant for record in self.records))

    @property
    def controls(self) -> Mapping[str, str]:
        """Variant -> its capacity control, for the variants that have one; several may share it."""
        return {variant: record.variant for record in self.records for variant in record.settings.get("control_of", ())}
