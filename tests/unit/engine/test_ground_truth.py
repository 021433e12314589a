"""Which file validation measures against."""

from __future__ import annotations

import json

import pytest

from data.dataset_spec import load_dataset_spec
from engine.evaluation.ground_truth import split_truth
from tasks import POSE
from tests.image_files import write_images


@pytest.mark.parametrize(("count", "is_truth"), [(5, True), (17, False)])
def test_a_file_with_another_number_of_keypoints_is_passed_over_in_a_line(tmp_path, capsys, count, is_truth):
    path = write_images(tmp_path / "set", {"train": [[]], "val": [[(0, 0.5, 0.5, 0.2, 0.1, *(0.5, 0.5, 2) * 5)]]})
    path.write_text(path.read_text() + "kpt_shape: [5, 3]\n")
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 20, 20], "keypoints": [12, 12, 2] * count}
    content = {"images": [{"id": 1, "file_name": "0.png"}], "annotations": [annotation], "categories": [{"id": 1, "name": "thing"}]}
    (path.parent / "annotations").mkdir()
    truth = path.parent / "annotations/person_keypoints_val.json"
    truth.write_text(json.dumps(content))
    task = POSE.from_settings({"kpt_shape": [5, 3]}, source="here")
    assert (split_truth(load_dataset_spec(path), "val", task=task) is not None) == is_truth
    said = capsys.readouterr().out.splitlines()
    other = f"Ground truth: the label files; {truth} has no object with 5 keypoints, as kpt_shape says"
    assert said == [f"Ground truth: {truth}" if is_truth else other]
