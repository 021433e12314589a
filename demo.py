"""`make demo`: trains, validates, detects and exports on the embedded data set in a few minutes, and prints the paths of the results."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from utils.metrics.metrics import Metrics


def main() -> int:
    """Runs the demo; returns the exit status."""
    from utils.cli.script import run_script

    return run_script("demo.py", demo)


def demo() -> None:
    """Runs the four scripts in turn through their Python interfaces."""
    from detect import detect
    from engine.training.setup.config import DEMO
    from export import export
    from train import train
    from utils.cli.detect_arguments import DetectConfig
    from utils.cli.export_arguments import ExportConfig
    from utils.cli.val_arguments import ValConfig
    from utils.config import TrainConfig
    from val import validate

    started, side = time.perf_counter(), DEMO["imgsz"]
    announce(f"1/4 train {DEMO['cfg']} on {DEMO['data']} (the same as: python train.py)")
    trained = train(TrainConfig(**DEMO))
    weights = str(trained.best_weights)
    announce(f"2/4 validate (the same as: python val.py --imgsz {side})")
    metrics = cast("Metrics", validate(ValConfig(weights=weights, imgsz=side, workers=DEMO["workers"])))
    announce(f"3/4 detect on the validation images (the same as: python detect.py --imgsz {side})")
    found = detect(DetectConfig(weights=weights, imgsz=(side, side)))
    announce(f"4/4 export (the same as: python export.py --include onnx --dynamic --imgsz {side} {side})")
    exported = export(ExportConfig(weights=weights, imgsz=(side, side), include=("onnx",), dynamic=True))
    announce(f"done in {time.perf_counter() - started:.0f} s")
    print(f"{'mAP@0.5':>12}  {metrics.map50:.3f} (@0.5:0.95 {metrics.map:.3f}, rule: {metrics.rule})")
    places: dict[str, Path | None] = {"training": trained.save_dir, "weights": trained.best_weights, "detections": found.folder}
    for what, path in {**places, "ONNX": exported[0].path}.items():
        print(f"{what:>12}  {path}")


def announce(step: str) -> None:
    """Prints a heading between the steps."""
    print(f"\n=== {step} ===", flush=True)


if __name__ == "__main__":
    sys.exit(main())
