"""Processor seconds and memory per call of the segmentation losses, forward and backward, beside ultralytics' in the same run.

    python benchmarks/bench_segment_loss.py --peer-python /path/to/python-with-ultralytics

Maps of a 640 px image, 80 classes, 32 prototypes, batch 16; 20 and 200 objects an image with boxes of log-uniform size between 1 and 40 %
of the image, each with the ellipse in it as its mask, the smaller ones on top. Scores are those of an untrained network; the boxes of
YOLO26 reach 2 cells to each side.
Each side computes with one thread, every case in a process of its own, by turns. Time is the least of the
rounds; memory is the peak of the process above what the inputs take.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_loss import CLASSES, SIZE, STRIDES, Case, make_targets, timed

BATCH, OBJECTS, MASKS, RATIO, REACH = 16, (20, 200), 32, 4, 2.0
LOSSES = {"YOLOv8-seg": ("yolov8n-seg.yaml", 16), "YOLO26-seg": ("yolo26n-seg.yaml", 1)}  # the peer's YAML, bins of a side
Call = tuple[Callable[[], torch.Tensor], list[torch.Tensor]]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default="", help="a Python that has ultralytics; without it the table has no peer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=LOSSES, default=[*LOSSES])
    parser.add_argument("--objects", nargs="*", type=int, default=[*OBJECTS])
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        measure(options.worker[0], Case(*json.loads(options.worker[1])))
        return
    pythons = {"ours": sys.executable} | ({"peer": options.peer_python} if options.peer_python else {})
    print(f"{'loss':12}{'objects':>9}" + "".join(f"{side + ' s':>10}{side + ' MiB':>11}" for side in pythons))
    for name in options.only:
        for objects in options.objects:
            found: dict[str, list[tuple[float, float]]] = {side: [] for side in pythons}
            for _ in range(options.rounds):
                for side, python in pythons.items():
                    found[side].append(run(python, side, Case(name, BATCH, objects)))
            best = {side: [min(values) for values in zip(*runs)] for side, runs in found.items()}
            line = f"{name:12}{objects:>9}" + "".join(f"{s:10.3f}{m:11.0f}" for s, m in best.values())
            if len(best) == 2:
                line += "   ours / peer: " + ", ".join(f"{a / b:.2f}" for a, b in zip(best["ours"], best["peer"]))
            print(line, flush=True)


def run(python: str, side: str, case: Case) -> tuple[float, float]:
    """Processor seconds and MiB of one call, the second of a fresh process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "YOLO_OFFLINE": "1"}
    command = [python, str(Path(__file__).resolve()), "--worker", side, json.dumps(case)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("measured ")]
    if not lines:
        sys.exit(f"the process of {side} ended: {done.stderr[-2000:]}")
    return float(lines[0][0]), float(lines[0][1])


def measure(side: str, case: Case) -> None:
    """Times a call; its memory is the highest that the kernel has seen since before it."""
    torch.set_num_threads(1)
    call, leaves = (our_call if side == "ours" else peer_call)(case)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest becomes the present
    before = resident("VmHWM")
    first = timed(call, leaves)
    peak = resident("VmHWM") - before
    seconds = timed(call, leaves) if first < 20 else first
    print(f"measured {seconds} {peak}", flush=True)


