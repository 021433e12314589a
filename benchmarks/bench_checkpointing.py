"""Memory and time of one training step with ``--checkpoint-activations off``, ``attention`` and ``all``.

    python benchmarks/bench_checkpointing.py                    # four networks, 320 px, batch 4, CPU

Every figure is measured in a separate process (`bench_train_step.py`): memory is the peak beyond the memory before the first step, with an
allocator that returns freed tensors immediately; time is the least processor time of several steps, from another process with the default
allocator.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

STEP = Path(__file__).with_name("bench_train_step.py")
NETWORKS = ("yolov8n-BRA.yaml", "yolov8n-NLBlockND.yaml", "yolov8-FocalNet-T-srf.yaml", "yolov8-BiFormer-T.yaml")
SCOPES = ("off", "attention", "all")
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def main() -> None:
    """Prints the table row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", nargs="+", default=list(NETWORKS))
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    print("| network | recomputed | MiB per step | ratio to off | s per step | ratio to off |\n|---|---|---|---|---|---|", flush=True)
    for cfg in args.cfg:
        plain: tuple[float, float] | None = None
        for scope in SCOPES:
            memory = _measure(args, cfg, scope, steps=1, environment=EXACT)["step_mib"]
            seconds = _measure(args, cfg, scope, steps=args.steps, environment={})["processor_seconds"]
            plain = plain or (memory, seconds)
            shares = f"{memory / plain[0]:.2f}", f"{seconds / plain[1]:.2f}"
            print(f"| {Path(cfg).stem} | {scope} | {memory:.0f} | {shares[0]} | {seconds:.2f} | {shares[1]} |", flush=True)


def _measure(args: argparse.Namespace, cfg: str, scope: str, *, steps: int, environment: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, str(STEP), "--side", "ours", "--cfg", cfg, "--checkpoint-activations", scope, "--threads", "1"]
    command += ["--steps", str(steps), "--imgsz", str(args.imgsz), "--batch-size", str(args.batch_size)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        sys.exit(f"{cfg}, {scope}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
