"""python -m data.check of sets that have no object, or no label file: just then it is needed."""

from __future__ import annotations

import shutil

import pytest

from data.tools.check import main as check
from tests.image_files import write_images

BOX = (0, 0.5, 0.5, 0.25, 0.25)


@pytest.mark.parametrize("train", [[], [BOX]])
def test_sets_without_objects_are_reported_and_drawn(tmp_path, train):
    path = write_images(tmp_path / "set", {"train": [train], "val": [[]]})
    assert check([str(path), "--project", str(tmp_path / "c")]) == 0
    assert (tmp_path / "c/exp/check.png").stat().st_size > 10_000


def test_a_split_without_label_files_is_a_problem(tmp_path, capsys):
    path = write_images(tmp_path / "set", {"train": [[BOX]] * 2, "val": [[BOX]]})
    shutil.rmtree(tmp_path / "set/labels/train")
    assert check([str(path), "--project", str(tmp_path / "c")]) == 1
    said = capsys.readouterr().out
    expected = tmp_path / "set/labels/train/0.txt"
    assert f"{expected}: no label file for any of the 2 images of 'train', the first is expected here" in said
    assert "1 problem; check.png" in said
    assert (tmp_path / "c/exp/check.png").is_file()