def resident(key: str) -> float:
    """MiB of this process."""
    line = next(line for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


def inputs(case: Case, bins: int, branches: int) -> tuple[list[dict[str, Any]], torch.Tensor, torch.Tensor]:
    """Of each branch sides, logits and coefficients as maps a level; prototypes; and a map of the classes."""
    g = torch.Generator().manual_seed(0)
    shapes = [(SIZE // s, SIZE // s) for s in STRIDES]

    def maps(width: int, offset: float, scale: float = 1.0) -> list[torch.Tensor]:
        return [torch.randn(case.batch, width, *shape, generator=g) * scale + offset for shape in shapes]

    sides = (lambda: maps(4 * bins, 0.0)) if bins > 1 else (lambda: maps(4, REACH, 0.2))
    found = [{"sides": sides(), "logits": maps(CLASSES, -5.0), "coefficients": maps(MASKS, 0.0, 0.3)} for _ in range(branches)]
    side = SIZE // RATIO
    return (
        found,
        torch.randn(case.batch, MASKS, side, side, generator=g),
        torch.randn(case.batch, CLASSES, side // 2, side // 2, generator=g),
    )


def make_masks(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """The ellipses as an index map (B, h, w) of each image's objects, the largest first, and the rows' order by it."""
    targets, side = make_targets(case), SIZE // RATIO
    order = (targets[:, 0] * 10 - targets[:, 4] * targets[:, 5]).argsort(stable=True)
    targets = targets[order]
    axis = (torch.arange(side) + 0.5) / side
    index = torch.zeros(case.batch, side, side)
    for number, (image, _, x, y, w, h) in enumerate(targets.tolist()):
        inside = ((axis[None] - x) / (w / 2)) ** 2 + ((axis[:, None] - y) / (h / 2)) ** 2 <= 1
        index[int(image)][inside] = number % case.boxes + 1
    return index, targets


def our_call(case: Case) -> Call:
    """A loss call of this project, and its leaves."""
    from models.heads.base import HeadOutput
    from models.heads.segment import LightEndToEndSegment, Segment
    from utils.config import Hyperparameters
    from utils.types import Batch, Letterbox, Targets

    bins = LOSSES[case.loss][1]
    head = (Segment if bins > 1 else LightEndToEndSegment)(CLASSES, [16] * 3, reg_max=bins)
    head.set_strides(STRIDES)
    loss = head.build_loss(Hyperparameters())
    branches, prototypes, semantic = inputs(case, bins, len(head.branch_weights))
    like = torch.channels_last
    maps = [[torch.cat(pair, 1).contiguous(memory_format=like).requires_grad_() for pair in zip(b["sides"], b["logits"])] for b in branches]
    fields = [[m.contiguous(memory_format=like).requires_grad_() for m in b["coefficients"]] for b in branches]
    prototypes = prototypes.contiguous(memory_format=like).requires_grad_()
    shared = {"prototypes": prototypes} | ({"semantic": semantic.contiguous(memory_format=like).requires_grad_()} if bins == 1 else {})
    index, rows = make_masks(case)
    targets = Targets.of_rows(rows)
    own = index[targets.image] == (torch.arange(len(rows)) % case.boxes + 1)[:, None, None]
    bits = own.unflatten(2, (-1, 8)).to(torch.uint8) << torch.arange(7, -1, -1, dtype=torch.uint8)
    targets = targets.replace(masks=bits.sum(3).to(torch.uint8))
    del own, bits
    none = Letterbox(torch.zeros(case.batch, 2), torch.ones(case.batch, 2), torch.zeros(case.batch, 2))
    batch = Batch(torch.zeros(case.batch, 3, 1, 1), targets, ("",) * case.batch, none, case.boxes)
    output = HeadOutput(tuple(map(tuple, maps)), shared, tuple({"coefficients": tuple(f)} for f in fields))
    return lambda: sum(loss(output, batch).values()), [*(m for b in (*maps, *fields) for m in b), *shared.values()]


def peer_call(case: Case) -> Call:
    """A call of ultralytics' loss on the same maps; runs in the peer's Python."""
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import SegmentationModel

    name, bins = LOSSES[case.loss]
    model = SegmentationModel(name, nc=CLASSES, verbose=False).train()
    model.args = get_cfg()
    loss = model.init_criterion()
    branches, prototypes, semantic = inputs(case, bins, 1 if bins > 1 else 2)
    leaves = [prototypes.requires_grad_()] + ([semantic.requires_grad_()] if bins == 1 else [])
    outputs = []
    for branch in branches:
        flat = {k: torch.cat([m.flatten(2) for m in branch[k]], 2).requires_grad_() for k in ("sides", "logits", "coefficients")}
        leaves += flat.values()
        proto = prototypes if bins > 1 else (prototypes, semantic)
        feats = [torch.zeros(case.batch, 1, *m.shape[2:]) for m in branch["sides"]]
        outputs.append(
            {"boxes": flat["sides"], "scores": flat["logits"], "mask_coefficient": flat["coefficients"], "feats": feats, "proto": proto}
        )
    if bins == 1:  # as its head gives them
        outputs[1]["proto"] = tuple(p.detach() for p in outputs[1]["proto"])
    index, rows = make_masks(case)
    label = torch.full((len(index), *index.shape[1:]), 0.0)
    for image in range(case.batch):
        own = rows[rows[:, 0] == image]
        label[image] = torch.cat((own[-1:, 1], own[:, 1]))[index[image].long()]
    batch = {"batch_idx": rows[:, 0], "cls": rows[:, 1:2], "bboxes": rows[:, 2:], "masks": index, "sem_masks": label}
    predicted = outputs[0] if bins > 1 else {"one2many": outputs[0], "one2one": outputs[1]}
    return lambda: loss(predicted, batch)[0].sum(), leaves


if __name__ == "__main__":
    main()
