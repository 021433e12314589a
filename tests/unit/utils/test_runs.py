"""Run folders are never shared, and the newest weights are found."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from utils.errors import UserError
from utils.run_folders import new_run_dir, newest_weights


def test_names_count_up_and_exist_ok_reuses(tmp_path):
    folders = [new_run_dir(tmp_path / "train", "exp") for _ in range(3)]
    assert [f.name for f in folders] == ["exp", "exp2", "exp3"]
    assert new_run_dir(tmp_path / "train", "exp", exist_ok=True).name == "exp"


def test_runs_started_simultaneously_get_separate_folders(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(lambda _: new_run_dir(tmp_path, "exp"), range(40)))
    assert len(set(folders)) == 40


def test_a_project_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written") as caught:
        new_run_dir(tmp_path / "file" / "runs")
    assert "\n" not in str(caught.value)


def test_newest_run_is_taken_with_last_as_fallback_for_best(tmp_path):
    for age, (run, name) in enumerate([("exp", "best.pt"), ("exp2", "best.pt"), ("exp2", "last.pt"), ("exp3", "last.pt")]):
        path = tmp_path / run / "weights" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        os.utime(path, (1_000 + age, 1_000 + age))
    assert newest_weights(tmp_path) == tmp_path / "exp3" / "weights" / "last.pt"
    os.utime(tmp_path / "exp2" / "weights" / "last.pt", (9_000, 9_000))
    assert newest_weights(tmp_path) == tmp_path / "exp2" / "weights" / "best.pt"
    assert newest_weights(tmp_path, "last.pt") == tmp_path / "exp2" / "weights" / "last.pt"


def test_no_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"train first"):
        newest_weights(tmp_path / "nothing")
