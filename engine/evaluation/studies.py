"""val.py's two studies: how fast each file of weights is (``--task speed``), and what the input size costs and gives (``--task study``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

from engine.logging.observing import observing
from tasks.base import MetricResult
from utils import distributed
from utils.cli.val_arguments import ValConfig
from utils.errors import UserError
from utils.run_folders import new_run_dir
from utils.text_table import csv_cell, text_table

SPEED_CONF, SPEED_IOU = 0.25, 0.45  # as in detection, so that suppression does the work it does there
SHORT_NAMES = {"metrics/precision": "P", "metrics/recall": "R"}  # in study.csv


class Measured(NamedTuple):
    """One validation of a study."""

    weights: str
    imgsz: int  # px
    batch_size: int
    metrics: MetricResult

    @property
    def ms(self) -> float:
        """Milliseconds an image, all stages."""
        return sum(self.metrics.speed_ms.values())


class Check(Protocol):
    """Refuses what a validation would refuse; gives its configuration with the data set that it uses."""

    def __call__(self, config: ValConfig, *, sizes: Sequence[int] = ()) -> ValConfig: ...


def speed(config: ValConfig, validate: Callable[[ValConfig], MetricResult], check: Check) -> list[Measured]:
    """Validates every file alone at batch 1 and at the batch size that was asked for, and prints milliseconds an image by stage."""
    fast = replace(config, conf_thres=SPEED_CONF, iou_thres=SPEED_IOU)
    files = [check(one) for one in _files(fast)]
    folder = _folder(config)
    measured = []
    for index, one in enumerate(files):
        for batch in sorted({1, config.batch_size}):
            one = replace(one, batch_size=batch, project=str(folder), name=f"{index}-{Path(one.weights).stem}-batch{batch}")
            measured.append(Measured(one.weights, one.imgsz or 0, batch, validate(one)))
    stages = list(measured[0].metrics.speed_ms)
    lines = [("weights", "batch", *stages, "all")]
    lines += [(m.weights[-28:], str(m.batch_size), *(f"{m.metrics.speed_ms[s]:.1f}" for s in stages), f"{m.ms:.1f}") for m in measured]
    print(f"\nms an image, {', '.join(sorted({f'{m.imgsz} px' for m in measured}))}\n{text_table(lines, right=range(len(lines[0])))}")
    return measured


def study(config: ValConfig, validate: Callable[[ValConfig], MetricResult], check: Check) -> list[Measured]:
    """Validates every file alone at every size; writes ``study.csv`` and ``study.png``: mAP over milliseconds an image."""
    files = [check(one, sizes=config.study_sizes) for one in _files(config)]
    folder = _folder(config)
    measured = []
    for index, one in enumerate(files):
        for side in config.study_sizes:
            one = replace(one, imgsz=side, project=str(folder), name=f"{index}-{Path(one.weights).stem}-{side}")
            measured.append(Measured(one.weights, side, one.batch_size, validate(one)))
    _write_table(measured, folder / "study.csv")
    with observing("plotting study.png"):
        _plot(measured, folder / "study.png", rule=config.ap_rule)
    print(f"Study in {folder}: {', '.join(p.name for p in (folder / 'study.csv', folder / 'study.png') if p.exists())}")
    return measured


def _files(config: ValConfig) -> list[ValConfig]:
    """The configuration of each file of weights alone."""
    if not config.all_weights:
        raise UserError(f"--task {config.task}: which --weights?")
    if distributed.world_size() > 1:
        raise UserError(f"--task {config.task}: measures one process; start val.py without torchrun")
    return [replace(config, weights=weights, others=(), task="val") for weights in config.all_weights]


def _folder(config: ValConfig) -> Path:
    return new_run_dir(config.project, config.name, exist_ok=config.exist_ok)


def _write_table(measured: Sequence[Measured], path: Path) -> None:
    import csv

    stages = list(measured[0].metrics.speed_ms)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = [SHORT_NAMES.get(name, name.removeprefix("metrics/")) for name in measured[0].metrics.columns]
        writer.writerow(["weights", "imgsz", "batch", *names, *(f"{s} ms" for s in stages)])
        for m in measured:
            speeds = (f"{m.metrics.speed_ms[s]:.2f}" for s in stages)
            quality = m.metrics.columns.values()
            writer.writerow([csv_cell(m.weights), m.imgsz, m.batch_size, *(f"{q:.5f}" for q in quality), *speeds])


def _plot(measured: Sequence[Measured], path: Path, *, rule: str) -> None:
    from utils.visual.plots import plot_trade_off

    curves: dict[str, list[tuple[float, float, str]]] = {}
    for m in measured:
        curves.setdefault(m.weights, []).append((m.ms, m.metrics.headline[1], str(m.imgsz)))
    plot_trade_off(curves, path, x="ms an image", y=f"{measured[0].metrics.headline[0]} (rule: {rule})")
