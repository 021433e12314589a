"""Exports trained weights: arguments -> ExportConfig -> export(): model.deploy() -> writer of each format -> file compared with torch.

Example:
    python export.py --weights runs/train/exp/weights/best.pt --include onnx --dynamic
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from models.analysis.tolerance import check_tolerance
from models.export.formats import describe_formats, formats_to_write
from models.export.source import ExportOptions
from tasks import Task
from utils.cli.export_arguments import ExportConfig, parse_arguments
from utils.cli.script import run_script
from utils.run_folders import newest_weights
from utils.sizes import round_up_to_stride


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run_script("export.py", lambda: export(parse_arguments(argv, epilog=describe_formats())))


class Exported(NamedTuple):
    """One file that was written."""

    file_format: str
    path: Path
    difference_px: float  # largest difference of a box coordinate from torch
    difference_score: float


def export(config: ExportConfig) -> list[Exported]:
    """Writes every format of ``config.include`` beside the weights and returns the files, each already compared with torch.

    Raises:
        UserError: an unusable argument, file or format; formats before it in the list have been written.
    """
    from models import load_model
    from models.checkpoints.published import ensure_weights
    from models.export.exporting import export_model
    from models.spec.registry import load_plugin

    for plugin in config.plugins:
        load_plugin(plugin)
    formats = formats_to_write(config.include, nms=config.nms)  # refused before anything is written
    weights = Path(config.weights) if config.weights else newest_weights()
    if not config.weights:
        print(f"no --weights: taking the newest run's, {weights}")
    ensure_weights(weights, download=config.download)
    model = load_model(weights, plugins=config.plugins)
    options = export_options(config, stride=model.stride, task=model.task)
    print(f"{weights}: {model.nc} classes, stride {model.stride}, exported at {options.imgsz[0]}x{options.imgsz[1]} px")
    written = []
    for export_format in formats:
        path, start = export_format.path_beside(weights), time.perf_counter()
        agreement = export_model(model, export_format.name, path, options)
        written.append(Exported(export_format.name, path, agreement.boxes_px, agreement.scores))
        print(f"{export_format.name}: {path} ({path.stat().st_size / 1e6:.1f} MB, {time.perf_counter() - start:.1f} s)")
        print(f"    {agreement}")
    print(f"Run one with: python detect.py --weights {written[-1].path} --imgsz {options.imgsz[0]} {options.imgsz[1]}")
    return written


def export_options(config: ExportConfig, *, stride: int, task: Task) -> ExportOptions:
    """How files are made, from the flags; the stride in px decides which image sizes are possible, the task which one is usual."""
    return ExportOptions(
        imgsz=_rounded_up(task.defaults.input_hw(config.imgsz), stride),
        batch_size=config.batch_size,
        dynamic=config.dynamic,
        opset=config.opset,
        simplify=config.simplify,
        topk=config.topk_all,
        iou=config.iou_thres,
        conf=config.conf_thres,
        tolerance=check_tolerance(config.tolerance) if config.tolerance else None,
    )


def _rounded_up(imgsz: Sequence[int], stride: int) -> tuple[int, int]:
    """Height and width as multiples of the stride; prints a line where that changes them."""
    height, width = (round_up_to_stride(side, stride) for side in imgsz)
    if (height, width) != tuple(imgsz):
        print(f"--imgsz {imgsz[0]} {imgsz[1]}: rounded up to {height} {width}, multiples of the stride {stride}")
    return height, width


if __name__ == "__main__":
    sys.exit(main())
