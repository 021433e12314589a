"""Exports trained weights: arguments -> ExportConfig -> export(): model.deploy() -> EXPORTERS[format] -> file compared with torch.

Example:
    python export.py --weights runs/train/exp/weights/best.pt --include onnx --dynamic
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from utils.cli.export_arguments import ExportConfig, parse_arguments
from utils.errors import UserError
from utils.run_folders import newest_weights


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        export(parse_arguments(argv))
    except UserError as error:
        print(f"export.py: {error}", file=sys.stderr)
        return 1
    return 0


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
    from models.export.exporting import ExportOptions, export_model, exporter_for, output_path

    if config.nms and not {"onnx", "onnx_end2end"} & set(config.include):
        raise UserError(f"--nms: only an ONNX file can hold suppression; add onnx to --include {' '.join(config.include)}")
    formats = ["onnx_end2end" if config.nms and name == "onnx" else name for name in config.include]
    for name in formats:
        exporter_for(name)  # refused before anything is written
    weights = Path(config.weights) if config.weights else newest_weights()
    if not config.weights:
        print(f"no --weights: taking the newest run's, {weights}")
    ensure_weights(weights, download=config.download)
    model = load_model(weights, plugins=config.plugins)
    options = ExportOptions(
        imgsz=_rounded_up(config.imgsz, model.stride),
        batch_size=config.batch_size,
        dynamic=config.dynamic,
        opset=config.opset,
        simplify=config.simplify,
        topk=config.topk_all,
        iou=config.iou_thres,
        conf=config.conf_thres,
    )
    print(f"{weights}: {model.nc} classes, stride {model.stride}, exported at {options.imgsz[0]}x{options.imgsz[1]} px")
    written = []
    for name in dict.fromkeys(formats):
        path, start = output_path(weights, name), time.perf_counter()
        agreement = export_model(model, name, path, options)
        written.append(Exported(name, path, agreement.boxes_px, agreement.scores))
        print(f"{name}: {path} ({path.stat().st_size / 1e6:.1f} MB, {time.perf_counter() - start:.1f} s)")
        print(f"    {agreement}")
    print(f"Run one with: python detect.py --weights {written[-1].path} --imgsz {options.imgsz[0]} {options.imgsz[1]}")
    return written


def _rounded_up(imgsz: Sequence[int], stride: int) -> tuple[int, int]:
    """Height and width as multiples of the stride; says so where that changes them."""
    height, width = (max(-(-side // stride), 1) * stride for side in imgsz)
    if (height, width) != tuple(imgsz):
        print(f"--imgsz {imgsz[0]} {imgsz[1]}: made {height} {width}, multiples of the stride {stride}")
    return height, width


if __name__ == "__main__":
    sys.exit(main())
