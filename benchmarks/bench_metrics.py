"""Time of the metrics of a large data set, compared with pycocotools on the same detections.

python benchmarks/bench_metrics.py --images 5000 --detections 300 --classes 80
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from utils.metrics.coco_eval import as_coco_documents, run_pycocotools
from utils.metrics.metrics import GroundTruth, MetricAccumulator
from utils.types import Detections


def main() -> None:
    """Prints seconds and mAP of both sides, and the largest difference of the 12 numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=300, help="per image")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--objects", type=int, default=7, help="mean per image")
    parser.add_argument("--no-pycocotools", action="store_true")
    options = parser.parse_args()

    truth, detections = synthetic(options.images, options.detections, options.classes, objects=options.objects)
    metrics = MetricAccumulator([str(i) for i in range(options.classes)])
    begin = time.perf_counter()
    for start in range(0, options.images, 32):
        rows = (truth.image >= start) & (truth.image < start + 32)
        part = truth.map(lambda column, rows=rows: column[rows])
        part = part.replace(image=part.image - start)
        chunk = detections[start : start + 32]
        metrics.update(chunk, part, images=range(start + 1, start + 1 + len(chunk)))
    collected = time.perf_counter()
    result = metrics.compute()
    done = time.perf_counter()
    print(f"{options.images} images x {options.detections} detections, {options.classes} classes, {len(truth.image)} objects")
    print(f"this project: collect {collected - begin:.2f} s, compute {done - collected:.2f} s, mAP {result.map:.6f} (rule: {result.rule})")
    if not options.no_pycocotools:
        begin = time.perf_counter()
        stats = run_pycocotools(*as_coco_documents(metrics))
        print(f"pycocotools:  {time.perf_counter() - begin:.2f} s, mAP {stats['AP']:.6f}")
        print(f"largest difference of the 12 numbers: {max(abs(stats[k] - result.coco_stats[k]) for k in stats):.1e}")


def synthetic(images: int, detections: int, classes: int, *, objects: int, seed: int = 0) -> tuple[GroundTruth, list[Detections]]:
    """Makes objects of log-normal size, and detections of which every fifth is near an object and mostly of its class."""
    rng = np.random.default_rng(seed)
    count = rng.poisson(objects, images)
    image = np.repeat(np.arange(images), count)
    total = int(count.sum())
    size = np.exp(rng.normal(4, 0.9, (total, 2))).clip(4, 500)
    ltwh = np.hstack((rng.uniform(0, 640, (total, 2)) - size / 2, size))
    label = rng.integers(0, classes, total)
    crowd = rng.random(total) < 0.01
    truth = GroundTruth(*map(torch.from_numpy, (image, label, ltwh, ltwh[:, 2:].prod(axis=1) * rng.uniform(0.5, 1, total), crowd)))

    starts = np.cumsum(count) - count
    where = np.repeat(np.arange(images), detections)
    near = (rng.random(len(where)) < 0.2) & (count[where] > 0)
    target = (starts[where] + rng.integers(0, 1 << 30, len(where)) % np.maximum(count[where], 1)).clip(max=total - 1)
    box = np.hstack((rng.uniform(0, 500, (len(where), 2)), np.exp(rng.normal(4, 0.9, (len(where), 2)))))
    jitter = rng.normal(0, 0.08, (len(where), 4)) * ltwh[target][:, [2, 3, 2, 3]]
    box[near] = (ltwh[target] + jitter)[near]
    box[:, 2:] = box[:, 2:].clip(min=1)
    classes_of = np.where(near & (rng.random(len(where)) < 0.8), label[target], rng.integers(0, classes, len(where)))
    score = rng.beta(0.5, 4, len(where)) + 0.3 * near * rng.random(len(where))
    xyxy = np.hstack((box[:, :2], box[:, :2] + box[:, 2:])).astype(np.float32)
    columns = [torch.from_numpy(a).view(images, detections, *a.shape[1:]) for a in (xyxy, score.astype(np.float32), classes_of)]
    order = columns[1].argsort(dim=1, descending=True)
    columns = [columns[0].gather(1, order[..., None].expand(-1, -1, 4)), *(c.gather(1, order) for c in columns[1:])]
    return truth, [Detections(*rows) for rows in zip(*columns)]


if __name__ == "__main__":
    main()
