"""Access to the golden vectors: those in tests/goldens, and those of the reference folder if it exists beside the project."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.pending import PENDING

HERE = Path(__file__).parent / "goldens"
REFERENCE = Path(os.environ.get("YOLO_REFERENCE", Path(__file__).parents[2] / "shared" / "reference"))
KEPT_SUFFIXES = ("anchors", "anchor_grid", "stride", "strides")
FLOW_CONSTANTS = ("loc", "cov", "mask")  # of RealNVP, alone or in a head


class Golden(NamedTuple):
    """One case: its metadata and its arrays."""

    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def tensor(self, name: str) -> Tensor:
        return torch.from_numpy(self.arrays[name])


def folders(folder: str) -> list[Path]:
    return [p / folder for p in (HERE, REFERENCE) if (p / folder).is_dir()]


def all_names(folder: str, prefix: str = "") -> list[str]:
    """Sorted names of all available cases of a folder, in tests/goldens and in the reference folder."""
    return sorted({p.stem for f in folders(folder) for p in f.glob(f"{prefix}*.npz")})


def waits_for(folder: str, name: str, part: str = "") -> str | None:
    """The reason in tests/pending.py why a vector, or one part of it, is pending; None if it is not."""
    for row, reason in PENDING.items():
        start, _, wanted = row.partition(":")
        if fnmatchcase(f"{folder}/{name}", f"{start}*") and (not part or not wanted or wanted == part):
            return reason
    return None


def cases(folder: str, names: Iterable[str], part: str = "values", slow: Iterable[str] = ()) -> list:
    """The names as parameters of one test; pending ones are marked as strict expected failures."""
    slow = set(slow)

    def case(name: str) -> Any:
        reason = waits_for(folder, name, part)
        marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
        return pytest.param(name, marks=[*marks, *([pytest.mark.slow] if name in slow else [])])

    return [case(name) for name in names]


def find(folder: str, name: str) -> Golden:
    """The case ``folder/name.npz``; raises FileNotFoundError if it is in neither folder."""
    for base in folders(folder):
        path = base / f"{name}.npz"
        if path.is_file():
            with np.load(path) as z:
                arrays = {k: z[k] for k in z.files if k != "meta"}
                return Golden(json.loads(str(z["meta"])), arrays)
    raise FileNotFoundError(f"no golden vector {folder}/{name}")


def fill_value(key: str, shape: tuple[int, ...], g: float) -> np.ndarray:
    v = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if len(shape) >= 2:
        v = g * v / math.sqrt(np.prod(shape[1:]))
    elif key.endswith("running_var"):
        v = 1 + 0.1 * np.abs(v)
    elif key.endswith("weight"):
        v = 1 + 0.1 * v
    else:
        v = 0.1 * v
    return np.asarray(v, dtype=np.float32)


def is_kept(key: str) -> bool:
    """Whether the fill rule leaves an entry unchanged: the fixed projection of the box distribution, a flow's constants, anchors
    and strides."""
    parts = key.split(".")
    if parts[-1] in FLOW_CONSTANTS and parts[-2:-1] in ([], ["flow_model"]):
        return True
    projection = len(parts) >= 3 and parts[-3].startswith("dfl") and parts[-2:] == ["conv", "weight"]
    return projection or key.endswith(KEPT_SUFFIXES)


@torch.no_grad()
def fill_(module: nn.Module, g: float = 1.0) -> nn.Module:
    """Fills every float entry of the state dict with values seeded by its name, in place."""
    for key, value in module.state_dict().items():
        if value.is_floating_point() and not is_kept(key):
            value.copy_(torch.from_numpy(fill_value(key, tuple(value.shape), g)))
    return module


def input_array(i: int, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.random.RandomState(1000 + i).standard_normal(tuple(shape)).astype(np.float32))


def image_array(i: int, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.random.RandomState(1000 + i).random_sample(tuple(shape)).astype(np.float32))


def cotangent(j: int, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(np.random.RandomState(2000 + j).standard_normal(tuple(shape)).astype(np.float32))


def relative_error(a: Tensor | np.ndarray, b: Tensor | np.ndarray) -> float:
    a, b = (x.detach().double() if isinstance(x, Tensor) else torch.from_numpy(np.asarray(x)).double() for x in (a, b))
    assert a.shape == b.shape, f"shape {tuple(a.shape)} is not {tuple(b.shape)}"
    if not a.numel():
        return 0.0
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


def assert_close(a: Tensor | np.ndarray, b: Tensor | np.ndarray, tol: float = 1e-4, what: str = "") -> None:
    """max|a - b| / max|b| < tol, NaN never passes."""
    error = relative_error(a, b)
    assert error < tol, f"{what} differs from the reference by {error:.2e} of its maximum, more than {tol:.0e}"
