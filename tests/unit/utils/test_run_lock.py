"""A run folder belongs to one process; what a process that has ended leaves behind locks nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils import run_folders
from utils.errors import UserError
from utils.run_folders import LOCK_FILE, LockOwner, RunLock

ROOT = Path(__file__).parents[3]
HOLD = """
import sys
from pathlib import Path
from utils.run_folders import RunLock

with RunLock() as lock:
    lock.take(Path(sys.argv[1]))
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder until it is told to end."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def take(folder: Path, job: str = "") -> None:
    with RunLock() as lock:
        lock.take(folder, job=job)


def leave(folder: Path, **changes: object) -> None:
    """A lock file of this process, with changes, that nobody holds."""
    own = LockOwner.this_process("")
    (folder / LOCK_FILE).write_text(json.dumps({**vars(own), **changes}))


def test_second_process_is_refused_until_the_first_has_ended(holder, tmp_path):
    with pytest.raises(UserError, match=rf"process {holder.pid} on .* trains in it, or is finishing; wait until it has ended, or stop it$"):
        take(tmp_path)
    holder.communicate("end\n")
    take(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_killed_owner_leaves_a_stale_lock(holder, tmp_path):
    holder.kill()
    holder.wait()
    assert LockOwner.from_bytes((tmp_path / LOCK_FILE).read_bytes()).pid == holder.pid
    take(tmp_path)


def test_folder_is_taken_once_in_a_process(tmp_path):
    with RunLock() as lock:
        lock.take(tmp_path)
        lock.take(tmp_path)
        with pytest.raises(UserError, match=f"process {os.getpid()} on "):
            take(tmp_path)
    take(tmp_path)


@pytest.mark.parametrize("written", [False, True])
def test_new_folder_without_a_file_goes_with_its_lock(tmp_path, written):
    folder = tmp_path / "exp"
    with RunLock() as lock:
        (folder / "weights").mkdir(parents=True)
        lock.take(folder, is_new=True)
        if written:
            (folder / "results.csv").touch()
    assert folder.exists() == written


def test_folder_of_a_user_stays_though_it_is_empty(tmp_path):
    with RunLock() as lock:
        lock.take(tmp_path)
    assert tmp_path.exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="start times of processes")
def test_number_of_an_ended_process_that_is_used_again_locks_nothing(tmp_path):
    leave(tmp_path, started="1")
    take(tmp_path)
    leave(tmp_path)  # as if a copy of the folder had dropped the system's lock
    with pytest.raises(UserError, match="trains in it"):
        take(tmp_path)


def test_restarted_machine_has_no_owners_left(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folders, "BOOT_ID", tmp_path / "boot")
    (tmp_path / "boot").write_text("now")
    leave(tmp_path, boot="before")
    take(tmp_path)


def test_other_machine_says_how_to_remove_its_lock(tmp_path):
    leave(tmp_path, host="node7", boot="another", pid=12)
    with pytest.raises(UserError, match=rf"process 12 on node7 .* if it has ended, remove {tmp_path / LOCK_FILE}$"):
        take(tmp_path, job="slurm 5")
    assert (tmp_path / LOCK_FILE).exists()
    (tmp_path / LOCK_FILE).unlink()
    take(tmp_path)


def test_restarted_job_takes_what_it_left_on_another_machine(tmp_path):
    leave(tmp_path, host="node7", boot="another", job="slurm 5")
    take(tmp_path, job="slurm 5")


@pytest.mark.skipif(os.name == "nt", reason="numbers of processes")
def test_file_system_without_locks_is_served_by_the_number_of_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folders, "_lock", lambda descriptor: None)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for started in ("", "1"):
        leave(tmp_path, pid=ended.pid, started=started)
        take(tmp_path)
    leave(tmp_path, started="")
    with pytest.raises(UserError, match="if it has ended, remove"):
        take(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"pid": "x"}', b"\xff" * 9000])
def test_damaged_lock_file_locks_nothing(tmp_path, content):
    (tmp_path / LOCK_FILE).write_bytes(content)
    take(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="links")
def test_link_in_place_of_the_lock_is_not_written(tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / LOCK_FILE).symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot be written"):
        take(tmp_path)
    assert (tmp_path / "precious").read_text() == "kept"
