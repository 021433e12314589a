"""Seconds of CPU per loss call, forward and backward, beside ultralytics' v8 loss in the same run.

    python benchmarks/bench_loss.py --peer-python /path/to/python-with-ultralytics

Batch 16, maps of a 640 px image, 80 classes, boxes of log-uniform size between 1 and 40 % of the image; one thread; CPU time of the
process (so that other work on the machine counts little), the least of the repetitions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BATCH, CLASSES, SIZE, STRIDES = 16, 80, 640, (8, 16, 32)
BOXES = (1, 10, 20, 100, 500)
V5_ANCHORS = [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default="", help="a Python that has ultralytics; without it the table has no peer")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peer:
        print(json.dumps(measure_peer(options.repeat)))
        return
    rows = measure_ours(options.repeat)
    if options.peer_python:
        command = [options.peer_python, str(Path(__file__).resolve()), "--peer", "--repeat", str(options.repeat)]
        rows["ultralytics v8"] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    print_table(rows)


def print_table(rows: dict[str, list[float]]) -> None:
    """One row a loss, then its ratio to the peer's."""
    print(f"{'CPU seconds, boxes an image:':30}" + "".join(f"{n:>9}" for n in BOXES))
    for name, seconds in rows.items():
        print(f"{name:30}" + "".join(f"{s:9.3f}" for s in seconds))
    peer = rows.get("ultralytics v8")
    for name, seconds in rows.items():
        if peer and seconds is not peer:
            print(f"{name + ' / ultralytics v8':30}" + "".join(f"{s / p:9.2f}" for s, p in zip(seconds, peer)))


def measure_ours(repeat: int) -> dict[str, list[float]]:
    """Seconds for each of ``BOXES`` by loss."""
    from models.heads.anchor_based import AnchorDetect, IAuxDetect, IDetect
    from models.heads.anchor_free import Detect
    from models.heads.base import HeadOutput
    from models.heads.multi_branch import DualDDetect
    from utils.config import Hyperparameters
    from utils.types import Batch, Letterbox

    hyps = {True: Hyperparameters(box=0.05, cls=0.3, obj=0.7, anchor_t=4.0), False: Hyperparameters()}
    results = {}
    heads = {"v8": Detect, "v9 dual": DualDDetect, "v5": AnchorDetect, "v7 OTA": IDetect, "v7 auxiliary OTA": IAuxDetect}
    for name, cls in heads.items():
        branches, based = len(cls.branch_weights), cls.anchor_based
        channels = [16] * 3 * branches
        head = cls(CLASSES, V5_ANCHORS, channels) if based else cls(CLASSES, channels)
        head.set_strides(STRIDES)
        loss = head.build_loss(hyps[based])
        results[name] = []
        for n in BOXES:
            maps, targets = make_maps(3 * (5 + CLASSES) if based else 64 + CLASSES, branches, based), make_targets(n)
            none = Letterbox(torch.zeros(BATCH, 2), torch.ones(BATCH, 2), torch.zeros(BATCH, 2))
            batch = Batch(torch.zeros(BATCH, 3, 1, 1), targets, ("",) * BATCH, none, n)
            leaves = [m for branch in maps for m in branch]
            output = HeadOutput(tuple(map(tuple, maps)))
            results[name].append(seconds_of(lambda: sum(loss(output, batch).values()), leaves, repeat))  # noqa: B023
    return results


def measure_peer(repeat: int) -> list[float]:
    """Seconds for each of ``BOXES`` of ultralytics' v8 loss; runs in the peer's Python."""
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils.loss import v8DetectionLoss

    model = DetectionModel("yolov8n.yaml", nc=CLASSES, verbose=False)
    model.args = get_cfg()
    loss = v8DetectionLoss(model.train())
    maps = make_maps(64 + CLASSES, 1, False)[0]
    flat = torch.cat([m.detach().flatten(2) for m in maps], dim=2)
    boxes, scores = (t.clone().requires_grad_() for t in flat.split((64, CLASSES), dim=1))
    raw = {"boxes": boxes, "scores": scores, "feats": maps}
    results = []
    for n in BOXES:
        targets = make_targets(n)
        batch = {"batch_idx": targets[:, 0], "cls": targets[:, 1:2], "bboxes": targets[:, 2:]}
        results.append(seconds_of(lambda: loss(raw, batch)[0].sum(), [boxes, scores], repeat))  # noqa: B023
    return results


def seconds_of(call: Callable[[], Any], leaves: list[torch.Tensor], repeat: int) -> float:
    """The least CPU seconds of a call and its backward pass, after one to warm up."""
    least = float("inf")
    for _ in range(repeat + 1):
        for leaf in leaves:
            leaf.grad = None
        start = time.process_time()
        call().backward()
        least = min(least, time.process_time() - start)
    return least


def make_maps(width: int, branches: int, anchor_based: bool) -> list[list[torch.Tensor]]:
    """Maps as early in training: scores near zero."""
    g = torch.Generator().manual_seed(0)
    offset = torch.zeros(width)
    if anchor_based:
        offset.view(3, -1)[:, 4:] = -5
    else:
        offset[64:] = -5
    shapes = [(BATCH, width, SIZE // s, SIZE // s) for s in STRIDES]
    return [[(torch.randn(shape, generator=g) + offset.view(1, -1, 1, 1)).requires_grad_() for shape in shapes] for _ in range(branches)]


def make_targets(n: int) -> torch.Tensor:
    """(BATCH * n, 6) image, class, normalised boxes."""
    g = torch.Generator().manual_seed(1)
    centre = 0.1 + 0.8 * torch.rand(BATCH * n, 2, generator=g)
    size = 0.01 * 40 ** torch.rand(BATCH * n, 2, generator=g)
    image = torch.arange(BATCH).repeat_interleave(n)[:, None].float()
    return torch.cat((image, torch.randint(CLASSES, (BATCH * n, 1), generator=g).float(), centre, size), dim=1)


if __name__ == "__main__":
    main()
