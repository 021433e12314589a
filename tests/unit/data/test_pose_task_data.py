"""Labels with keypoints for the task that reads them: rows, COCO files, dataset files, flips, and the embedded set."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from data.dataset_spec import load_dataset_spec
from data.labels.files import list_images
from data.labels.source import split_labels
from data.loader import LoaderOptions, build_loader
from data.tools import shape_points
from tasks import POSE, get_task
from tasks.base import DrawStyle
from tasks.keypoints import COCO_SKELETON, Keypoints
from tasks.pose import PoseTask
from tasks.rows import InvalidRow
from tests.image_files import write_images
from utils.config import Hyperparameters
from utils.errors import UserError
from utils.types import Detections, Letterbox

BOX = "0 0.5 0.5 0.4 0.4"
THREE = f"{BOX} 0.4 0.5 2 0.6 0.5 1 0 0 0"
TASK = PoseTask(Keypoints(3, 3))


def write(folder, rows, more):
    path = write_images(folder, {split: [[tuple(map(float, r.split()))] for r in rows] for split in ("train", "val")}, names=("a", "b"))
    path.write_text(path.read_text() + more)
    return path


def test_rows_of_two_and_three_values_are_read():
    assert get_task("pose") is POSE
    np.testing.assert_allclose(TASK.parse_row(THREE.split()).keypoints, [(0.4, 0.5, 2), (0.6, 0.5, 1), (0, 0, 0)])
    two = PoseTask(Keypoints(2, 2)).parse_row(f"{BOX} 0.4 0.5 0.6 1.0005".split())
    np.testing.assert_allclose(two.keypoints, [(0.4, 0.5, 2), (0.6, 1, 2)])
    assert TASK.parse_row(BOX.split()).keypoints.tolist() == [[0, 0, 0]] * 3
    assert TASK.parse_row(f"{BOX} 0.4 0.5 2 0.6 0.5 1 -7 9 0".split()).keypoints[2].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f"{BOX} 0.4 0.5 2", r"8 columns, expected 14 by kpt_shape \[3, 3\]: class cx cy w h, 3 times x y visibility"),
        (f"{BOX} 0.4 0.5 0.9 0.6 0.5 1 0 0 0", "visibility 0.9 of keypoint 0 in column 8, 0, 1 or 2"),
        (f"{BOX} 0.4 0.5 2 0.6 1.5 1 0 0 0", "y 1.5 of keypoint 1 in column 10"),
        (f"{BOX} 0.4 nan 2 0.6 0.5 1 0 0 0", "NaN"),
        (f"{BOX} 0.4 x 2 0.6 0.5 1 0 0 0", "not a number"),
    ],
)
def test_wrong_rows_are_named(row, message):
    wrong = TASK.parse_row(row.split())
    assert isinstance(wrong, InvalidRow)
    assert re.search(message, wrong.message), wrong.message


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("", r"no kpt_shape, which pose estimation needs: write kpt_shape: \[3, 3\]"),
        ("kpt_shape: [5, 3]\n", r"kpt_shape: \[5, 3\], but the network predicts keypoints of \[3, 3\]"),
        (
            "kpt_shape: [3, 3]\nflip_idx: [1, 0, 3]\n",
            r"flip_idx: \[1, 0, 3\], the index of each .* is expected, from 0 to 2, such as \[1, 0, 2\]",
        ),
        ("kpt_shape: [3, 3]\nflip_idx: [1, 0]\n", "flip_idx: 2 indices, but kpt_shape has 3 keypoints"),
        ("kpt_shape: [3, 3]\nkpt_oks_sigmas: [0.1, -1, 2]\n", "kpt_oks_sigmas"),
        ("kpt_shape: [3, 3]\nskeleton: [[0, 1], [1, 3]]\n", r"skeleton: \[1, 3\], pairs of keypoints, counted from 0 to 2"),
    ],
)
def test_a_data_set_that_does_not_fit_is_one_line(tmp_path, more, message):
    path = write(tmp_path / "set", [THREE], more)
    with pytest.raises(UserError, match=message) as error:
        build_loader(load_dataset_spec(path), "train", options(), task=TASK)
    assert "\n" not in str(error.value)


def test_a_slip_in_a_key_is_named_and_keys_of_other_programs_are_not(tmp_path, caplog):
    load_dataset_spec(write(tmp_path / "set", [THREE], "kpt_shap: [3, 3]\nroboflow: {workspace: mine}\nlicense: CC0\n"))
    said = [record.getMessage().partition(": ")[2] for record in caplog.records]
    assert said == ["the key 'kpt_shap' is not read; did you mean 'kpt_shape'?"]


def test_a_data_set_without_any_labelled_keypoint_is_one_line(tmp_path):
    path = write(tmp_path / "set", [BOX], "kpt_shape: [3, 3]\n")
    with pytest.raises(UserError, match="no object of 'train' has a labelled keypoint"):
        build_loader(load_dataset_spec(path), "train", options(), task=TASK)


def options(**changes) -> LoaderOptions:
    hyp = Hyperparameters(mosaic=0, fliplr=1, translate=0, scale=0, hsv_h=0, hsv_s=0, hsv_v=0, mixup=0, copy_paste=0)
    return LoaderOptions(**{"imgsz": 64, "batch_size": 1, "hyp": hyp, "augment": True, "workers": 0, **changes})


@pytest.mark.parametrize(("more", "x"), [("", 0.4), ("flip_idx: [1, 0, 2]\n", 0.4), ("flip_idx: [0, 1, 2]\n", 0.6)])
def test_flips_need_to_know_the_counterparts(tmp_path, capsys, more, x):
    path = write(tmp_path / "set", [THREE], f"kpt_shape: [3, 3]\n{more}")
    batch = next(iter(build_loader(load_dataset_spec(path), "train", options(), task=TASK)))
    assert batch.targets.keypoints[0, 0, 0].item() == pytest.approx(x, abs=0.02)
    assert ("flips and copy-paste are off" in capsys.readouterr().out) == (not more)


def test_keypoints_of_a_coco_file_are_those_of_label_files(tmp_path):
    path = write(tmp_path / "set", [THREE, BOX], "kpt_shape: [3, 3]\n")
    spec = load_dataset_spec(path)
    files = list_images(spec.sources("train"))
    expected, _ = split_labels(spec, "train", files, task=TASK, progress=False)
    h, w = expected.shapes_hw[0].tolist()
    given = [[0.4 * w, 0.5 * h, 2, 0.6 * w, 0.5 * h, 1, 0, 0, 0], None]
    content = {
        "images": [{"id": i, "file_name": f.rsplit("/", 1)[-1], "width": w, "height": h} for i, f in enumerate(files)],
        "annotations": [
            {"id": i + 1, "image_id": i, "category_id": 0, "bbox": [0.3 * w, 0.3 * h, 0.4 * w, 0.4 * h], "keypoints": points}
            for i, points in enumerate(given)
        ],
        "categories": [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}],
    }  # fmt: skip
    target = tmp_path / "set" / "annotations" / "person_keypoints_train.json"
    target.parent.mkdir()
    target.write_text(json.dumps(content))
    path.write_text(path.read_text() + f"annotations: {{train: {target}}}\n")
    found, _ = split_labels(load_dataset_spec(path), "train", files, task=TASK, progress=False)
    np.testing.assert_allclose(found.keypoints, expected.keypoints, atol=1e-5)
    content["annotations"][0]["keypoints"] = [1, 2, 3]
    target.write_text(json.dumps(content))
    wrong, _ = split_labels(load_dataset_spec(path), "train", files, task=TASK, progress=False)
    assert [p.message for p in wrong.problems if p.skips] == [
        "annotation 1 of person_keypoints_train.json: keypoints: 3 times x, y in px and visibility 0, 1 or 2 are expected by kpt_shape"
    ]


def test_the_embedded_set_has_the_corners_of_its_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr(shape_points, "COUNTS", {"train": 4, "val": 1})
    folder = shape_points.ensure_shape_points(tmp_path / "points")
    (tmp_path / "set.yaml").write_text(
        f"path: {folder}\ntrain: images/train\nval: images/val\nnames: [{', '.join(shape_points.NAMES)}]\nkpt_shape: [4, 3]\n"
    )
    spec = load_dataset_spec(tmp_path / "set.yaml")
    table, _ = split_labels(spec, "train", list_images(spec.sources("train")), task=POSE.for_labels(spec.label_settings, source="x"))
    assert not table.problems
    x, y, seen = np.moveaxis(table.keypoints, 2, 0)
    whole = (seen == 2).all(1)
    assert whole.sum() > 5
    low, high = table.boxes_cxcywh[:, :2] - table.boxes_cxcywh[:, 2:] / 2, table.boxes_cxcywh[:, :2] + table.boxes_cxcywh[:, 2:] / 2
    extremes = np.stack((y.min(1), x.max(1), y.max(1), x.min(1)), 1)[whole]
    np.testing.assert_allclose(extremes, np.stack((low[:, 1], high[:, 0], high[:, 1], low[:, 0]), 1)[whole], atol=0.015)
    np.testing.assert_allclose(extremes, np.stack((y[:, 0], x[:, 1], y[:, 2], x[:, 3]), 1)[whole], atol=1e-6)
    truth = json.loads((folder / "annotations" / "person_keypoints_train.json").read_text())
    assert [a["num_keypoints"] for a in truth["annotations"]] == (seen > 0).sum(1).tolist()
    assert spec.annotations_json("train").name == "person_keypoints_train.json"


def detections(points: torch.Tensor) -> Detections:
    low, high = points[..., :2].amin(1), points[..., :2].amax(1)
    return Detections(torch.cat((low, high), 1), torch.ones(len(points)), torch.zeros(len(points)).long(), {"keypoints": points})


def test_skeletons_are_drawn_and_unsure_keypoints_are_not():
    image = np.full((80, 80, 3), 90, np.uint8)
    points = torch.tensor([[[20.0, 20, 0.9], [60.0, 20, 0.9], [40.0, 60, 0.1]]])
    style = DrawStyle(hide_labels=True)
    plain = PoseTask(Keypoints(3)).draw(image, detections(points), ["a"], style)
    joined = PoseTask(Keypoints(3, skeleton=((0, 1), (1, 2)))).draw(image, detections(points), ["a"], style)
    assert (joined[20, 30:50] != plain[20, 30:50]).any() or (joined[17:24, 40] != plain[17:24, 40]).any()
    assert (joined[30:50, 50] == plain[30:50, 50]).all()
    assert Keypoints(17).limbs == COCO_SKELETON
    assert Keypoints(16).limbs == ()
    nan = points.clone()
    nan[0, 0, 0] = torch.nan
    PoseTask(Keypoints(3, skeleton=((0, 1),))).draw(image, detections(points).replace(fields={"keypoints": nan}), ["a"], style)


def test_keypoints_move_with_their_image_and_stay_in_it():
    letterbox = Letterbox(torch.tensor([[50, 100]]), torch.full((1, 2), 2.0), torch.tensor([[0.0, 6.0]]))
    found = detections(torch.tensor([[[20.0, 26, 0.9], [500.0, 20, 0.9], [40.0, 0, 0.9]]]))
    (moved,) = PoseTask(Keypoints(3)).to_original([found], letterbox)
    assert moved.fields["keypoints"][0, :, :2].tolist() == [[10, 10], [100, 7], [20, 0]]


def test_label_rows_say_which_keypoints_are_sure():
    found = detections(torch.tensor([[[10.0, 10, 0.9], [40.0, 20, 0.2], [20.0, 30, 0.6]]]))
    (row,) = TASK.label_rows(found, (50, 100))
    assert row.split()[5:] == ["0.1", "0.2", "2", "0.4", "0.4", "0", "0.2", "0.6", "2"]
    (two,) = PoseTask(Keypoints(3, 2)).label_rows(found, (50, 100), with_confidence=True)
    assert two.split()[5:] == ["0.1", "0.2", "0.4", "0.4", "0.2", "0.6", "1"]


def test_pieces_of_an_object_give_it_the_keypoints_they_are_sure_of():
    points = torch.tensor([[[1.0, 1, 0.9], [2, 2, 0.1]], [[5, 5, 0.5], [6, 6, 0.8]], [[7, 7, 0.2], [8, 8, 0.3]]])
    united = PoseTask(Keypoints(2)).unite(detections(points), torch.tensor([0, 0]), torch.tensor([1, 2])).fields["keypoints"]
    torch.testing.assert_close(united[0], torch.tensor([[1, 1, 0.9], [6, 6, 0.8]]))
    assert torch.equal(united[1:], points[1:])
    none = torch.zeros(0).long()
    assert torch.equal(PoseTask(Keypoints(2)).unite(detections(points), none, none).fields["keypoints"], points)
