"""What the steps of the GPU check share: their sizes, the time they have, and where their rows go."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

BOXES_PER_IMAGE = 20
CLASSES = 80


@dataclass(frozen=True)
class Sizes:
    """How much each step does; the defaults are for one H100 or H200 with 16 CPU cores."""

    imgsz: int = 640
    device: str = "cuda"
    train_cfg: str = "yolov9-c-FocalModulation.yaml"
    train_batch: int = 16
    train_iterations: int = 200
    fp32_iterations: int = 60  # of the same schedule
    compared: int = 20  # first iterations whose losses are compared
    workers: int = 16
    step_batch: int = 32
    # (ours, the peer's of the same structure or nothing)
    networks: tuple[tuple[str, str], ...] = (
        ("yolov8n.yaml", "yolov8n.yaml"),
        ("yolov9-c-FocalModulation.yaml", ""),
        ("gelan-c.yaml", "yolov9c.yaml"),
        ("yolov8s.yaml", "yolov8s.yaml"),
        ("yolov8n-BRA.yaml", ""),
        ("yolov9-c.yaml", ""),
    )
    compiled: tuple[str, ...] = (  # those of ``networks``, cheap ones first: time may end before the last
        "yolov8n.yaml",
        "yolov8s.yaml",
        "yolov8n-BRA.yaml",
        "gelan-c.yaml",
        "yolov9-c-FocalModulation.yaml",
        "yolov9-c.yaml",
    )
    rounds: int = 5  # blocks of each side, in turn
    block: int = 8  # iterations of a block
    warm_up: int = 5
    waits: tuple[str, ...] = ("yolov8n.yaml", "yolov9-c-FocalModulation.yaml")
    latency: tuple[tuple[str, str], ...] = (
        ("yolov8n.yaml", "yolov8n.yaml"),
        ("yolov9-c.yaml", "yolov9c.yaml"),
        ("yolov9-c-FocalModulation.yaml", ""),
        ("yolov8n-BRA.yaml", ""),
    )
    latency_batches: tuple[int, ...] = (1, 32)
    latency_calls: int = 15  # of a block
    attention: tuple[str, ...] = (
        "FocalModulation",
        "BiLevelRoutingAttention",
        "nchwBRA",
        "CloAttention",
        "NLBlockND-gaussian",
        "NLBlockND-embedded",
        "NLBlockND-dot",
        "NLBlockND-concatenate",
        "MHSA",
    )
    attention_shapes: tuple[str, ...] = ("8x256x40x40", "1x256x80x80")
    attention_repeats: int = 10
    attention_limit_gb: float = 8.0
    resume_cfg: str = "yolov9-t-FocalModulation.yaml"
    resume_imgsz: int = 320
    loader_cfg: str = "yolov8n.yaml"
    loader_batch: int = 32
    loader_epochs: int = 4
    loader_images: int = 960  # images are repeated up to about this number
    tests: tuple[str, ...] = ("tests/contract", "tests/unit/models/test_export_files.py", "tests/unit/data/test_finish_on_device.py")


TINY = Sizes(
    imgsz=64,
    device="cpu",
    train_cfg="yolov8n.yaml",
    train_batch=6,
    train_iterations=2,
    fp32_iterations=2,
    compared=2,
    workers=0,
    step_batch=2,
    networks=(("yolov8n.yaml", "yolov8n.yaml"),),
    compiled=(),
    rounds=1,
    block=2,
    warm_up=1,
    waits=("yolov8n.yaml",),
    latency=(("yolov8n.yaml", "yolov8n.yaml"),),
    latency_batches=(1,),
    latency_calls=2,
    attention=("FocalModulation", "nchwBRA"),
    attention_shapes=("1x16x16x16",),
    attention_repeats=1,
    resume_cfg="yolov8n.yaml",
    resume_imgsz=64,
    loader_cfg="yolov8n.yaml",
    loader_batch=6,
    loader_epochs=2,
    loader_images=12,
    tests=("tests/unit/models/test_export_files.py",),
)


class Skip(Exception):
    """A step or a part of one that cannot run here; the message says why."""


@dataclass
class Check:
    """What a step is given.

    Args:
        work: a folder for runs and other files that nobody needs afterwards.
        rows_file: where this step's rows are appended, one JSON object a line.
        deadline: ``time.monotonic()`` at which the step is ended.
    """

    step: str
    sizes: Sizes
    data: str
    work: Path
    rows_file: Path
    deadline: float
    earlier: list[dict[str, Any]] = field(default_factory=list)  # rows of the steps before

    @property
    def device(self) -> torch.device:
        return torch.device(self.sizes.device)

    @property
    def precision(self) -> torch.dtype | None:
        """float16 on a GPU; a CPU has no fast kernels for it."""
        return torch.float16 if self.device.type == "cuda" else None

    def left(self) -> float:
        """Seconds until this step is ended."""
        return self.deadline - time.monotonic()

    def row(self, name: str, *, status: str = "ok", reason: str = "", **values: Any) -> None:
        """Writes a row at once, so that it stays whatever happens to the step."""
        row = {"step": self.step, "name": name, "status": status, "reason": reason, **values}
        with open(self.rows_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        shown = {k: v for k, v in values.items() if not isinstance(v, (list, dict))}
        print(f"{self.step}: {name}: {status} {reason} {shown}", flush=True)

    def part(self, name: str, run: Callable[[], None], *, needs_s: float = 3.0) -> None:
        """Runs a part of a step: what goes wrong in it is a row of its own, and the next part runs."""
        if self.left() < needs_s:
            self.row(name, status="skipped", reason="no time left")
            return
        try:
            run()
        except Skip as reason:
            self.row(name, status="skipped", reason=str(reason))
        except Exception as error:  # whatever it is, it is a finding
            traceback.print_exc()
            self.row(name, status="failed", reason=brief(error))
        free(self.device)


def brief(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, Skip):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def synchronize(device: torch.device) -> None:
    """Waits until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def free(device: torch.device) -> None:
    """Gives memory back and begins to count its peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def allocated_mib(device: torch.device) -> float:
    """MiB that tensors occupy on a GPU; 0 elsewhere."""
    return torch.cuda.memory_allocated() / 2**20 if device.type == "cuda" else 0.0


def peak_mib(device: torch.device) -> float:
    """The most MiB that tensors occupied on a GPU since the last reset; 0 elsewhere."""
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0.0
