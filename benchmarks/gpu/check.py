"""The GPU check: trainings in three precisions, speed, synchronisations, latency, attention, resume and the GPU tests, in one table.

    python benchmarks/gpu/check.py --data path/to/bccd.yaml --out runs/gpu-check
    python benchmarks/gpu/check.py --tiny --out runs/gpu-check        # everything at a tiny size, on a CPU

The data set, and a wheel of ``ultralytics`` to install for the comparisons, have to travel to the machine first: nothing is downloaded.
Steps run in order of importance, each in a separate process with a time limit; a failure is a row of the table, and the next step runs.
``results.json`` is written after every step, ``check.log`` has the output of all steps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.gpu import networks, trainings  # noqa: E402
from benchmarks.gpu.common import TINY, Check, Sizes, Skip, brief  # noqa: E402
from data.dataset_spec import load_dataset_spec  # noqa: E402
from utils.errors import UserError  # noqa: E402

LEAST_S = 8.0  # left, for a step to be begun
HIDDEN = {"step", "name", "status", "reason"}  # columns that every row has


class Step(NamedTuple):
    """A step and its time limit in seconds."""

    run: Callable[[Check], None]
    most_s: float
    reads_data: bool = False


STEPS: dict[str, Step] = {
    "train-fp32": Step(trainings.precision, 75, reads_data=True),
    "train-fp16": Step(trainings.precision, 90, reads_data=True),
    "train-bf16": Step(trainings.precision, 90, reads_data=True),
    "gpu-tests": Step(trainings.tests, 150),
    "throughput": Step(networks.throughput, 120),
    "waits": Step(networks.waits, 40),
    "latency": Step(networks.latency, 50),
    "attention": Step(networks.attention, 50),
    "resume": Step(trainings.resume, 60, reads_data=True),
    "loader": Step(trainings.loader, 50, reads_data=True),
    "compile": Step(networks.compiled, 150),
}


def main() -> int:
    """Runs the steps and prints the table; returns 0 also where they fail, which rows of the table say, and 2 without the data set."""
    args = parse()
    try:
        if any(STEPS[name].reads_data for name in args.only or STEPS):
            load_dataset_spec(args.data)
    except UserError as error:
        print(f"check.py: --data {args.data}: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the step that runs is ended too
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + args.seconds
    sizes = TINY if args.tiny else Sizes()
    if args.cfg:
        sizes = replace(sizes, train_cfg=args.cfg, resume_cfg=args.cfg, loader_cfg=args.cfg)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
        os.environ.setdefault("YOLO_CONFIG_DIR", folder)  # where the peer would write its settings
        for name in args.only or STEPS:
            started = time.monotonic()
            left = ends - started
            if left < LEAST_S:
                rows.append({"step": name, "name": "-", "status": "skipped", "reason": "no time left"})
            else:
                most = min(STEPS[name].most_s, left - 3)
                check = Check(name, sizes, args.data, Path(folder), Path(folder) / f"{name}.jsonl", started + most, rows)
                rows += run_step(check, out / "check.log")
            seconds = time.monotonic() - started
            for row in rows:
                if row["step"] == name:
                    row.setdefault("step_s", round(seconds, 1))
            write(out / "results.json", rows, args)
            verdicts = [row["status"] for row in rows if row["step"] == name]
            counted = ", ".join(f"{verdicts.count(word)} {word}" for word in ("ok", "failed", "skipped") if word in verdicts)
            print(f"{name:<12} {seconds:6.1f} s  {counted}  ({ends - time.monotonic():.0f} s left)", flush=True)
    named = " ".join(f"{key} {value}" for key, value in machine().items())
    table = "\n".join([named, *tables(rows)])
    (out / "table.txt").write_text(table + "\n", encoding="utf-8")
    print("\n" + table, flush=True)
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="shapes.yaml", help="dataset YAML (default: the embedded data set)")
    parser.add_argument("--out", default="runs/gpu-check", help="folder of results.json, table.txt and check.log")
    parser.add_argument("--seconds", type=float, default=480.0, help="time for everything")
    parser.add_argument("--only", nargs="+", choices=list(STEPS), metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--cfg", help="model YAML of all trainings instead of the steps' own")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU: a test of this script")
    return parser.parse_args()


def run_step(check: Check, log: Path) -> list[dict[str, Any]]:
    """Runs a step in a separate process group and reads its rows; at its time limit the whole group is killed."""
    process = multiprocessing.get_context("fork").Process(target=in_child, args=(check, log))  # this process never touches the GPU
    process.start()
    assert process.pid
    try:
        process.join(max(1.0, check.left()))
        late = process.is_alive()
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # also what a finished step has left running
    process.join(10)
    lines = check.rows_file.read_text(encoding="utf-8").splitlines() if check.rows_file.exists() else []
    rows = [json.loads(line) for line in lines]
    if late or process.exitcode != 0:
        reason = "time is up" if late else f"its process ended with status {process.exitcode}"
        rows.append({"step": check.step, "name": "-", "status": "failed", "reason": reason})
    if not rows:
        rows.append({"step": check.step, "name": "-", "status": "skipped", "reason": "nothing to do"})
    return rows


def in_child(check: Check, log: Path) -> None:
    """Runs the step; its output goes into the log."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with open(log, "a", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    print(f"\n=== {check.step}", flush=True)
    try:
        if check.device.type == "cuda" and not torch.cuda.is_available():
            raise Skip("no CUDA device; --tiny runs on a CPU")
        STEPS[check.step].run(check)
    except Skip as reason:
        check.row("-", status="skipped", reason=str(reason))
    except BaseException as error:
        traceback.print_exc()
        check.row("-", status="failed", reason=brief(error))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no handlers of the parent, no wait for loader processes


def write(path: Path, rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Writes all rows so far, and the machine they were measured on, atomically."""
    text = json.dumps({"machine": machine(), "tiny": args.tiny, "data": Path(args.data).name, "rows": rows}, indent=1)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


@lru_cache(maxsize=1)
def machine() -> dict[str, Any]:
    """Describes the machine."""
    known = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda, "cores": os.cpu_count()}
    return known | gpu_name()


def gpu_name() -> dict[str, str]:
    """The driver's name of the GPU; without torch, because initialising CUDA here would keep forked processes from using the GPU."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"gpu": "; ".join(said.strip().splitlines())}


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """One table per step, with the columns of its rows; lists and mappings below it."""
    lines = []
    for step in dict.fromkeys(row["step"] for row in rows):
        own = [row for row in rows if row["step"] == step]
        columns = list(dict.fromkeys(k for row in own for k, v in row.items() if k not in HIDDEN | {"step_s"} and is_plain(v)))
        cells = [["name", "status", *columns, "reason"]]
        cells += [[row["name"], row["status"], *(shown(row.get(c)) for c in columns), row["reason"]] for row in own]
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        lines += ["", f"## {step} ({own[0].get('step_s', 0)} s)"]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
        for row in own:
            details = {k: v for k, v in row.items() if k not in HIDDEN and k != "curve" and v and not is_plain(v)}
            for key, value in details.items():
                items = [f"{k}: {v}" for k, v in value.items()] if isinstance(value, dict) else list(map(str, value))
                lines += [f"  {row['name']} {key}:", *(f"    {item}" for item in items)]
    return lines


def is_plain(value: Any) -> bool:
    """Whether a value fits into a cell of the table."""
    return not isinstance(value, (list, dict))


def shown(value: Any) -> str:
    """A value as text; nothing for None."""
    return "" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
