"""Processor seconds per loss call, forward and backward, compared with ultralytics' v8 loss in the same run.

    python benchmarks/bench_loss.py --peer-python /path/to/python-with-ultralytics

Maps of a 640 px image, 80 classes, boxes of log-uniform size between 1 and 40 % of the image; the number of boxes per image varies at batch
16, the batch at 20 boxes per image. Maps are in the memory layout in which each side's network makes them: ours channels-last, the peer's
contiguous. Each side is a persistent process with one thread; calls alternate between them round by round, so that a drift of the machine's
speed affects both. The figure is the least processor time of the rounds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CLASSES, SIZE, STRIDES = 80, 640, (8, 16, 32)
BATCH, BOXES, BATCHES, USUAL = 16, (1, 10, 20, 100, 500), (4, 8, 16, 32), 20
LONG = 100  # boxes per image from which a call needs no warm-up
V5_ANCHORS = [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]]
OURS = ("v8", "v9 dual", "v5", "v7 OTA", "v7 aux OTA")
PEER = "ultralytics v8"


class Case(NamedTuple):
    """One cell of the tables."""

    loss: str
    batch: int
    boxes: int


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default="", help="a Python that has ultralytics; without it the table has no peer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve()
        return
    workers = {"ours": Worker(sys.executable)} | ({"peer": Worker(options.peer_python)} if options.peer_python else {})
    sizes = [(BATCH, n) for n in BOXES] + [(b, USUAL) for b in BATCHES if b != BATCH]
    names = (*OURS, PEER) if options.peer_python else OURS
    least = {Case(name, *size): float("inf") for size in sizes for name in names}
    for number in range(options.rounds):
        for case in least:
            least[case] = min(least[case], workers["peer" if case.loss == PEER else "ours"].seconds(case))
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    print_table("boxes per image, batch 16", {name: [least[Case(name, BATCH, n)] for n in BOXES] for name in names}, BOXES)
    print_table("images, 20 boxes each", {name: [least[Case(name, b, USUAL)] for b in BATCHES] for name in names}, BATCHES)


class Worker:
    """A process that measures the requested cases."""

    def __init__(self, python: str) -> None:
        command = [python, str(Path(__file__).resolve()), "--worker"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds(self, case: Case) -> float:
        """Processor seconds of one call."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(case), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        sys.exit(f"the process of {case.loss} ended")


def serve() -> None:
    """Worker loop: reads one case per line and writes its seconds; short cases get a warm-up call."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        case = Case(*json.loads(line))
        call, leaves = (peer_call if case.loss == PEER else our_call)(case)
        if case.boxes <= LONG:
            timed(call, leaves)
        print(f"seconds {timed(call, leaves)}", flush=True)


def timed(call: Callable[[], Any], leaves: list[torch.Tensor]) -> float:
    """Times a call and its backward pass in processor seconds."""
    for leaf in leaves:
        leaf.grad = None
    start = time.process_time()
    call().backward()
    return time.process_time() - start


def our_call(case: Case) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    """Returns a loss call of this project on random maps, and the maps."""
    from models.heads.anchor_based import AnchorDetect, IAuxDetect, IDetect
    from models.heads.anchor_free import Detect
    from models.heads.base import HeadOutput
    from models.heads.multi_branch import DualDDetect
    from utils.config import Hyperparameters
    from utils.types import Batch, Letterbox, Targets

    cls = dict(zip(OURS, (Detect, DualDDetect, AnchorDetect, IDetect, IAuxDetect)))[case.loss]
    branches, based = len(cls.branch_weights), cls.anchor_based
    channels = [16] * 3 * branches
    head = cls(CLASSES, V5_ANCHORS, channels) if based else cls(CLASSES, channels)
    head.set_strides(STRIDES)
    loss = head.build_loss(Hyperparameters(box=0.05, cls=0.3, obj=0.7, anchor_t=4.0) if based else Hyperparameters())
    maps = make_maps(case.batch, 3 * (5 + CLASSES) if based else 64 + CLASSES, branches, based)
    none = Letterbox(torch.zeros(case.batch, 2), torch.ones(case.batch, 2), torch.zeros(case.batch, 2))
    batch = Batch(torch.zeros(case.batch, 3, 1, 1), Targets.of_rows(make_targets(case)), ("",) * case.batch, none, case.boxes)
    output = HeadOutput(tuple(map(tuple, maps)))
    return lambda: sum(loss(output, batch).values()), [m for branch in maps for m in branch]


def peer_call(case: Case) -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    """Returns a call of ultralytics' v8 loss on the same maps; runs in the peer's Python."""
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils.loss import v8DetectionLoss

    model = DetectionModel("yolov8n.yaml", nc=CLASSES, verbose=False)
    model.args = get_cfg()
    loss = v8DetectionLoss(model.train())
    maps = make_maps(case.batch, 64 + CLASSES, 1, False, contiguous=True)[0]
    flat = torch.cat([m.detach().flatten(2) for m in maps], dim=2)
    boxes, scores = (t.clone().requires_grad_() for t in flat.split((64, CLASSES), dim=1))
    targets = make_targets(case)
    batch = {"batch_idx": targets[:, 0], "cls": targets[:, 1:2], "bboxes": targets[:, 2:]}
    return lambda: loss({"boxes": boxes, "scores": scores, "feats": maps}, batch)[0].sum(), [boxes, scores]


def make_maps(batch: int, width: int, branches: int, anchor_based: bool, *, contiguous: bool = False) -> list[list[torch.Tensor]]:
    """Maps as early in training: scores near zero; channels-last in memory unless ``contiguous``."""
    g = torch.Generator().manual_seed(0)
    offset = torch.zeros(width)
    if anchor_based:
        offset.view(3, -1)[:, 4:] = -5
    else:
        offset[64:] = -5
    shapes = [(batch, width, SIZE // s, SIZE // s) for s in STRIDES]
    layout = torch.contiguous_format if contiguous else torch.channels_last
    maps = [[torch.randn(shape, generator=g) + offset.view(1, -1, 1, 1) for shape in shapes] for _ in range(branches)]
    return [[m.contiguous(memory_format=layout).requires_grad_() for m in branch] for branch in maps]


def make_targets(case: Case) -> torch.Tensor:
    """(batch * boxes, 6) image, class, normalised boxes."""
    g, count = torch.Generator().manual_seed(1), case.batch * case.boxes
    centre = 0.1 + 0.8 * torch.rand(count, 2, generator=g)
    size = 0.01 * 40 ** torch.rand(count, 2, generator=g)
    image = torch.arange(case.batch).repeat_interleave(case.boxes)[:, None].float()
    return torch.cat((image, torch.randint(CLASSES, (count, 1), generator=g).float(), centre, size), dim=1)


def print_table(title: str, rows: dict[str, list[float]], columns: tuple[int, ...]) -> None:
    """Prints one row per loss and its ratio to the peer's."""
    print(f"\n{title:30}" + "".join(f"{n:>9}" for n in columns))
    for name, seconds in rows.items():
        print(f"{name:30}" + "".join(f"{s:9.3f}" for s in seconds))
    for name, seconds in rows.items():
        if PEER in rows and name != PEER:
            print(f"{name + ' / ' + PEER:30}" + "".join(f"{s / p:9.2f}" for s, p in zip(seconds, rows[PEER])))


if __name__ == "__main__":
    main()
