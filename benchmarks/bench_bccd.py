"""Trains on BCCD from scratch with several seeds, and another package at the same size, epochs and batch; prints mAP and seconds per epoch.

    python benchmarks/bench_bccd.py --data path/to/bccd.yaml --cfg yolov9-t-FocalModulation.yaml --seeds 0 1 2
    python benchmarks/bench_bccd.py --data path/to/bccd.yaml --peer-python PATH --peer-cfg yolov8n.yaml yolov9t.yaml --epochs 3 --seeds 0

The sides alternate, each in a separate process. Figures are of the best epoch on the validation images, by COCO's rule on both sides (the
peer's agrees to 0.001). The peer is a Python interpreter with ``ultralytics``; its recipe is SGD with its defaults, ours is ``--hyp``.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PEER = """
import sys
from ultralytics import YOLO
cfg, data, epochs, imgsz, batch, seed, workers, project = sys.argv[1:]
YOLO(cfg).train(data=data, epochs=int(epochs), imgsz=int(imgsz), batch=int(batch), seed=int(seed), workers=int(workers), project=project,
                name="peer", device="cpu", optimizer="SGD", lr0=0.01, plots=False, pretrained=False, verbose=False)
"""


class Outcome(NamedTuple):
    """Results of one training."""

    map50: float
    map: float
    seconds: float  # whole process
    epochs: int


def main() -> None:
    """Trains all sides with all seeds and prints the table."""
    args = _arguments()
    sides = [("ours", cfg) for cfg in args.cfg] + [("peer", cfg) for cfg in args.peer_cfg if args.peer_python]
    outcomes: dict[tuple[str, str], list[Outcome]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            for side, cfg in sides:
                project = Path(folder) / f"{side}-{Path(cfg).stem}-{seed}"
                run = _ours if side == "ours" else _peers
                outcomes[side, cfg].append(run(args, cfg, seed, project))
                print(f"{side} {cfg} seed {seed}: {outcomes[side, cfg][-1]}", flush=True)
    print(f"\n{'side':<5} {'network':<34} {'seeds':>5} {'mAP50':>7} {'mAP50-95':>9} {'s/epoch':>8}")
    for (side, cfg), runs in outcomes.items():
        means = [statistics.mean(getattr(r, key) for r in runs) for key in ("map50", "map")]
        seconds = statistics.median(r.seconds / r.epochs for r in runs)
        print(f"{side:<5} {cfg:<34} {len(runs):>5} {means[0]:>7.3f} {means[1]:>9.3f} {seconds:>8.1f}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="bccd.yaml")
    parser.add_argument("--cfg", nargs="*", default=["yolov9-t-FocalModulation.yaml"])
    parser.add_argument("--hyp", type=Path, default=Path(__file__).with_name("hyp.bccd.yaml"))
    parser.add_argument("--peer-python", help="a Python with ultralytics")
    parser.add_argument("--peer-cfg", nargs="*", default=["yolov8n.yaml", "yolov9t.yaml"])
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser.parse_args()


def _ours(args: argparse.Namespace, cfg: str, seed: int, project: Path) -> Outcome:
    flags = {
        "cfg": cfg,
        "data": args.data.resolve(),
        "hyp": args.hyp.resolve(),
        "imgsz": args.imgsz,
        "epochs": args.epochs,
        "batch-size": args.batch_size,
        "workers": args.workers,
        "seed": seed,
        "project": project,
        "name": "run",
        "device": "cpu",
        "optimizer": "SGD",  # as the peer's, whatever the family's recipe has
    }
    command = [sys.executable, str(ROOT / "train.py"), "--noplots", *(str(w) for k, v in flags.items() for w in (f"--{k}", v))]
    seconds = _timed(command, cwd=ROOT)
    return _read(project / "run" / "results.csv", "metrics/mAP_0.5", "metrics/mAP_0.5:0.95", seconds)


def _peers(args: argparse.Namespace, cfg: str, seed: int, project: Path) -> Outcome:
    script = project.with_suffix(".py")
    script.write_text(PEER, encoding="utf-8")
    project.mkdir()
    words = [cfg, _absolute_data(args.data, project), args.epochs, args.imgsz, args.batch_size, seed, args.workers, project]
    seconds = _timed([args.peer_python, str(script), *map(str, words)], cwd=project)
    return _read(project / "peer" / "results.csv", "metrics/mAP50(B)", "metrics/mAP50-95(B)", seconds)


def _timed(command: list[str], *, cwd: Path) -> float:
    start = time.perf_counter()
    run = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{' '.join(command)}\n{run.stderr[-2000:]}")
    return time.perf_counter() - start


def _read(path: Path, map50: str, map50_95: str, seconds: float) -> Outcome:
    """Reads the figures of the best epoch, selected like best.pt: 0.1 mAP50 + 0.9 mAP50-95."""
    with path.open(encoding="utf-8") as file:
        rows = [{k.strip(): v for k, v in row.items() if k} for row in csv.DictReader(file)]
    scored = [(float(r[map50]), float(r[map50_95])) for r in rows]
    best = max(scored, key=lambda s: 0.1 * s[0] + 0.9 * s[1])
    return Outcome(*best, seconds, len(rows))


def _absolute_data(data: Path, folder: Path) -> Path:
    """Writes a copy of the dataset YAML with an absolute path; the peer resolves relative ones against another folder."""
    import yaml

    content = yaml.safe_load(data.read_text(encoding="utf-8"))
    content["path"] = str((data.parent / content.get("path", ".")).resolve())
    copy = folder / data.name
    copy.write_text(yaml.safe_dump(content), encoding="utf-8")
    return copy


if __name__ == "__main__":
    main()
