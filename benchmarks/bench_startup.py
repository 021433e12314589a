"""Label check of ten thousand small images, uncached and cached, and memory of the loader workers over epochs.

Times are processor seconds (user and system, of this process and its reader processes), which depend little on the load of the machine.

Example:
    python benchmarks/bench_startup.py --images 10000 --epochs 3
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.dataset_spec import load_dataset_spec
from data.labels.files import list_images
from data.labels.source import split_labels
from data.loader import BatchLoader, LoaderOptions, build_loader
from utils.config import Hyperparameters

SIDE, DIFFERENT = 64, 200  # px; images that really differ, the others are links to them


class Startup(NamedTuple):
    """Images per processor second."""

    uncached: float
    cached: float
    whole: float  # cached, with reading the dataset file, finding the images and building the loader


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        yaml_path = make_images(Path(folder), arguments.images)
        rates = startup_rates(yaml_path)
        for name, rate in zip(Startup._fields, rates):
            print(f"label check, {name:<9}{rate:>9.0f} images per processor second ({arguments.images / rate:.2f} s)")
        for epoch, rss in enumerate(worker_memory(yaml_path, epochs=arguments.epochs, workers=arguments.workers)):
            print(f"epoch {epoch}: workers hold {rss / 2**20:.1f} MiB at its end (resident and their own, mean)")


def make_images(root: Path, count: int) -> Path:
    """Fills a folder with ``count`` images (hard links to a few) and a label file for each; returns the dataset file."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / f"images/{split}").mkdir(parents=True)
        (root / f"labels/{split}").mkdir(parents=True)
    for split, number in (("train", count), ("val", 8)):
        for i in range(number):
            path = root / f"images/{split}/{i:06d}.jpg"
            if i < DIFFERENT:
                cv2.imwrite(str(path), rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8))
            else:
                os.link(root / f"images/{split}/{i % DIFFERENT:06d}.jpg", path)
            rows = rng.uniform(0.2, 0.6, (1 + i % 8, 4))
            text = "".join(f"{k % 3} {' '.join(f'{v:.6f}' for v in row)}\n" for k, row in enumerate(rows))
            (root / f"labels/{split}/{i:06d}.txt").write_text(text)
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: [a, b, c]\n")
    return root / "data.yaml"


def startup_rates(yaml_path: Path, *, repeats: int = 3) -> Startup:
    """Reads the labels once without a cache, then ``repeats`` times from it, of which the best is taken."""
    spec = load_dataset_spec(yaml_path)
    files = list_images(spec.sources("train"))

    def read() -> None:
        split_labels(spec, "train", files, workers=1, progress=False)

    uncached = processor_seconds(read)
    cached = min(processor_seconds(read) for _ in range(repeats))
    whole = min(processor_seconds(lambda: make_loader(yaml_path, 0)) for _ in range(repeats))
    return Startup(*(len(files) / s for s in (uncached, cached, whole)))


def processor_seconds(function: Callable[[], object]) -> float:
    """Processor seconds of a call, in this process and the child processes that it waits for."""
    before = _used()
    function()
    return _used() - before


def worker_memory(yaml_path: Path, *, epochs: int, workers: int) -> list[float]:
    """Mean private resident bytes of the loader's workers at the end of each epoch."""
    loader = make_loader(yaml_path, workers)
    held = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        pids: list[int] = []
        last = 0.0
        for _ in loader:
            pids = pids or children()
            last = max(sum(map(own_bytes, pids)) / max(len(pids), 1), 1.0)
        held.append(last)  # measured within the epoch: workers may end before its last batch is taken
    return held


def make_loader(yaml_path: Path, workers: int) -> BatchLoader:
    """Builds the loader as training does, without its output."""
    options = LoaderOptions(imgsz=SIDE, batch_size=32, hyp=Hyperparameters(), augment=True, workers=workers)
    return build_loader(load_dataset_spec(yaml_path), "train", options)


def children() -> list[int]:
    """Child processes of this process."""
    tasks = Path("/proc/self/task").glob("*/children")
    return [int(pid) for task in tasks for pid in task.read_text().split()]


def own_bytes(pid: int) -> int:
    """Private resident memory of a process: anonymous pages, from /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(text.split()[1]) * 1024 for text in lines if text.startswith("RssAnon"))  # one that ended has no such line


def _used() -> float:
    own, children_ = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children_.ru_utime + children_.ru_stime


if __name__ == "__main__":
    main()
