"""Augmented mosaics per second of one loader process, this project's loader and another's, alternating in one run.

    python benchmarks/bench_loader.py --data ../datasets/bccd/bccd.yaml --peer-python path/to/python

``--peer-python`` is a Python that has ``ultralytics`` installed; without it only this project is measured. Each round starts a fresh
process, loads one epoch for warm-up and then measures ``--epochs``. The data set's folder should be writable, so that both can write their
label caches.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"mosaic, scale 0.5": {"mixup": 0.0, "scale": 0.5}, "mosaic, mixup 0.15, scale 0.9": {"mixup": 0.15, "scale": 0.9}}


class Rate(NamedTuple):
    """Images per second."""

    wall: float
    cpu: float  # of the measuring process's own CPU time, which other work on the machine hardly disturbs


def main() -> None:
    """Measures both sides for each recipe, and prints a table with ratios."""
    options = parse()
    if options.side:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        data = absolute_yaml(Path(options.data), Path(folder))
        for title, recipe in RECIPES.items():
            rates: dict[str, list[Rate]] = {"ours": [], "peer": []}
            for _ in range(options.rounds):
                for side, python in (("ours", sys.executable), ("peer", options.peer_python)):
                    if python:
                        rates[side].append(run_side(python, side, data, recipe, options))
            report(title, rates)


def parse() -> argparse.Namespace:
    """Parses the arguments; those for the processes of a round are hidden."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset YAML")
    parser.add_argument("--peer-python", default="", help="Python with ultralytics installed")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0, help="0: in the measuring process itself")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    parser.add_argument("--recipe", default="{}", help=argparse.SUPPRESS)
    return parser.parse_args()


def absolute_yaml(path: Path, folder: Path) -> Path:
    """Writes a dataset YAML with an absolute path, which both sides resolve equally."""
    import yaml

    sys.path.insert(0, str(ROOT))
    from data.dataset_spec import load_dataset_spec

    spec = load_dataset_spec(path)
    values = {"train": [str(p) for p in spec.train], "val": [str(p) for p in spec.val], "names": dict(enumerate(spec.names))}
    target = folder / "data.yaml"
    target.write_text(yaml.safe_dump(values))
    return target


def run_side(python: str, side: str, data: Path, recipe: dict[str, float], options: argparse.Namespace) -> Rate:
    """Measures one side in a separate process, with its own Python."""
    command = [python, __file__, "--side", side, "--data", str(data), "--recipe", json.dumps(recipe)]
    for name in ("imgsz", "batch_size", "workers", "epochs"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-2000:]}")
    return Rate(**json.loads(done.stdout.splitlines()[-1]))


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Measures one side in this process."""
    import cv2

    cv2.setNumThreads(0)
    recipe = json.loads(options.recipe)
    epochs = our_epochs(options, recipe) if options.side == "ours" else peer_epochs(options, recipe)
    for _ in next(epochs):
        pass
    images, wall, cpu = 0, time.perf_counter(), time.process_time()
    for _ in range(options.epochs):
        images += sum(len(batch) for batch in next(epochs))
    return {"wall": images / (time.perf_counter() - wall), "cpu": images / (time.process_time() - cpu)}


def our_epochs(options: argparse.Namespace, recipe: dict[str, float]) -> Iterator[Iterator]:
    """Yields one iterator over batches of images per epoch."""
    sys.path.insert(0, str(ROOT))
    from data.dataset_spec import load_dataset_spec
    from data.loader import LoaderOptions, build_loader
    from utils.config import Hyperparameters

    hyp = Hyperparameters().replace(copy_paste=0.0, **recipe)
    settings = LoaderOptions(imgsz=options.imgsz, batch_size=options.batch_size, hyp=hyp, augment=True, workers=options.workers)
    loader = build_loader(load_dataset_spec(options.data), "train", settings)
    for epoch in range(options.epochs + 1):
        loader.set_epoch(epoch)
        yield (batch.images for batch in loader)


def peer_epochs(options: argparse.Namespace, recipe: dict[str, float]) -> Iterator[Iterator]:
    """The same of ultralytics."""
    from ultralytics.cfg import get_cfg
    from ultralytics.data import build_dataloader, build_yolo_dataset
    from ultralytics.data.utils import check_det_dataset

    config = get_cfg(overrides={"imgsz": options.imgsz, "task": "detect", "workers": options.workers, **recipe})
    data = check_det_dataset(options.data)
    dataset = build_yolo_dataset(config, data["train"], options.batch_size, data, mode="train", rect=False, stride=32)
    loader = build_dataloader(dataset, options.batch_size, options.workers, shuffle=True, rank=-1)
    for _ in range(options.epochs + 1):
        yield (batch["img"] for batch in loader)


def report(title: str, rates: dict[str, list[Rate]]) -> None:
    """Prints medians, all rounds, and the ratio where both sides ran."""
    print(title)
    for unit, words in (("wall", "images a second"), ("cpu", "images a second of CPU time, this process")):
        values = {side: [getattr(rate, unit) for rate in all_rates] for side, all_rates in rates.items() if all_rates}
        for side, numbers in values.items():
            print(f"  {side}: {statistics.median(numbers):.0f} {words} ({', '.join(f'{n:.0f}' for n in numbers)})")
        if len(values) == 2:
            print(f"  ratio {statistics.median(values['ours']) / statistics.median(values['peer']):.2f}", flush=True)


if __name__ == "__main__":
    main()
