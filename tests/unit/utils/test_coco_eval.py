"""COCO's files: reading instances, writing results, and pycocotools over both."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from data.labels.coco import read_coco_labels
from utils.errors import UserError
from utils.metrics.coco_eval import (
    COCO_CATEGORY_IDS,
    category_ids_of,
    read_instances,
    run_pycocotools,
    write_coco_json,
)
from utils.metrics.metrics import MetricAccumulator
from utils.types import Detections

NAMES = ("cell", "wall")


def instances(folder: Path, **changes: object) -> Path:
    content = {
        "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "sub/a.jpg"}, {"id": 9, "file_name": "empty.jpg"}],
        "categories": [{"id": 4, "name": "Wall"}, {"id": 1, "name": "cell"}, {"id": 2, "name": "other"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 4, "bbox": [1, 2, 30, 40], "area": 700.5, "iscrowd": 1},
            {"id": 2, "image_id": 3, "category_id": 1, "bbox": [5, 5, 50, 60], "area": 2000},
            {"id": 3, "image_id": 7, "category_id": 2, "bbox": [0, 0, 5, 5], "area": 25, "iscrowd": 0},
            {"id": 4, "image_id": 7, "category_id": 1, "bbox": [9, 9, 20, 10]},
        ],
    }
    path = folder / "instances_val.json"
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_reads_area_crowd_and_classes_by_name(tmp_path: Path) -> None:
    found = read_instances(instances(tmp_path), NAMES)
    assert found.category_ids == (1, 4)
    truth = found.truth_of(["x/images/a.jpg", "empty.jpg", "b.jpg"])
    assert truth.image.tolist() == [0, 2, 2]
    assert truth.classes.tolist() == [0, 1, 0]
    assert truth.area.tolist() == [2000, 700.5, 200]
    assert truth.crowd.tolist() == [False, True, False]
    assert truth.boxes_ltwh[0].tolist() == [5, 5, 50, 60]
    assert len(found.truth_of([]).image) == 0


def test_single_class_takes_every_object(tmp_path: Path) -> None:
    truth = read_instances(instances(tmp_path), ("item",), single_class=True).truth_of(["b.jpg"])
    assert truth.classes.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("names", "category_ids"), [(("x", "y", "z"), (1, 2, 4)), (("wall",), (4,))])
def test_classes_by_order_where_names_differ(
    tmp_path: Path, names: tuple[str, ...], category_ids: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    assert read_instances(instances(tmp_path), names).category_ids == category_ids
    by_order = "no category named 'x', so its 3 categories are taken in the order of their ids: 'cell' is 'x'"
    assert (by_order in caplog.text) == (len(names) == 3)


def test_an_order_that_contradicts_the_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no category named 'brick', and by order its 'cell' would be 'brick'"):
        read_instances(instances(tmp_path), ("brick", "cell", "wall"))


def test_names_that_differ_in_letter_case_alone_are_told_apart(tmp_path: Path) -> None:
    path = instances(tmp_path, categories=[{"id": 4, "name": "wall"}, {"id": 1, "name": "Wall"}, {"id": 2, "name": "other"}])
    assert read_instances(path, ("wall", "Wall")).category_ids == (4, 1)


@pytest.mark.parametrize(
    ("content", "what"),
    [("no json", "not valid JSON"), ("[]", "not a COCO"), ('{"images": []}', "list 'annotations' is missing"), (None, "No such file")],
)
def test_file_of_another_kind_is_refused(tmp_path: Path, content: str | None, what: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=what) as error:
        read_instances(path, NAMES)
    assert str(path) in str(error.value)


FAULTY = (
    {"id": 5, "image_id": 7, "category_id": 1, "bbox": [1, 2, 3]},
    {"id": 6, "image_id": 7, "category_id": 1},
    {"id": 7, "image_id": 3, "category_id": 1, "bbox": [1, 2, float("nan"), 4]},
    {"id": 8, "image_id": 3, "category_id": 77, "bbox": [1, 2, 3, 4]},
    {"id": 9, "image_id": 3, "category_id": None, "bbox": [1, 2, 3, 4]},
    {"id": 10, "image_id": 1234, "category_id": 1, "bbox": [1, 2, 3, 4]},
    {"id": 11, "category_id": 1, "bbox": [1, 2, 3, 4]},
    "no annotation",
)


def test_faulty_annotations_are_left_out_as_in_training_and_in_the_same_words(tmp_path: Path) -> None:
    whole = read_instances(instances(tmp_path), NAMES)
    content = json.loads(whole.path.read_text())
    content["annotations"][1].update(area=None)
    path = tmp_path / "faulty.json"
    path.write_text("\ufeff" + json.dumps({**content, "annotations": [*FAULTY, *content["annotations"]]}), encoding="utf-8")
    found = read_instances(path, NAMES)
    assert found.boxes_ltwh.tolist() == whole.boxes_ltwh.tolist()
    assert sorted(found.area.tolist()) == [200, 700.5, 3000]
    for name in ("b.jpg", "a.jpg", "empty.jpg"):
        cv2.imwrite(str(tmp_path / name), np.zeros((80, 80, 3), np.uint8))
    table = read_coco_labels(path, [str(tmp_path / n) for n in ("b.jpg", "a.jpg", "empty.jpg")], NAMES, progress=False)
    assert table.shapes_hw[:, 0].tolist() == [0, 0, 80]  # an image with a faulty annotation is left out
    told = {p.message for p in table.problems}
    assert len(found.remarks) == 2 + 3 + 1
    assert found.remarks[0] == "3 annotations belong to no image of the file, first: number 6"
    assert found.remarks[-1] == "… and 2 more like these"
    assert set(found.remarks[:-1]) <= told, (found.remarks, told)
    hit = [{"image_id": 3, "category_id": 1, "bbox": [5, 5, 50, 60], "score": 0.5}]
    assert run_pycocotools(path, hit, image_ids=[3], category_ids=(1, 4))["AP"] == pytest.approx(1)


@pytest.mark.parametrize("seed", range(3))
def test_crowds_count_as_in_pycocotools(tmp_path: Path, seed: int) -> None:
    """Detections beside, inside and across crowds, of their class and of another; the region's own overlap is by the detection's area."""
    rng = np.random.default_rng(seed)
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(1, 25)]
    annotations, paths, found = [], [], []
    for image in images:
        rows = []
        for k in range(6):
            box, label = np.r_[rng.uniform(0, 300, 2), rng.uniform(8, 200, 2)].round(1), int(rng.integers(2))
            crowd = k == 0 and image["id"] % 3 > 0
            box[2:] *= 1 + 2 * crowd
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image["id"], "category_id": (1, 4)[label], "bbox": box.tolist(),
                 "area": float(box[2] * box[3] * 0.8), "iscrowd": int(crowd)}
            )  # fmt: skip
            for _ in range(4 if crowd else 1):
                inner = np.r_[box[:2] + box[2:] * rng.uniform(-0.1, 0.6, 2), box[2:] * 0.4] if crowd else box * rng.uniform(0.93, 1.07, 4)
                rows.append([*inner[:2], *(inner[:2] + inner[2:]), rng.uniform(), label if rng.uniform() < 0.9 else 1 - label])
        dets = torch.tensor(sorted(rows, key=lambda r: -r[4]))
        found.append(Detections(dets[:, :4], dets[:, 4], dets[:, 5].long()))
        paths.append(str(image["file_name"]))
    path = instances(tmp_path, images=images, annotations=annotations)
    truth = read_instances(path, NAMES)
    accumulator = MetricAccumulator(NAMES)
    accumulator.update(found, truth.truth_of(paths), images=truth.ids_of(paths))
    write_coco_json(tmp_path / "found.json", accumulator, category_ids=truth.category_ids)
    expected = run_pycocotools(path, tmp_path / "found.json", category_ids=truth.category_ids)
    assert accumulator.compute().coco_stats == pytest.approx(expected, abs=1e-3)
    plain = instances(tmp_path, images=images, annotations=[{**a, "iscrowd": 0} for a in annotations])
    assert run_pycocotools(plain, tmp_path / "found.json", category_ids=truth.category_ids)["AP"] < expected["AP"] - 0.01


def test_unknown_class_and_unknown_image_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'tree'"):
        read_instances(instances(tmp_path), ("cell", "tree"))
    with pytest.raises(UserError, match=r"'nowhere\.jpg'"):
        read_instances(instances(tmp_path), NAMES).truth_of(["nowhere.jpg"])


def test_category_ids() -> None:
    assert len(COCO_CATEGORY_IDS) == 80
    assert (COCO_CATEGORY_IDS[0], COCO_CATEGORY_IDS[11], COCO_CATEGORY_IDS[79]) == (1, 13, 90)
    assert category_ids_of(["person", *["x"] * 78, "toothbrush"]) == COCO_CATEGORY_IDS
    assert category_ids_of(NAMES) == (0, 1)


def test_written_results_score_the_same_with_pycocotools(tmp_path: Path) -> None:
    annotations = read_instances(instances(tmp_path), NAMES)
    accumulator = MetricAccumulator(NAMES)
    paths = ["a.jpg", "b.jpg", "empty.jpg"]
    found = [
        Detections(torch.tensor([[5.2, 5.1, 54.0, 64.0]]), torch.tensor([0.75]), torch.tensor([0])),
        Detections(torch.tensor([[9.5, 9.5, 28.0, 20.0], [1.0, 2.0, 30.0, 40.0]]), torch.tensor([0.9, 0.125]), torch.tensor([0, 1])),
        Detections(torch.tensor([[0.0, 0.0, 9.0, 9.0]]), torch.tensor([0.8]), torch.tensor([0])),
    ]
    accumulator.update(found, annotations.truth_of(paths), images=annotations.ids_of(paths))
    file = tmp_path / "predictions.json"
    assert write_coco_json(file, accumulator, category_ids=annotations.category_ids) == 4
    rows = json.loads(file.read_text())
    assert [(r["image_id"], r["category_id"]) for r in rows] == [(3, 1), (7, 1), (7, 4), (9, 1)]
    np.testing.assert_allclose(rows[0]["bbox"], [5.2, 5.1, 48.8, 58.9], atol=1e-4)
    expected = run_pycocotools(annotations.path, file, category_ids=annotations.category_ids)
    assert accumulator.compute().coco_stats == pytest.approx(expected, abs=1e-9)
    assert 0 < expected["AP"] < 1


def test_no_detection_gives_zero_metrics(tmp_path: Path) -> None:
    file = tmp_path / "predictions.json"
    assert write_coco_json(file, MetricAccumulator(NAMES), category_ids=(1, 4)) == 0
    assert run_pycocotools(instances(tmp_path), file)["AP"] == 0


def test_results_of_other_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'a'"):
        run_pycocotools(instances(tmp_path), [{"image_id": "a", "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}])


def test_only_requested_images_are_evaluated(tmp_path: Path) -> None:
    hit = [{"image_id": 3, "category_id": 1, "bbox": [5, 5, 50, 60], "score": 0.5}]
    assert run_pycocotools(instances(tmp_path), hit, image_ids=[3])["AP"] == pytest.approx(1)
    assert run_pycocotools(instances(tmp_path), hit)["AP"] < 0.6
