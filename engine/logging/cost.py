"""What a training costs: the seconds of every epoch and the peak of memory, in ``cost.json`` of the run folder."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from engine.logging.callbacks import Callback, RunInfo
from utils.files import atomic_write
from utils.memory import peak_bytes

COST_FILE = "cost.json"
MIB = 2**20


class CostLogger(Callback):
    """Writes cost.json after every epoch: ``epoch_seconds``, validation and saving included, ``peak_memory_mib`` and ``device``.

    The peak is what torch allocated on the GPU, or on a CPU the whole process.

    A resumed run keeps the epochs that were done before; the part of an epoch before an interruption is not counted.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peak_mib = 0.0
        self.started = 0.0

    def on_train_start(self, run: RunInfo) -> None:
        self.started = time.perf_counter()
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):  # of a run without this file, or a damaged one
            before = json.loads((run.save_dir / COST_FILE).read_text(encoding="utf-8")) if run.start_epoch else {}
            self.seconds = [float(value) for value in before.get("epoch_seconds", ())][: run.start_epoch]
            self.peak_mib = float(before.get("peak_memory_mib") or 0.0)

    def on_epoch_end(self, run: RunInfo, row: Mapping[str, float]) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.started)
        self.started = now
        self._write(run.save_dir / COST_FILE)

    def _write(self, path: Path) -> None:
        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        peak = torch.cuda.max_memory_allocated() if on_gpu else peak_bytes() or 0
        self.peak_mib = max(self.peak_mib, peak / MIB)
        name = torch.cuda.get_device_name() if on_gpu else "cpu"
        content = {"epoch_seconds": [round(s, 3) for s in self.seconds], "peak_memory_mib": round(self.peak_mib, 1) or None, "device": name}
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(content), encoding="utf-8")
