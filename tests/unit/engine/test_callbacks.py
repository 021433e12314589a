"""Callbacks are called for every event and cannot break a run."""

from __future__ import annotations

from engine.logging.callbacks import Callback, Callbacks, RunInfo
from tasks import DETECT


class Recorder(Callback):
    def __init__(self):
        self.rows = []

    def on_epoch_end(self, run, row):
        self.rows.append(row["epoch"])


class Broken(Callback):
    def on_epoch_end(self, run, row):
        raise OSError("disk\nfull")


def test_a_failing_callback_is_removed_with_one_warning(tmp_path, capsys):
    recorder = Recorder()
    callbacks = Callbacks([Broken(), recorder])
    run = RunInfo(tmp_path, ("a",), ("box",), DETECT)
    callbacks.on_epoch_end(run, {"epoch": 0})
    callbacks.on_epoch_end(run, {"epoch": 1})
    assert recorder.rows == [0, 1]
    assert capsys.readouterr().err == "warning: Broken failed (OSError: disk full) and is left out from now on\n"


def test_other_ranks_have_no_callbacks():
    assert Callbacks([Recorder()], is_main=False).callbacks == []
