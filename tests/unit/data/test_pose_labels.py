"""Pose labels while no task reads keypoints: the box of each row, never a polygon; and sets whose rows and kpt_shape disagree."""

from __future__ import annotations

import numpy as np
import pytest

from data.dataset_spec import load_dataset_spec
from data.labels.files import list_images
from data.labels.source import split_labels
from data.tools.check import main as check
from tests.image_files import write_images
from utils.errors import UserError

BOXES = [(1, 0.8, 0.4, 0.2, 0.3), (0, 0.6, 0.47, 0.21, 0.31), (1, 0.3, 0.8, 0.1, 0.2)]


def pose_row(box, size=2, points=4):
    """A row with keypoints between the centre and the corners of its box."""
    _, x, y, w, h = box
    corners = [(x + sx * w / 4, y + sy * h / 4) for sx, sy in ((-1, -1), (1, -1), (1, 1), (-1, 1))][:points]
    return (*box, *(v for p in corners for v in (*p, *([2] * (size - 2)))))


def write(folder, rows, more=""):
    path = write_images(folder, {"train": [[r] for r in rows], "val": [rows]}, names=("a", "b"))
    path.write_text(path.read_text() + more)
    return path


def read(yaml_path):
    spec = load_dataset_spec(yaml_path)
    files = list_images(spec.sources("train"))
    return split_labels(spec, "train", files, progress=False)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("points", [3, 4])
def test_boxes_of_pose_labels_are_used_and_a_line_says_so(tmp_path, size, points, capsys):
    rows = [pose_row(b, size, points) for b in BOXES[:2]] + [BOXES[2]]  # an object may lack keypoints
    path = write(tmp_path / "set", rows, f"kpt_shape: [{points}, {size}]\n")
    table, remarks = read(path)
    np.testing.assert_allclose(np.column_stack((table.classes, table.boxes_cxcywh)), BOXES, atol=1e-5)
    assert len(table.points) == 0
    assert remarks == [f"kpt_shape [{points}, {size}]: the boxes of the labels are used, their keypoints are not (task detect)"]
    check([str(path), "--project", str(tmp_path / "c"), "--task", "detect"])
    assert "their keypoints are not" in capsys.readouterr().out


def test_polygons_in_a_set_of_pose_labels_are_refused_row_by_row(tmp_path):
    path = write(tmp_path / "set", [pose_row(BOXES[0]), (0, 0.1, 0.1, 0.4, 0.1, 0.4, 0.4), BOXES[1]], "kpt_shape: [4, 2]\n")
    table, _ = read(path)
    assert table.counts.tolist() == [1, 0, 1]
    (problem,) = table.problems
    assert problem.skips
    assert problem.message.startswith("7 columns, expected by kpt_shape [4, 2]: 13: class cx cy w h and 4 times x y; or 5")


def test_cache_is_read_again_when_kpt_shape_is_added(tmp_path):
    path = write(tmp_path / "set", [pose_row(b) for b in BOXES])
    assert len(read(path)[0].points) == 18
    path.write_text(path.read_text() + "kpt_shape: [4, 2]\n")
    assert len(read(path)[0].points) == 0


def test_pose_rows_without_kpt_shape_are_warned_of(tmp_path):
    path = write(tmp_path / "set", [pose_row(b) for b in BOXES])
    for _ in range(2):  # read, and from the cache
        (remark,) = read(path)[1]
        assert remark.startswith("warning: all 3 rows of 13 columns are read as polygons, but look like pose labels")
        assert "kpt_shape: [4, 2]" in remark


@pytest.mark.parametrize("columns", [9, 13])
def test_polygons_are_not_taken_for_pose_labels(tmp_path, columns):
    rng = np.random.default_rng(0)
    starts = rng.uniform(0.02, 0.85, (20, 2))
    angles = np.linspace(0, 2 * np.pi, (columns - 1) // 2, endpoint=False)
    rows = [(0, *(s + 0.07 + 0.05 * np.stack((np.cos(angles), np.sin(angles)), 1)).ravel()) for s in starts]
    assert read(write(tmp_path / "set", rows))[1] == []


@pytest.mark.parametrize(("size", "points"), [(3, 3), (3, 4)])
def test_rows_with_visibility_are_refused_with_a_hint(tmp_path, size, points):
    table, _ = read(write(tmp_path / "set", [pose_row(b, size, points) for b in BOXES]))
    assert len(table.classes) == 0
    assert len(table.problems) == 3
    assert all(p.message.endswith("pose labels need kpt_shape in the dataset file") for p in table.problems)


def test_polygons_with_as_many_columns_as_pose_rows_are_warned_of(tmp_path):
    rows = [(0, x, 0.8, x + 0.05, 0.8, x + 0.05, 0.9, x, 0.9, x - 0.01, 0.88, x - 0.01, 0.85) for x in (0.7, 0.75, 0.8, 0.85)]
    remarks = read(write(tmp_path / "set", rows, "kpt_shape: [4, 2]\n"))[1]
    assert "warning: 4 of 4 boxes reach outside their image: if the rows are polygons, remove kpt_shape" in remarks[1]


def test_cleaned_copy_of_pose_labels_is_refused_because_keypoints_would_be_lost(tmp_path, capsys):
    path = write(tmp_path / "set", [pose_row(b) for b in BOXES], "kpt_shape: [4, 2]\n")
    assert check([str(path), "--fix", "--out", str(tmp_path / "clean"), "--project", str(tmp_path / "c")]) == 2
    assert "its keypoints would be lost" in capsys.readouterr().err
    assert not (tmp_path / "clean").exists()


@pytest.mark.parametrize("given", ["17", "[17]", "[17, 4]", "[0, 2]", "[17.0, 2]", "[true, 2]", "[1000000000, 3]", "{a: 1}", "'17, 3'"])
def test_invalid_kpt_shape_is_refused(tmp_path, given):
    path = write(tmp_path / "set", BOXES, f"kpt_shape: {given}\n")
    with pytest.raises(UserError, match=r"data.yaml: kpt_shape: .* are expected: \[17, 3\]"):
        load_dataset_spec(path)
