"""Whole trainings from scratch with several seeds, beside the same network in another package with the same hyper-parameters.

    python benchmarks/bench_training.py --data path/to/bccd.yaml --hyp benchmarks/hyp.bccd.yaml --imgsz 320 --epochs 20 --out runs/bench \\
        --cfg yolo11n.yaml --peer-python PATH --peer-cfg yolo11n.yaml --seeds 0 1 2

Each side runs in a process of its own, with the same number of threads. The weights of both sides (best.pt by the side's own choice, and
last.pt) are scored by this project's val.py, since packages score differently. Seconds are processor seconds of the whole run, workers and
start included, over its epochs: other programs on the machine change them little.

Finished runs are kept in ``--out`` and not repeated, a run that another process trains is left to it (the same command, started once a
core under ``taskset``, shares the work), and one that was interrupted starts again, so that its seconds are those of a whole run. The
peer is a Python interpreter with ``ultralytics``; without it only this project trains.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from utils.errors import UserError  # noqa: E402
from utils.files import atomic_write  # noqa: E402
from utils.run_folders import LOCK_FILE, RunLock  # noqa: E402

OUTCOME = "outcome.json"  # of a finished run
PEER = """
import json, sys
import torch
from ultralytics import YOLO
cfg, threads, settings = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
model = YOLO(cfg)
model.add_callback("on_train_start", lambda trainer: torch.set_num_threads(threads))  # after it has chosen its own
model.train(device="cpu", pretrained=False, plots=False, verbose=False, **settings)
"""
# settings that have one name on both sides
SHARED = [
    "lr0", "lrf", "momentum", "weight_decay", "warmup_epochs", "warmup_momentum", "warmup_bias_lr", "nbs", "box", "cls", "dfl", "pose",
    "kobj", "hsv_h", "hsv_s", "hsv_v", "degrees", "translate", "scale", "shear", "perspective", "flipud", "fliplr", "mosaic", "mixup",
    "copy_paste", "close_mosaic", "mask_ratio", "auto_augment", "erasing",
]  # fmt: skip
TITLES = {
    "metrics/mAP_0.5": "mAP@0.5", "metrics/mAP_0.5:0.95": "mAP@0.5:0.95",
    "metrics/mAP_0.5(B)": "box mAP@0.5", "metrics/mAP_0.5:0.95(B)": "box mAP@0.5:0.95",
    "metrics/mAP_0.5(M)": "mask mAP@0.5", "metrics/mAP_0.5:0.95(M)": "mask mAP@0.5:0.95",
    "metrics/mAP_0.5(P)": "pose mAP@0.5", "metrics/mAP_0.5:0.95(P)": "pose mAP@0.5:0.95",
    "metrics/accuracy_top1": "top-1",
}  # fmt: skip


class Job(NamedTuple):
    """One training."""

    side: str
    cfg: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.side}-{Path(self.cfg).stem}-{self.seed}"


def main() -> None:
    """Runs what is not there yet and prints the table."""
    args = _arguments()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    peers = args.peer_cfg if args.peer_python else []
    jobs = [Job(side, cfg, seed) for seed in args.seeds for side, cfgs in (("ours", args.cfg), ("peer", peers)) for cfg in cfgs]
    # two processes begin at different sides, so that a drift of the machine's speed affects both
    for job in sorted(jobs, key=lambda job: (job.seed, job.side != args.first)):
        folder = args.out / job.name
        folder.mkdir(exist_ok=True)
        with RunLock() as lock:
            try:
                lock.take(folder)
            except UserError:  # another process trains it
                continue
            if not (folder / OUTCOME).exists():
                _clear(folder)
                outcome = _train(args, job, folder)
                with atomic_write(folder / OUTCOME) as partial:
                    partial.write_text(json.dumps(outcome, indent=1), encoding="utf-8")
                print(f"{job.name}: {outcome}", flush=True)
    _report(args.out, jobs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="data YAML, or the folder of a set of class folders")
    parser.add_argument("--hyp", required=True, type=Path, help="hyper-parameters of both sides")
    parser.add_argument("--out", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--cfg", nargs="*", default=[])
    parser.add_argument("--peer-python", help="a Python with ultralytics")
    parser.add_argument("--peer-cfg", nargs="*", default=[])
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--optimizer", default="SGD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--first", choices=("ours", "peer"), default="ours", help="the side that begins")
    return parser.parse_args()


def _train(args: argparse.Namespace, job: Job, folder: Path) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "YOLO_OFFLINE": "1"}
    before, start = _children(), time.perf_counter()
    _run((_ours if job.side == "ours" else _peers)(args, job, folder), folder, environment)
    processor, wall = _children() - before, time.perf_counter() - start
    scores = {}
    for kind in ("best", "last"):
        flags = {
            "weights": folder / "run" / "weights" / f"{kind}.pt", "data": args.data.resolve(), "imgsz": args.imgsz,
            "batch-size": args.batch_size, "workers": 0, "project": folder, "name": kind,
        }  # fmt: skip
        _run([sys.executable, str(ROOT / "val.py"), *_words(flags)], folder, environment)
        metrics = json.loads((folder / kind / "metrics.json").read_text(encoding="utf-8"))["metrics"]
        scores[kind] = {title: metrics[key] for key, title in TITLES.items() if key in metrics}
    return {"scores": scores, "processor": processor / args.epochs, "wall": wall / args.epochs}


def _ours(args: argparse.Namespace, job: Job, folder: Path) -> list[str]:
    hyp = folder / "hyp.yaml"
    hyp.write_text(_yaml_text(_yaml(args.hyp) | {"warmup_min_iters": 0}), encoding="utf-8")  # the peer has no least warm-up
    flags = {
        "cfg": job.cfg, "data": args.data.resolve(), "hyp": hyp, "imgsz": args.imgsz, "epochs": args.epochs, "batch-size": args.batch_size,
        "workers": args.workers, "seed": job.seed, "project": folder, "name": "run", "device": "cpu", "optimizer": args.optimizer,
    }  # fmt: skip
    return [sys.executable, str(ROOT / "train.py"), "--noplots", *_words(flags)]


def _peers(args: argparse.Namespace, job: Job, folder: Path) -> list[str]:
    script = folder / "peer.py"
    script.write_text(PEER, encoding="utf-8")
    hyp = _yaml(args.hyp)
    settings = {key: hyp[key] for key in SHARED if key in hyp} | {
        "data": str(_absolute_data(args.data, folder)), "imgsz": args.imgsz, "epochs": args.epochs, "batch": args.batch_size,
        "workers": args.workers, "seed": job.seed, "project": str(folder), "name": "run", "optimizer": args.optimizer,
    }  # fmt: skip
    return [args.peer_python, str(script), job.cfg, str(args.threads), json.dumps(settings)]


def _clear(folder: Path) -> None:
    """Removes what an interrupted run has left."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK_FILE:
            entry.unlink()


