"""Seconds and peak memory of one training step, compared with the same network in another package in one run.

    python benchmarks/bench_train_step.py --cfg gelan-c.yaml --peer-python PATH --peer-cfg yolov9c.yaml --imgsz 320 --batch-size 4

The sides alternate in separate processes, so that memory is measured separately and a drift of the machine's speed affects both. A step is
forward, loss, backward, clipping and an SGD step on the same random images and boxes; the figure is the median of the steps. The peer is a
Python interpreter with ``ultralytics``; without it only this project is measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

BOXES_PER_IMAGE = 20


def main() -> None:
    """Measures each side in separate processes and prints the table."""
    args = _arguments()
    if args.side:
        print(json.dumps(_measure(args)))
        return
    sides = [("ours", sys.executable, args.cfg)] + ([("peer", args.peer_python, args.peer_cfg)] if args.peer_python else [])
    results: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        for side, python, cfg in sides:
            command = [python, __file__, "--side", side, "--cfg", cfg, "--imgsz", str(args.imgsz), "--batch-size", str(args.batch_size)]
            command += ["--steps", str(args.steps), "--threads", str(args.threads), "--checkpoint-activations", args.checkpoint_activations]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                sys.exit(f"{side}: {run.stderr.strip().splitlines()[-1]}")
            results.setdefault(side, []).append(json.loads(run.stdout.strip().splitlines()[-1]))
    _report(results, {side: cfg for side, _, cfg in sides})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", default="gelan-c.yaml")
    parser.add_argument("--peer-python", help="a Python with ultralytics")
    parser.add_argument("--peer-cfg", default="yolov9c.yaml")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoint-activations", default="off", metavar="OF", help="of our side: off, attention or all")
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(args: argparse.Namespace) -> dict[str, float]:
    if args.side == "ours":
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from utils.cli.allocator import keep_freed_memory

        keep_freed_memory()  # as every script does
    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    step, parameters = (_our_step if args.side == "ours" else _peer_step)(args)
    torch.set_num_threads(args.threads)  # again: the peer sets its own when it chooses a device
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, nesterov=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, processor = [], []
    for _ in range(args.steps + 1):
        start, processor_start = time.perf_counter(), time.process_time()
        step().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - processor_start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": sorted(seconds[1:])[len(seconds[1:]) // 2],
        "processor_seconds": min(processor[1:]),
        "peak_mib": peak / 1024,
        "step_mib": (peak - before) / 1024,
        "parameters": sum(p.numel() for p in parameters),
        "threads": torch.get_num_threads(),
    }


def _boxes(args: argparse.Namespace):
    """The same targets for both sides: (M, 6) [image, class, cx, cy, w, h]."""
    import torch

    generator = torch.Generator().manual_seed(1)
    count = args.batch_size * BOXES_PER_IMAGE
    image = torch.arange(args.batch_size).repeat_interleave(BOXES_PER_IMAGE)[:, None].float()
    classes = torch.randint(0, 80, (count, 1), generator=generator).float()
    centre = 0.2 + 0.6 * torch.rand(count, 2, generator=generator)
    size = 0.05 + 0.25 * torch.rand(count, 2, generator=generator)
    return torch.cat([image, classes, centre, size], 1)


def _our_step(args: argparse.Namespace):
    import torch

    from engine.memory_format import prefer_onednn
    from engine.training.recompute import checkpoint_activations
    from models import build_model
    from utils.config import Hyperparameters
    from utils.types import Batch, Letterbox, Targets, to_unit_range

    model = build_model(args.cfg, nc=80).train()
    prefer_onednn(model)  # as train.py does
    if args.checkpoint_activations != "off":
        checkpoint_activations(model, args.checkpoint_activations)
    loss = model.head.build_loss(Hyperparameters())
    images = torch.randint(0, 256, (args.batch_size, 3, args.imgsz, args.imgsz), dtype=torch.uint8)
    sides = torch.full((args.batch_size, 2), args.imgsz)
    letterbox = Letterbox(sides, torch.ones_like(sides).float(), torch.zeros_like(sides).float())
    batch = Batch(images, Targets.of_rows(_boxes(args)), ("",) * args.batch_size, letterbox, BOXES_PER_IMAGE)

    def step():
        return sum(loss(model(to_unit_range(batch.images)), batch).values()) * args.batch_size

    return step, [p for p in model.parameters() if p.requires_grad]


def _peer_step(args: argparse.Namespace):
    import torch
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils.torch_utils import select_device

    select_device("cpu", verbose=False)
    model = DetectionModel(args.cfg, nc=80, verbose=False).train()
    model.args = get_cfg()
    targets = _boxes(args)
    images = torch.randint(0, 256, (args.batch_size, 3, args.imgsz, args.imgsz), dtype=torch.uint8)
    labels = {"batch_idx": targets[:, 0], "cls": targets[:, 1:2], "bboxes": targets[:, 2:]}

    def step():
        return model.loss({"img": images.float() / 255, **labels})[0].sum()

    return step, [p for p in model.parameters() if p.requires_grad]


def _report(results: dict[str, list[dict[str, float]]], configs: dict[str, str]) -> None:
    import statistics

    medians = {side: {key: statistics.median(r[key] for r in runs) for key in runs[0]} for side, runs in results.items()}
    print(f"{'side':<6} {'network':<28} {'parameters':>12} {'threads':>8} {'s/step':>8} {'cpu s':>8} {'peak MiB':>9} {'of the step':>12}")
    for side, m in medians.items():
        row = f"{side:<6} {configs[side]:<28} {m['parameters']:>12,.0f} {m['threads']:>8.0f} {m['seconds']:>8.3f}"
        print(f"{row} {m['processor_seconds']:>8.3f} {m['peak_mib']:>9.0f} {m['step_mib']:>12.0f}")
    if "peer" in medians:
        ratios = {key: medians["ours"][key] / medians["peer"][key] for key in ("seconds", "processor_seconds", "peak_mib", "step_mib")}
        print("ours / peer: " + ", ".join(f"{key} {value:.2f}" for key, value in ratios.items()))


if __name__ == "__main__":
    main()
