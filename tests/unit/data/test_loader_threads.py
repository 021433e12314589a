"""A worker whose batch nobody takes any more, as after Ctrl-C in a validation, ends without a traceback."""

from __future__ import annotations

import threading

import pytest

from data.workers import _report_error


@pytest.mark.parametrize(
    ("error", "in_thread", "shown"),
    [(ConnectionResetError(), True, False), (EOFError(), True, False), (KeyError("a bug"), True, True), (OSError("disk"), False, True)],
)
def test_only_a_lost_receiver_is_silent(capsys, error, in_thread, shown):
    def report() -> None:
        _report_error(type(error), error, None)

    if in_thread:
        thread = threading.Thread(target=report)
        thread.start()
        thread.join()
    else:
        report()
    assert (type(error).__name__ in capsys.readouterr().err) == shown
