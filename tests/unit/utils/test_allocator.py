"""The allocator keeps freed memory where it can be told to, and what the environment sets wins."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from utils.cli.allocator import tune_allocator

FAULTS = """
import resource, sys
sys.path.insert(0, {root!r})
from utils.cli.allocator import tune_allocator
import torch
torch.set_num_threads(1)
kept = tune_allocator()
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
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "0"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    kept, faults = map(int, run.stdout.split())
    if not kept:
        pytest.skip("another allocator, or set from outside")
    assert faults < 10 * 8 * (4 << 20) / resource.getpagesize() / 10  # a tenth of the pages that are written


LARGE = """
import os, resource, sys
sys.path.insert(0, {root!r})
import torch
from utils.cli.allocator import tune_allocator
torch.set_num_threads(1)
tune_allocator()
torch.ones(16 << 20)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="a system without huge pages on request")
def test_large_tensors_come_in_huge_pages(request: pytest.FixtureRequest) -> None:
    program = LARGE.format(root=str(request.config.rootpath))
    faults = {}
    for chosen in ("0", "1"):
        environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": chosen}
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
        faults[chosen] = int(run.stdout)
    environment.pop("THP_MEM_ALLOC_ENABLE")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    if faults["1"] > faults["0"] / 2:
        pytest.skip("the kernel had no huge pages left")
    assert int(run.stdout) < faults["0"] / 2  # asked for without being told


def test_a_setting_of_huge_pages_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    tune_allocator()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_the_environment_wins(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    assert not tune_allocator()


def test_other_systems_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert not tune_allocator()
