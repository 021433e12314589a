"""A worker that was killed is reported where the main process waits for a batch, and nowhere else."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from data.workers import WorkerDeaths

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


@pytest.fixture
def deaths(monkeypatch):
    """In place of a handler that reports every signal, as torch's does where a worker was killed."""
    monkeypatch.setattr("data.workers.CONNECTION_LOST_S", 0.05)

    def report(number, frame):
        raise RuntimeError("DataLoader worker (pid 1) is killed")

    before = signal.signal(signal.SIGCHLD, report)
    deaths = WorkerDeaths()
    deaths.delay()
    yield deaths
    signal.signal(signal.SIGCHLD, before)


def test_a_death_outside_waits_for_the_next_batch(deaths):
    signal.raise_signal(signal.SIGCHLD)
    with pytest.raises(RuntimeError, match="pid 1"), deaths.reported():
        pytest.fail("a batch was taken from a loader that lost a worker")
    with deaths.reported():  # once is enough
        pass


def test_a_death_while_waiting_is_reported_at_once(deaths):
    with deaths.reported():
        pass
    with pytest.raises(RuntimeError, match="pid 1"), deaths.reported():
        signal.raise_signal(signal.SIGCHLD)
    signal.raise_signal(signal.SIGCHLD)  # the wait has ended


def test_a_lost_connection_gives_way_to_the_death_that_follows(deaths, monkeypatch):
    monkeypatch.setattr("data.workers.CONNECTION_LOST_S", 60.0)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGCHLD)).start()
    with pytest.raises(RuntimeError, match="pid 1"), deaths.reported():
        raise ConnectionResetError


def test_other_errors_stay_what_they_are(deaths, monkeypatch):
    with pytest.raises(EOFError), deaths.reported():  # no death follows
        raise EOFError
    monkeypatch.setattr("data.workers.CONNECTION_LOST_S", 60.0)
    with pytest.raises(OSError, match="Caught"), deaths.reported():  # of a worker that lives: nothing to wait for
        raise OSError("Caught OSError in DataLoader worker process 0. Traceback ...")


def test_other_threads_report_nothing(deaths):
    signal.raise_signal(signal.SIGCHLD)
    failures = []

    def wait() -> None:
        try:
            with deaths.reported():
                pass
        except RuntimeError as error:
            failures.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    thread.join()
    assert not failures
