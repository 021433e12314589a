"""python -m data.check: what it finds, what it says, what it leaves behind."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from data.dataset_spec import load_dataset_spec
from data.labels.files import list_images
from data.labels.yolo import read_labels
from data.tools import check
from data.tools.inspection import inspect_dataset, size_counts
from data.tools.summary import summarize_labels
from tests.coco_layout import write_coco_layout
from tests.damaged_files import IMAGE_SKIPPED, UNUSUAL, image_bytes, write_damaged
from tests.image_files import write_images


@pytest.fixture
def clean(tmp_path):
    path = write_images(tmp_path / "set", {"train": [], "val": []}, names=("a", "b"))
    for number, (split, rows) in enumerate((("train", "0 .5 .5 .25 .25\n1 .2 .2 .1 .1\n"), ("train", ""), ("val", "1 0.5 0.5 0.5 0.5\n"))):
        (tmp_path / f"set/images/{split}/{number}.png").write_bytes(image_bytes(number))
        (tmp_path / f"set/labels/{split}/{number}.txt").write_text(rows)
    return path


def run(yaml_path, tmp_path, *more) -> int:
    return check.main([str(yaml_path), "--project", str(tmp_path / "runs"), "--name", "check", "--workers", "1", *map(str, more)])


def snapshot(folder: Path) -> dict[str, tuple]:
    """Everything below a folder but caches: contents and times."""
    files = [p for p in sorted(folder.rglob("*")) if not p.name.endswith(".cache.npz")]
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in files if p.is_file()}


def row_of(out: str, title: str) -> list[int]:
    (line,) = [text for text in out.splitlines() if text.strip().startswith(title)]
    return [int(v) for v in re.findall(r"\s(\d+)", line[line.index(title) + len(title) :])]


def test_clean_data_set_has_no_problems(clean, tmp_path, capsys):
    assert run(clean, tmp_path) == 0
    out = capsys.readouterr().out
    assert row_of(out, "images") == [2, 1]
    assert row_of(out, "without objects") == [1, 0]
    assert row_of(out, "objects    ") == [2, 1]
    assert row_of(out, "small (COCO's area)") == [2, 0]
    assert row_of(out, "medium (COCO's area)") == [0, 1]  # 32 px a side: from 32² on
    assert row_of(out, "1 b") == [1, 1]
    assert (tmp_path / "runs/check/check.png").stat().st_size > 5000
    assert (tmp_path / "runs/check/problems.txt").read_text() == ""


@pytest.mark.parametrize(
    ("task", "row", "more", "kept"),
    [
        ("obb", "0 -0.3 0.1 0.4 0.1 0.4 0.6 -0.3 0.6", "", "-0.3 0.1 0.4 0.1 0.4 0.6 -0.3 0.6"),
        ("segment", "0 0.1 0.1 0.5 0.1 0.5 0.5", "", "0.1 0.1 0.5 0.1 0.5 0.5"),
        ("", "0 .5 .5 .5 .5 0.4 0.5 2 0.6 0.5 1", "kpt_shape: [2, 3]\n", ""),
    ],
)
def test_rows_that_training_takes_are_no_problem(clean, tmp_path, task, row, more, kept):
    (clean.parent / "labels/train/0.txt").write_text(f"{row}\n")
    (clean.parent / "labels/val/2.txt").write_text(f"{row}\n")
    clean.write_text(clean.read_text() + more)
    fix = ["--fix", "--out", tmp_path / "copy"] if kept else []
    assert run(clean, tmp_path, *(["--task", task] if task else []), *fix) == 0
    if kept:
        written = (tmp_path / "copy/labels/train/0.txt").read_text().split()
        np.testing.assert_allclose(np.array(written[1:], float).reshape(-1, 2), np.array(kept.split(), float).reshape(-1, 2), atol=1e-6)


@pytest.mark.parametrize(
    ("task", "sound", "row", "message"),
    [
        ("obb", "0 .5 .5 .2 .2", "0 0.1 0.1 0.4 0.1 0.4 0.6", "7 columns"),
        ("segment", "0 0.1 0.1 0.3 0.1 0.5 0.5", "0 0.1 0.1 0.3 0.3 0.5 0.5", "points lie on a line"),
        ("pose", "0 .5 .5 .5 .5 0.4 0.5 2", "0 .4 .5 .5 .5 0.4 0.5 7", "visibility 7 of keypoint 0"),
        ("pose", "0 .5 .5 .5 .5 0.4 0.5 2", "0 .4 .5 .5 .5 nan 0.5 2", "NaN or infinity"),
        ("pose", "0 .5 .5 .5 .5 0.4 0.5 2", "0 .4 .5 .5 .5 3.0 0.5 2", "x 3 of keypoint 0"),
    ],
)
def test_rows_that_training_refuses_are_problems(clean, tmp_path, capsys, task, sound, row, message):
    (clean.parent / "labels/train/0.txt").write_text(f"{sound}\n{row}\n")
    (clean.parent / "labels/val/2.txt").write_text(f"{sound}\n")
    if task == "pose":
        clean.write_text(f"{clean.read_text()}kpt_shape: [1, 3]\n")
    assert run(clean, tmp_path, *(["--task", task] if task != "pose" else [])) == 1  # what the file tells need not be given
    assert re.search(rf"train/0\.txt\W+(row )?2\b.*{message}", capsys.readouterr().out)


def test_object_sizes_follow_coco_areas():
    assert size_counts(np.array([1023.9, 1024, 9216, 9216.1])) == {"small": 1, "medium": 2, "large": 1}


def test_duplicates_leaks_and_orphan_labels_are_found(clean, tmp_path, capsys):
    root = clean.parent
    (root / "images/train/again.png").write_bytes(image_bytes(0))
    (root / "images/train/held_out.png").write_bytes(image_bytes(2))
    (root / "labels/train/nobody.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (root / "labels/train/classes.txt").write_text("a\nb\n")
    assert run(clean, tmp_path) == 1
    out = capsys.readouterr().out
    assert row_of(out, "duplicate image") == [1, 0]
    assert row_of(out, "in two splits") == [1, 0]
    assert row_of(out, "labels without image") == [1, 0]
    assert "again.png: the same content as" in out
    assert re.search(r"held_out\.png: in train, and in val as .*val/2\.png", out)
    assert "classes.txt" not in out


def test_every_kind_of_damage_is_found_and_the_copy_is_clean(tmp_path, capsys):
    yaml_path, kinds = write_damaged(tmp_path / "set", each=1, good=20)
    (tmp_path / "set/images/train/twin.png").write_bytes(image_bytes(20_000))  # of val
    before = snapshot(tmp_path / "set")
    assert run(yaml_path, tmp_path, "--fix", "--out", tmp_path / "fixed") == 1
    capsys.readouterr()
    assert snapshot(tmp_path / "set") == before
    problems = (tmp_path / "runs/check/problems.txt").read_text()
    for stem, kind in kinds.items():
        lines = [line for line in problems.splitlines() if f"/{stem}." in line and "same content" not in line]
        assert len(lines) == (0 if kind in UNUSUAL else 1), (kind, lines)
    assert run(tmp_path / "fixed/data.yaml", tmp_path) == 0
    kept = {p.stem for p in (tmp_path / "fixed/images/train").iterdir()}
    assert {s for s, k in kinds.items() if k in IMAGE_SKIPPED}.isdisjoint(kept)
    assert {f"good_{i}" for i in range(20)} <= kept
    assert "twin" not in kept
    assert len(os.listdir(tmp_path / "fixed/images/val")) == 4
    files = list_images([tmp_path / "fixed/images/train"])
    assert read_labels(files, progress=False).problems == ()
    assert run(yaml_path, tmp_path, "--fix", "--out", tmp_path / "fixed") == 2
    assert "exists already" in capsys.readouterr().err
    assert run(yaml_path, tmp_path, "--fix", "--out", tmp_path / "fixed", "--exist-ok") == 1
    assert snapshot(tmp_path / "set") == before


def test_original_data_set_is_never_modified(clean, tmp_path, capsys):
    before = snapshot(clean.parent)
    assert run(clean, tmp_path, "--fix", "--out", clean.parent, "--exist-ok") == 2
    assert "belongs to the original" in capsys.readouterr().err
    assert snapshot(clean.parent) == before


def test_images_of_one_name_stay_separate_in_the_copy(clean, tmp_path):
    other = clean.parent / "more/images"
    other.mkdir(parents=True)
    (other / "0.jpg").write_bytes(image_bytes(77, ".jpg"))
    clean.write_text(clean.read_text().replace("train: images/train", "train: [images/train, more/images]"))
    assert run(clean, tmp_path, "--fix", "--out", tmp_path / "fixed") == 0
    assert sorted(os.listdir(tmp_path / "fixed/images/train")) == ["0.png", "0_2.jpg", "1.png"]
    assert sorted(os.listdir(tmp_path / "fixed/labels/train")) == ["0.txt", "1.txt"]


def test_uncheckable_data_set_exits_with_2(tmp_path, clean, capsys):
    assert run(tmp_path / "nowhere.yaml", tmp_path) == 2
    assert "nowhere.yaml not found" in capsys.readouterr().err
    assert run(clean, tmp_path, "--fix") == 2
    assert "--out" in capsys.readouterr().err
    for file in (clean.parent / "images/val").iterdir():
        file.unlink()
    assert run(clean, tmp_path) == 2
    assert "no images in" in capsys.readouterr().err


def test_coco_layout_is_checked_too(tmp_path, capsys):
    assert run(write_coco_layout(tmp_path / "coco"), tmp_path) == 0
    assert row_of(capsys.readouterr().out, "objects    ") == [10, 6]


def test_damage_in_mid_file_is_found_by_decoding(clean):
    (found, _) = inspect_dataset(load_dataset_spec(clean), workers=1, progress=False)
    assert found.problems == ()
    data = image_bytes(5, ".bmp")
    path = clean.parent / "images/train/half.bmp"
    path.write_bytes(data[: len(data) // 2])
    (found, _) = inspect_dataset(load_dataset_spec(clean), workers=1, progress=False)
    assert [Path(p.path).name for p in found.problems] == ["half.bmp"]


def test_brief_check_names_likely_mistakes(clean):
    train, val = ((files := list_images([clean.parent / f"images/{s}"]), read_labels(files, progress=False)) for s in ("train", "val"))
    assert summarize_labels(train, val, ("a", "b")) == [
        "data      2 objects of 2 classes to train on: 100% small, 0% medium, 0% large (COCO's areas, in the original images)"
    ]
    lines = summarize_labels(val, train, ("a", "b"))
    assert lines[1:] == ["warning: no object to train on for a", "warning: val has objects of classes that are never trained: a"]
    assert "1 images are in both train and val" in summarize_labels(val, val, ("a", "b"))[-1]