def _words(flags: dict[str, Any]) -> list[str]:
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    if run.returncode:
        sys.exit(f"{' '.join(command)}\n{run.stderr[-2000:]}")


def _children() -> float:
    """Processor seconds of the ended child processes, theirs included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _report(out: Path, jobs: list[Job]) -> None:
    kinds = list(dict.fromkeys((job.side, job.cfg) for job in jobs))
    for side, cfg in kinds:
        files = [out / job.name / OUTCOME for job in jobs if (job.side, job.cfg) == (side, cfg)]
        outcomes = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
        if not outcomes:
            continue
        seconds = ", ".join(f"{statistics.median(o[key] for o in outcomes):.1f} s {key}" for key in ("processor", "wall"))
        print(f"\n{side} {cfg}: {len(outcomes)} seeds, an epoch {seconds}")
        for kind, scores in outcomes[0]["scores"].items():
            for title in scores:
                values = [o["scores"][kind][title] for o in outcomes]
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                print(f"  {kind} {title:<20} {statistics.mean(values):.3f}{spread}  ({', '.join(f'{v:.3f}' for v in values)})")


def _absolute_data(data: Path, folder: Path) -> Path:
    """Writes a copy of the dataset YAML with an absolute path; the peer resolves relative ones against another folder."""
    if data.is_dir():
        return data.resolve()
    content = _yaml(data)
    content["path"] = str((data.parent / content.get("path", ".")).resolve())
    copy = folder / data.name
    copy.write_text(_yaml_text(content), encoding="utf-8")
    return copy


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _yaml_text(content: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(content, sort_keys=False)


if __name__ == "__main__":
    main()
