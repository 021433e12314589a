"""Keypoints from label rows of a task of one's own: into the table, the cache and the samples of a batch; absent ones stay absent."""

import types

import numpy as np
import pytest
from PIL import Image

from data.dataset import ImageDataset, ImageOptions, SampleKey
from data.dataset_spec import load_dataset_spec
from data.labels import cache as label_cache
from data.labels.cache import load, save
from data.labels.source import split_labels
from data.labels.table import build_table
from data.labels.yolo import parse_labels, read_labels
from data.loader import LoaderOptions, build_loader
from tasks import DETECT
from tasks.base import TaskDefaults
from tasks.rows import NO_POLYGON, InvalidRow, LabelRow
from utils.errors import UserError

KEYS = "hsv_h hsv_s hsv_v degrees translate scale shear perspective flipud fliplr mosaic mixup copy_paste"
OFF = dict.fromkeys(KEYS.split(), 0.0)
ROW = "0 0.5 0.5 0.4 0.4 0.4 0.5 2 0.6 0.5 1"


class TwoPoints(TaskDefaults):
    """Rows ``class cx cy w h (x y visibility) * 2``; targets with keypoints in px."""

    name = "two-points"

    def parse_row(self, values, /):
        if len(values) != 11:
            return InvalidRow(f"{len(values)} columns, 11 are expected", "wrong columns")
        numbers = np.array(values, np.float64)
        return LabelRow(int(numbers[0]), numbers[1:5], NO_POLYGON, numbers[5:].reshape(2, 3))

    def targets(self, instances, hw, /):
        return {**DETECT.targets(instances, hw), "keypoints": instances.keypoints}


TASK = TwoPoints()


def make_set(root, rows, extra=""):
    (root / "images").mkdir()
    (root / "labels").mkdir()
    for i, text in enumerate(rows):
        Image.fromarray(np.full((50, 100, 3), 9 * i, np.uint8)).save(root / "images" / f"{i}.png")
        (root / "labels" / f"{i}.txt").write_text(text)
    (root / "set.yaml").write_text(f"train: images\nval: images\nnames: [a]\n{extra}")
    return load_dataset_spec(root / "set.yaml"), [str(root / "images" / f"{i}.png") for i in range(len(rows))]


def test_keypoints_round_trip_through_rows_table_and_cache(tmp_path):
    spec, files = make_set(tmp_path, [ROW, "", f"{ROW}\n{ROW.replace('0.5 0.5 0.4', '0.5 0.4 0.4')}"])
    read, _ = split_labels(spec, "train", files, task=TASK, progress=False)
    cached, _ = split_labels(spec, "train", files, task=TASK, progress=False)
    for table in (read, cached):
        assert table.keypoints.shape == (3, 2, 3)
        np.testing.assert_allclose(table.instances(0, hw=(50, 100)).keypoints[0], [[40, 25, 2], [60, 25, 1]], atol=1e-4)
        assert table.instances(1, hw=(50, 100)).keypoints.shape == (0, 2, 3)
        assert table.select(np.array([False, False, True])).keypoints.shape == (2, 2, 3)
        assert table.mark_unusable(np.array([False, False, True]), ()).keypoints.shape == (1, 2, 3)


def test_cache_of_another_task_is_not_used(tmp_path):
    spec, files = make_set(tmp_path, [ROW])
    assert not split_labels(spec, "train", files, progress=False)[0].usable.any()  # 11 columns: a polygon with points outside 0-1
    assert split_labels(spec, "train", files, task=TASK, progress=False)[0].usable.all()


def test_absent_keypoints_stay_absent(tmp_path):
    _, files = make_set(tmp_path, ["0 0.5 0.5 0.4 0.4", ""])
    table = read_labels(files, progress=False)
    save(tmp_path / "c.npz", "key", table)
    again = load(tmp_path / "c.npz", "key")
    assert table.keypoints is again.keypoints is None
    assert again.instances(0, hw=(5, 5)).keypoints is None
    with np.load(tmp_path / "c.npz") as stored:
        assert "keypoints" not in stored


def test_cache_of_an_older_format_is_rebuilt(tmp_path, monkeypatch):
    spec, files = make_set(tmp_path, ["0 0.5 0.5 0.4 0.4"])
    monkeypatch.setattr(label_cache, "FORMAT_VERSION", 2)
    split_labels(spec, "train", files, progress=False)
    old = (tmp_path / "labels.cache.npz").read_bytes()
    monkeypatch.undo()
    split_labels(spec, "train", files, progress=False)
    assert (tmp_path / "labels.cache.npz").read_bytes() != old


def test_keypoints_of_only_some_images_are_refused():
    with_points = parse_labels(ROW, "a.txt", (50, 100), parse_row=TASK.parse_row)
    without = parse_labels("0 0.5 0.5 0.4 0.4", "b.txt", (50, 100))
    with pytest.raises(ValueError, match="keypoints"):
        build_table([with_points, without])


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_samples_carry_keypoints_and_flips_swap_them(tmp_path, mosaic):
    spec, files = make_set(tmp_path, [ROW] * 4, "flip_idx: [1, 0]\n")
    table, _ = split_labels(spec, "train", files, task=TASK, progress=False)
    hyp = types.SimpleNamespace(**{**OFF, "fliplr": 1.0, "mosaic": mosaic})
    samples = {}
    for flip_idx in (None, spec.flip_idx):
        options = ImageOptions(imgsz=96, hyp=hyp, augment=True, flip_idx=flip_idx)
        dataset = ImageDataset(files, table, options, task=TASK)
        samples[flip_idx] = dataset[SampleKey(0, 0, (96, 96), True)].targets["keypoints"]
    assert samples[None].shape[1:] == (2, 3)
    assert len(samples[None])
    np.testing.assert_array_equal(samples[None][:, ::-1], samples[spec.flip_idx])


def test_replacement_image_keeps_the_number_of_keypoints(tmp_path):
    spec, files = make_set(tmp_path, [ROW] * 4)
    loader = build_loader(
        spec, "train", LoaderOptions(imgsz=64, batch_size=4, hyp=types.SimpleNamespace(**OFF), augment=False, workers=0), task=TASK
    )  # fmt: skip
    (tmp_path / "images" / "1.png").write_text("no image")
    sample = loader.dataset[SampleKey(1, 0, (64, 64), False)]
    assert sample.targets["keypoints"].shape == (0, 2, 3)
    assert len(files) == len(loader.dataset)


@pytest.mark.parametrize("given", ["[0, 0]", "[1, 2, 0]", "3", "[1, -2]", "[]", "[true, false]"])
def test_flip_idx_must_pair_keypoints(tmp_path, given):
    with pytest.raises(UserError, match="flip_idx"):
        make_set(tmp_path, [""], f"flip_idx: {given}\n")


def test_detection_rows_match_hand_computed_ones():
    row = DETECT.parse_row(["2", "0.1", "0.1", "0.3", "0.1", "0.3", "0.5"])
    assert row.class_index == 2
    np.testing.assert_allclose(row.box_cxcywh, [0.2, 0.3, 0.2, 0.4])
    assert row.keypoints is None
    dropped = DETECT.parse_row(["0", "0.5", "0.5", "0", "0.1"])
    assert dropped == InvalidRow("a box without area, dropped", "no area", False)
