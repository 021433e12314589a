"""predictions.json of detect.py: COCO's results format for every task, valid whatever ends the run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks import DETECT, TASKS
from tasks.base import Task
from utils.errors import UserError
from utils.masks.packed import pack
from utils.types import Detections
from utils.visual.savers import ResultWriter, SaveOptions

NAMES = ("red", "blue")
HW = (20, 30)
ONLY_JSON = SaveOptions(images=False, json=True)
IMAGE = np.zeros((*HW, 3), np.uint8)


def found(**fields: torch.Tensor) -> Detections:
    boxes = torch.tensor([[2.0, 3.0, 12.0, 9.0], [0.0, 0.0, 30.0, 20.0]])
    return Detections(boxes, torch.tensor([0.9, 0.25]), torch.tensor([1, 0]), fields, image_hw=HW if fields else None)


def written(folder: Path, task: Task, detections: Detections, *paths: str, frame: int | None = None) -> list[dict]:
    with ResultWriter(folder, NAMES, ONLY_JSON, task) as writer:
        for path in paths:
            writer.write(path, IMAGE, detections, drawn=IMAGE, frame=frame)
    return json.loads((folder / "predictions.json").read_text())


def test_entries_have_cocos_keys_and_names(tmp_path: Path) -> None:
    entries = written(tmp_path, DETECT, found(), "/d/000000000139.jpg", "/d/street.png")
    assert [(e["image_id"], e["file_name"]) for e in entries[::2]] == [(139, "000000000139.jpg"), ("street", "street.png")]
    assert entries[0] == {
        "image_id": 139, "file_name": "000000000139.jpg", "category_id": 1, "category": "blue", "score": 0.9, "bbox": [2, 3, 10, 6]
    }  # fmt: skip


def test_frames_of_a_video_have_ids_of_their_own(tmp_path: Path) -> None:
    (entry, _) = written(tmp_path, DETECT, found(), "/d/clip.mp4", frame=12)
    assert (entry["image_id"], entry["frame"], entry["file_name"]) == ("clip_12", 12, "clip.mp4")


def test_masks_are_run_length_codes_of_the_whole_image(tmp_path: Path) -> None:
    from pycocotools import mask

    masks = np.zeros((2, *HW), bool)
    masks[0, 3:9, 2:12] = True
    entries = written(tmp_path, TASKS["segment"], found(masks=torch.from_numpy(pack(masks))), "a.png")
    for entry, expected in zip(entries, masks):
        assert np.array_equal(mask.decode(entry["segmentation"]).astype(bool), expected)


def test_keypoints_are_flat_with_their_confidence(tmp_path: Path) -> None:
    points = torch.tensor([[[1.5, 2.25, 0.75], [3.0, 4.0, 0.5]]]).expand(2, 2, 3)
    (entry, _) = written(tmp_path, TASKS["pose"], found(keypoints=points), "a.png")
    assert entry["keypoints"] == [1.5, 2.25, 0.75, 3.0, 4.0, 0.5]


def test_oriented_boxes_have_corners_and_an_angle(tmp_path: Path) -> None:
    (entry, _) = written(tmp_path, TASKS["obb"], found(angle=torch.full((2, 1), torch.pi / 2)), "a.png")
    assert entry["rbox"] == pytest.approx([7, 6, 10, 6, 1.5708], abs=1e-4)
    assert sorted(zip(entry["poly"][::2], entry["poly"][1::2])) == [(4, 1), (4, 11), (10, 1), (10, 11)]
    assert entry["bbox"] == pytest.approx([4, 1, 6, 10])


def test_a_class_of_a_whole_image_has_no_box(tmp_path: Path) -> None:
    (entry, _) = written(tmp_path, TASKS["classify"], found(), "a.png")
    assert "bbox" not in entry
    assert (entry["category"], entry["score"]) == ("blue", 0.9)


def test_the_file_is_complete_whatever_ends_the_run(tmp_path: Path) -> None:
    assert written(tmp_path / "nothing", DETECT, found()) == []
    assert written(tmp_path / "empty", DETECT, found()[:0], "a.png") == []
    writer = ResultWriter(tmp_path / "stopped", NAMES, ONLY_JSON, DETECT)
    writer.write("a.png", IMAGE, found(), drawn=IMAGE)
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert len(json.loads((tmp_path / "stopped/predictions.json").read_text())) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is full")
def test_a_disk_that_is_full_at_the_end_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "predictions.json").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot be written \(No space left"), ResultWriter(tmp_path, NAMES, ONLY_JSON, DETECT):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is full")
def test_what_ended_the_run_is_shown_before_a_disk_that_is_full(tmp_path: Path) -> None:
    (tmp_path / "predictions.json").symlink_to("/dev/full")
    writer = ResultWriter(tmp_path, NAMES, ONLY_JSON, DETECT)
    writer._begin_entries()
    with pytest.raises(KeyError), writer:
        raise KeyError
