"""Augmented mosaics per second of one loader process, this project's loader and another's, alternating in one run.

    python benchmarks/bench_loader.py --data ../datasets/bccd/bccd.yaml --files 3000 --peer-python path/to/python

``--peer-python`` is a Python that has ``ultralytics`` installed; without it only this project is measured. ``--files N`` measures on N JPEG
files of about 95 KB in a temporary folder, which are noisy cuts of the data's images and of those in ``--photographs``, so that no cache
holds them; without it the data itself is read, and its folder should be writable for label caches. Each round starts a fresh process,
loads ``--warm-up`` images and then measures ``--images``. The cache of this project is limited to ``--cache-mib``; the peer keeps what it
keeps, the images of 8 batches.
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
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
JPEG_BYTES, JPEG_WH = 95_000, (640, 480)
SIDES = ("ours", "ours, colour on the device", "peer")
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
        if options.files:
            data = make_files(data, Path(folder), options)
        for title, recipe in RECIPES.items():
            rates: dict[str, list[Rate]] = {side: [] for side in SIDES if side != "peer" or options.peer_python}
            for _ in range(options.rounds):
                for side, values in rates.items():
                    python = options.peer_python if side == "peer" else sys.executable
                    values.append(run_side(python, side, data, recipe, options))
            report(title, rates)


def parse() -> argparse.Namespace:
    """Parses the arguments; those for the processes of a round are hidden."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="dataset YAML")
    parser.add_argument("--peer-python", default="", help="Python with ultralytics installed")
    parser.add_argument("--files", type=int, default=0, help="JPEG files to make and to measure on; 0: the data itself")
    parser.add_argument("--photographs", default="../shared/images", help="folder of further images to cut the files from")
    parser.add_argument("--cache-mib", type=int, default=128, help="of decoded images that this project keeps")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0, help="0: in the measuring process itself")
    parser.add_argument("--warm-up", type=int, default=320, help="images before the measured ones")
    parser.add_argument("--images", type=int, default=960, help="measured images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
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


def make_files(data: Path, folder: Path, options: argparse.Namespace) -> Path:
    """A data set of ``--files`` JPEG files, each with five boxes; the same ones in every run."""
    import cv2
    import numpy as np
    import yaml

    values, rng = yaml.safe_load(data.read_text()), np.random.default_rng(0)
    sources = [path for name in (*values["train"], options.photographs) for path in sorted(Path(name).rglob("*.jpg"))]
    qualities: dict[int, int] = {}
    photographs = [image for path in sources if (image := cv2.imread(str(path))) is not None]
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for i in range(options.files):
        photograph = photographs[i % len(photographs)]
        h, w = (int(side * rng.uniform(0.6, 1.0)) for side in photograph.shape[:2])
        y, x = (int(rng.integers(0, side - cut + 1)) for side, cut in zip(photograph.shape[:2], (h, w)))
        cut = cv2.resize(photograph[y : y + h, x : x + w], JPEG_WH).astype(np.int16)
        noisy = np.clip(cut + rng.integers(-6, 7, cut.shape), 0, 255).astype(np.uint8)
        quality = qualities[i % len(photographs)] = qualities.get(i % len(photographs)) or quality_of_size(noisy)
        cv2.imwrite(str(folder / f"images/{i:05d}.jpg"), noisy, (cv2.IMWRITE_JPEG_QUALITY, quality))
        boxes = np.c_[rng.integers(0, len(values["names"]), 5), rng.uniform(0.3, 0.7, (5, 2)), rng.uniform(0.05, 0.5, (5, 2))]
        (folder / f"labels/{i:05d}.txt").write_text("".join(f"{int(c)} {x} {y} {w} {h}\n" for c, x, y, w, h in boxes))
    target = folder / "files.yaml"
    target.write_text(yaml.safe_dump({**values, "train": str(folder / "images"), "val": str(folder / "images")}))
    return target


def quality_of_size(image: Any) -> int:
    """The JPEG quality at which an image (h, w, 3) comes nearest to ``JPEG_BYTES``."""
    import cv2

    low, high = 30, 100
    while high - low > 1:
        middle = (low + high) // 2
        size = len(cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_QUALITY, middle))[1])
        low, high = (middle, high) if size < JPEG_BYTES else (low, middle)
    return low


def run_side(python: str, side: str, data: Path, recipe: dict[str, float], options: argparse.Namespace) -> Rate:
    """Measures one side in a separate process, with its own Python."""
    command = [python, __file__, "--side", side, "--data", str(data), "--recipe", json.dumps(recipe)]
    for name in ("imgsz", "batch_size", "workers", "warm_up", "images", "cache_mib"):
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
    batches = peer_batches(options, recipe) if options.side == "peer" else our_batches(options, recipe)
    take(batches, options.warm_up)
    wall, cpu = time.perf_counter(), time.process_time()
    images = take(batches, options.images)
    return {"wall": images / (time.perf_counter() - wall), "cpu": images / (time.process_time() - cpu)}


def take(batches: Iterator[Any], images: int) -> int:
    """Takes batches until they hold that many images; returns how many they held."""
    taken = 0
    while taken < images:
        taken += len(next(batches))
    return taken


def our_batches(options: argparse.Namespace, recipe: dict[str, float]) -> Iterator[Any]:
    """Batches of images, epoch after epoch."""
    sys.path.insert(0, str(ROOT))
    from data.dataset_spec import load_dataset_spec
    from data.loader import LoaderOptions, build_loader
    from utils.config import Hyperparameters

    hyp = Hyperparameters().replace(copy_paste=0.0, **recipe)
    settings = LoaderOptions(
        imgsz=options.imgsz, batch_size=options.batch_size, hyp=hyp, augment=True, workers=options.workers,
        finish_on_device=options.side != "ours",
    )  # fmt: skip
    loader = build_loader(load_dataset_spec(options.data), "train", settings)
    loader.dataset.store.recent_limit = options.cache_mib * 2**20
    for epoch in count():
        loader.set_epoch(epoch)
        yield from (batch.images for batch in loader)


def peer_batches(options: argparse.Namespace, recipe: dict[str, float]) -> Iterator[Any]:
    """The same of ultralytics."""
    from ultralytics.cfg import get_cfg
    from ultralytics.data import build_dataloader, build_yolo_dataset
    from ultralytics.data.utils import check_det_dataset

    config = get_cfg(overrides={"imgsz": options.imgsz, "task": "detect", "workers": options.workers, **recipe})
    data = check_det_dataset(options.data)
    dataset = build_yolo_dataset(config, data["train"], options.batch_size, data, mode="train", rect=False, stride=32)
    loader = build_dataloader(dataset, options.batch_size, options.workers, shuffle=True, rank=-1)
    while True:
        yield from (batch["img"] for batch in loader)


def report(title: str, rates: dict[str, list[Rate]]) -> None:
    """Prints medians, all rounds, and the ratio where both sides ran."""
    print(title)
    for unit, words in (("wall", "images a second"), ("cpu", "images a second of CPU time, this process")):
        values = {side: [getattr(rate, unit) for rate in all_rates] for side, all_rates in rates.items() if all_rates}
        for side, numbers in values.items():
            print(f"  {side}: {statistics.median(numbers):.0f} {words} ({', '.join(f'{n:.0f}' for n in numbers)})")
        for side in [side for side in values if side != "peer" and "peer" in values]:
            print(f"  {side} / peer {statistics.median(values[side]) / statistics.median(values['peer']):.2f}", flush=True)


if __name__ == "__main__":
    main()
