"""The allocator keeps freed memory where it can be told to, and what the environment sets wins."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from utils.cli.allocator import keep_freed_memory

FAULTS = """
import resource, sys
sys.path.insert(0, {root!r})
from utils.cli.allocator import keep_freed_memory
import torch
torch.set_num_threads(1)
kept = keep_freed_memory()
def use():
    return [torch.ones(1 << 20) for _ in range(8)]  # 4 MiB each
for _ in range(3):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_freed_blocks_are_used_again_without_new_pages(request: pytest.FixtureRequest) -> None:
    program = FAULTS.format(root=str(request.config.rootpath))
    kept, faults = map(int, subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split())
    if not kept:
        pytest.skip("another allocator, or set from outside")
    assert faults < 10 * 8 * (4 << 20) / resource.getpagesize() / 10  # a tenth of the pages that are written


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_the_environment_wins(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    assert not keep_freed_memory()


def test_other_systems_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert not keep_freed_memory()
