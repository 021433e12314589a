"""Observers are told everything and can break nothing."""

from __future__ import annotations

from engine.logging.callbacks import Callback, Callbacks, RunInfo


class Recorder(Callback):
    def __init__(self):
        self.rows = []

    def on_epoch_end(self, run, row):
        self.rows.append(row["epoch"])


class Broken(Callback):
    def on_epoch_end(self, run, row):
        raise OSError("disk\nfull")


def test_a_failing_observer_is_dropped_with_one_line(tmp_path, capsys):
    recorder = Recorder()
    callbacks = Callbacks([Broken(), recorder])
    run = RunInfo(tmp_path, ("a",), ("box",))
    callbacks.on_epoch_end(run, {"epoch": 0})
    callbacks.on_epoch_end(run, {"epoch": 1})
    assert recorder.rows == [0, 1]
    assert capsys.readouterr().err == "warning: Broken failed (OSError: disk full) and is left out from now on\n"


def test_other_processes_have_no_observers():
    assert Callbacks([Recorder()], is_main=False).observers == []
