"""Average precision of keypoints: equal to pycocotools on hard cases, and what else belongs to it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from utils.metrics.coco_eval import read_instances, run_pycocotools, write_coco_json
from utils.metrics.keypoints import KEYPOINT_STATS, PoseAccumulator
from utils.metrics.metrics import GroundTruth
from utils.metrics.resampling import image_noise, resampled_ap
from utils.types import Detections


def hard_case(seed: int, *, points: int, sigmas: tuple[float, ...] = ()) -> tuple[PoseAccumulator, dict, list]:
    """Objects without labelled keypoints, crowds, several detections an object, more than 20 an image, equal scores; and as documents."""
    rng = np.random.default_rng(seed)
    metric = PoseAccumulator(("a", "b"), sigmas=sigmas)
    annotations, results = [], []
    for image in range(1, 31):
        m, n = int(rng.integers(0, 7)), int(rng.integers(0, 40))
        wh = np.exp(rng.uniform(np.log(8), np.log(220), (m, 2)))
        boxes = np.hstack((rng.uniform(0, 200, (m, 2)), wh))
        there = np.concatenate((boxes[:, None, :2] + rng.random((m, points, 2)) * wh[:, None], rng.integers(0, 3, (m, points, 1))), axis=2)
        there[rng.random(m) < 0.2, :, 2] = 0
        area, crowd, label = wh.prod(axis=1) * rng.uniform(0.3, 0.8, m), rng.random(m) < 0.1, rng.integers(0, 2, m)
        found, noise = rng.uniform(0, 300, (n, points, 2)), rng.normal(size=(n, points, 2))
        if m:
            near = rng.integers(0, m, n)
            away = rng.choice([0.02, 0.1, 0.4], n) * np.sqrt(area[near])
            found = there[near, :, :2] + noise * away[:, None, None]
        score = np.sort(rng.random(n).round(1 + seed % 2))[::-1].copy()
        classes = rng.integers(0, 2, n)
        low, high = found.min(axis=1, initial=1e9), found.max(axis=1, initial=-1e9)
        keypoints = np.concatenate((found, np.ones((n, points, 1))), axis=2)
        fields = {"keypoints": torch.from_numpy(keypoints)}
        detections = Detections(torch.from_numpy(np.hstack((low, high))), torch.from_numpy(score), torch.from_numpy(classes), fields)
        columns = (np.zeros(m, dtype=int), label, boxes, area, crowd)
        truth = GroundTruth(*map(torch.from_numpy, columns), fields={"keypoints": torch.from_numpy(there)})
        metric.update([detections], truth, images=[image])
        annotations += [
            {"id": len(annotations) + k + 1, "image_id": image, "category_id": int(label[k]), "bbox": boxes[k].tolist(), "area": area[k],
             "iscrowd": int(crowd[k]), "keypoints": there[k].ravel().tolist()}
            for k in range(m)
        ]  # fmt: skip
        results += [
            {"image_id": image, "category_id": int(classes[k]), "keypoints": keypoints[k].ravel().tolist(), "score": score[k],
             "bbox": [*low[k], *(high[k] - low[k])]}
            for k in range(n)
        ]  # fmt: skip
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 400, "height": 400} for i in range(1, 31)]
    return metric, {"images": images, "annotations": annotations, "categories": [{"id": i, "name": "ab"[i]} for i in range(2)]}, results


@pytest.mark.parametrize(("points", "sigmas"), [(17, ()), (5, ()), (3, (0.05, 0.2, 0.1))])
@pytest.mark.parametrize("seed", [0, 1])
def test_keypoint_numbers_equal_pycocotools(seed, points, sigmas):
    metric, annotations, results = hard_case(seed, points=points, sigmas=sigmas)
    expected = run_pycocotools(annotations, results, kind="keypoints", **metric.coco_kinds["keypoints"])
    result = metric.compute()
    assert tuple(expected) == KEYPOINT_STATS
    assert result.own.coco_stats == pytest.approx(expected, abs=1e-12)
    assert 0.02 < expected["AP"] < 0.95
    assert result.box.coco_stats == pytest.approx(run_pycocotools(annotations, results), abs=1e-12)


def test_the_file_of_detections_gives_the_same_numbers(tmp_path):
    metric, annotations, _ = hard_case(0, points=17)
    (tmp_path / "truth.json").write_text(json.dumps(annotations))
    truth = read_instances(tmp_path / "truth.json", ("a", "b"))
    assert truth.serves("keypoints")
    assert truth.truth_of(["1.jpg", "2.jpg"]).fields["keypoints"].shape[1:] == (17, 3)
    write_coco_json(tmp_path / "found.json", metric, category_ids=(0, 1))
    entry = json.loads((tmp_path / "found.json").read_text())[0]
    assert len(entry["keypoints"]) == 51
    found = run_pycocotools(tmp_path / "truth.json", tmp_path / "found.json", kind="keypoints")
    assert found == pytest.approx(metric.compute().own.coco_stats, abs=2e-3)


def test_a_file_without_keypoints_is_no_ground_truth_of_them(tmp_path):
    _, annotations, _ = hard_case(0, points=5)
    for entry in annotations["annotations"]:
        del entry["keypoints"]
    (tmp_path / "truth.json").write_text(json.dumps(annotations))
    truth = read_instances(tmp_path / "truth.json", ("a", "b"))
    assert truth.serves("bbox")
    assert not truth.serves("keypoints")


def test_objects_with_another_number_of_keypoints_are_named_and_count_as_without(tmp_path):
    metric, annotations, results = hard_case(0, points=5)
    first, second = annotations["annotations"][:2]
    first["keypoints"] = [1, 2, 2] * 17
    del second["keypoints"]
    (tmp_path / "truth.json").write_text(json.dumps(annotations))
    truth = read_instances(tmp_path / "truth.json", ("a", "b"), keypoints=5)
    assert truth.keypoints.shape[1:] == (5, 3)
    assert not truth.keypoints[:2].any()
    assert truth.remarks == (
        "annotation 1 of truth.json: keypoints: 5 times x, y in px and visibility 0, 1 or 2 are expected by kpt_shape; they are not used",
    )
    assert not read_instances(tmp_path / "truth.json", ("a", "b"), keypoints=4).serves("keypoints")
    again = PoseAccumulator(("a", "b"))
    state = metric.state()
    state["fields"]["truth"]["keypoints"][:2] = 0
    again.merge(state)
    found = run_pycocotools(tmp_path / "truth.json", results, kind="keypoints", **metric.coco_kinds["keypoints"])
    assert again.compute().own.coco_stats == pytest.approx(found, abs=1e-12)


def test_columns_table_and_rows_name_both_measures():
    metric, _, _ = hard_case(0, points=5)
    result = metric.compute()
    assert list(result.columns)[3::4] == ["metrics/mAP_0.5:0.95(B)", "metrics/mAP_0.5:0.95(P)"]
    assert "mAP50-95(P)" in result.table()
    assert {"AP(B)", "AP(P)"} <= result.class_rows[0].keys()
    assert result.fitness == pytest.approx((result.box.fitness + result.own.fitness) / 2)


def person_and_ball() -> PoseAccumulator:
    """A person that is found, a ball that is found but has no labelled keypoint, and a doubtful person that is none; in one image."""
    keypoints = torch.tensor((((10.0, 10, 2), (50, 50, 2)), ((0, 0, 0), (0, 0, 0)), ((80, 5, 1), (99, 9, 1))))
    boxes, classes = torch.tensor(((0.0, 0, 60, 60), (80, 80, 90, 90), (80, 0, 99, 10))), torch.tensor((0, 1, 0))
    metric = PoseAccumulator(("person", "ball"))
    fields = {"keypoints": keypoints[:2]}
    truth = GroundTruth.of_boxes(torch.zeros(2, dtype=torch.long), classes[:2], torch.tensor(((0.0, 0, 60, 60), (80, 80, 10, 10))))
    found = Detections(boxes, torch.tensor((0.9, 0.8, 0.2)), classes, {"keypoints": keypoints})
    metric.update([found], truth.replace(fields=fields), images=[0])
    return metric


def test_a_class_without_labelled_keypoints_does_not_move_the_confidence():
    own = person_and_ball().compute().own
    assert own.confidence > 0.2
    assert min(own.precision, own.recall) > 0.9
    assert np.isnan(own.precision_per_class[1])


def test_a_study_keeps_no_curve_of_a_class_without_labelled_keypoints():
    from engine.study.measuring import measured_values

    curves = measured_values(person_and_ball().compute())["pr_curves"]
    assert set(curves) == {"person", "all"}
    assert np.isfinite(curves["all"]).all()


def test_the_noise_of_the_images_is_that_of_the_keypoints():
    metric, _, _ = hard_case(0, points=5)
    np.testing.assert_allclose(resampled_ap(metric, np.ones((1, 30), dtype=np.int64))[0], metric.compute().own.ap, atol=1e-12)
    assert set(image_noise(metric, resamples=5)) == {"metrics/mAP_0.5(P)", "metrics/mAP_0.5:0.95(P)"}
