"""The allocator keeps freed memory where it can be told to, and what the environment sets wins."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from utils.cli.allocator import keep_freed_memory


def printed(program: str, request: pytest.FixtureRequest, **values: int) -> list[str]:
    """The words that a program prints in a process of its own."""
    program = program.format(root=str(request.config.rootpath), **values)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()


FAULTS = """
import resource, sys
sys.path.insert(0, {root!r})
from utils.cli.allocator import keep_freed_memory
import torch
torch.set_num_threads(1)
kept = keep_freed_memory()
def use():
    return [torch.ones({mib} << 18) for _ in range(8)]
for _ in range(3):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
@pytest.mark.parametrize("mib", [4, 48])  # of a small network's maps for one image, and for a batch
def test_freed_blocks_are_used_again_without_new_pages(request: pytest.FixtureRequest, mib: int) -> None:
    kept, faults = map(int, printed(FAULTS, request, mib=mib))
    if not kept:
        pytest.skip("another allocator, or set from outside")
    assert faults < 10 * 8 * (mib << 20) / resource.getpagesize() / 10  # a tenth of the pages that are written


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_the_environment_wins(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    assert not keep_freed_memory()


def test_other_systems_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert not keep_freed_memory()


THREADS = """
import sys, threading
sys.path.insert(0, {root!r})
from utils.cli.allocator import keep_freed_memory
import torch
keep_freed_memory()
sums = []
def use():
    for _ in range(3):
        sums.append(float(torch.ones(40 << 20).sum()))  # 160 MiB, more than the heap of a thread holds
threads = [threading.Thread(target=use) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(sums), set(sums) == {{float(40 << 20)}})
"""


def test_threads_allocate_large_blocks_too(request: pytest.FixtureRequest) -> None:
    assert printed(THREADS, request) == ["12", "True"]


PEAKS = """
import sys
sys.path.insert(0, {root!r})
import torch
from engine.training.batch_size import PeakMeter
from utils.cli.allocator import keep_freed_memory
from utils.memory import release_memory
torch.set_num_threads(1)
print(int(keep_freed_memory()))
meter = PeakMeter(torch.device("cpu"))
for mib in (100, 200, 50):
    meter.begin()
    torch.ones(mib << 18)
    print(meter.peak_bytes() >> 20)
    release_memory(torch.device("cpu"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_released_memory_goes_back_so_that_peaks_can_be_compared(request: pytest.FixtureRequest) -> None:
    """--batch-size -1 measures one number of images after the other."""
    kept, *peaks = map(int, printed(PEAKS, request))
    if not kept:
        pytest.skip("another allocator, or set from outside")
    assert peaks == [pytest.approx(mib, abs=20) for mib in (100, 200, 50)]


FORKED = """
import os, sys
sys.path.insert(0, {root!r})
import torch
from data.workers import start_worker
from utils.cli.allocator import keep_freed_memory
torch.set_num_threads(1)
print(int(keep_freed_memory()), flush=True)
if os.fork() == 0:
    start_worker(0)
    torch.ones(64 << 18)  # 64 MiB
    status = open("/proc/self/status").read()
    print(*(int(line.split()[1]) >> 10 for line in status.splitlines() if line.startswith(("VmHWM", "VmRSS"))), flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_a_forked_loader_worker_gives_large_blocks_back(request: pytest.FixtureRequest) -> None:
    kept, peak, now = map(int, printed(FORKED, request))
    if not kept:
        pytest.skip("another allocator, or set from outside")
    assert now < peak - 50
