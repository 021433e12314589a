"""Label files: what is read, what is refused and how it is said; and the cache."""

import os

import numpy as np
import pytest
from PIL import Image

from data.labels import cache as label_cache
from data.labels.cache import cache_path, cached_labels, content_key, load, save
from data.labels.checks import check_classes, summarise
from data.labels.files import label_path, list_images
from data.labels.table import build_table
from data.labels.yolo import parse_labels, read_labels
from utils.errors import UserError
from utils.instances import Instances, clipped_polygon_boxes, concatenate


def parse(text):
    return parse_labels(text, "labels/a.txt", (50, 100))


def make_set(root, labels):
    """Images 100 x 50 px with the label texts given (None: no file); returns their paths."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "labels").mkdir(exist_ok=True)
    files = []
    for i, text in enumerate(labels):
        path = root / "images" / f"{i}.jpg"
        Image.fromarray(np.full((50, 100, 3), 9 * i, np.uint8)).save(path)
        if text is not None:
            (root / "labels" / f"{i}.txt").write_text(text)
        files.append(str(path))
    return files


def test_boxes_and_polygons_in_one_file():
    labels = parse("1 0.5 0.5 0.2 0.4\n\n2 0.1 0.1 0.3 0.1 0.3 0.5 0.1 0.5\n")
    assert not labels.problems
    assert labels.classes.tolist() == [1, 2]
    np.testing.assert_allclose(labels.boxes_cxcywh, [[0.5, 0.5, 0.2, 0.4], [0.2, 0.3, 0.2, 0.4]], atol=1e-6)
    assert labels.counts.tolist() == [0, 4]
    assert labels.rows.tolist() == [1, 3]


def test_empty_file_is_a_background_image():
    labels = parse("")
    assert labels.hw == (50, 100)
    assert labels.boxes_cxcywh.shape == (0, 4)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("0 0.5 0.5 0.2", "4 columns"),
        ("0 0.5 0.5 0.2 0.2 0.9", "6 columns"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "8 columns"),
        ("cat 0.5 0.5 0.2 0.2", "not a number"),
        ("0 0.5 nan 0.2 0.2", "NaN"),
        ("0 0.5 0.5 inf 0.2", "infinity"),
        ("-1 0.5 0.5 0.2 0.2", "class -1"),
        ("1.5 0.5 0.5 0.2 0.2", "class 1.5"),
        ("0 -0.1 0.5 0.2 0.2", "coordinate -0.1 in column 2"),
        ("0 0.5 0.5 0.2 1.01", "coordinate 1.01 in column 5"),
        ("0 320 200 50 50", "normalised to 0-1"),
    ],
)
def test_faulty_row_drops_the_image_and_is_named(row, said):
    labels = parse("0 0.5 0.5 0.1 0.1\n" + row + "\n")
    assert len(labels.problems) == 1
    assert labels.hw == (0, 0)
    assert len(labels.classes) == 0
    text = str(labels.problems[0])
    assert text.startswith("labels/a.txt:2: ")
    assert said in text
    assert "\n" not in text


def test_rounding_just_outside_is_clipped():
    labels = parse("0 1.0000001 0.5 0.2 0.2\n")
    assert not labels.problems
    assert labels.boxes_cxcywh[0, 0] == 1


def test_duplicates_and_boxes_without_area_are_dropped():
    labels = parse("0 0.5 0.5 0.1 0.1\n1 0.5 0.5 0.1 0.1\n0 0.5 0.5 0.1 0.1\n0 0.5 0.5 0 0.1\n")
    assert labels.classes.tolist() == [0, 1]
    assert labels.hw == (50, 100)
    assert sorted(p.row for p in labels.problems) == [3, 4]
    assert not any(p.skips for p in labels.problems)


def test_dropping_duplicates_keeps_the_polygons_aligned():
    triangle, square = "0 0.1 0.1 0.3 0.1 0.3 0.5", "1 0.6 0.6 0.8 0.6 0.8 0.8 0.6 0.8"
    labels = parse(f"{triangle}\n{triangle}\n{square}\n")
    assert labels.counts.tolist() == [3, 4]
    np.testing.assert_allclose(labels.points[3:].min(0), [0.6, 0.6], atol=1e-6)


def test_label_path_takes_the_last_images_folder():
    assert label_path("/a/images/b/images/c/d.e.jpg") == "/a/images/b/labels/c/d.e.txt"
    assert label_path("/a/photos/x.png") == "/a/photos/x.txt"


def test_images_are_listed_with_sub_folders_and_without_other_files(tmp_path):
    for name in ("b.JPG", "sub/a.png", "notes.txt", "c.npy", "._b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [os.path.relpath(f, tmp_path) for f in list_images([tmp_path])] == ["b.JPG", os.path.join("sub", "a.png")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in"):
        list_images([tmp_path / "empty"])


def test_bad_images_are_skipped_and_reported_once(tmp_path):
    files = make_set(tmp_path, ["0 0.5 0.5 0.1 0.1"] * 4)
    with open(files[1], "rb") as f:
        whole = f.read()
    with open(files[1], "wb") as f:
        f.write(whole[: len(whole) // 2])
    with open(files[2], "w") as f:
        f.write("no image")
    with open(files[3], "wb"):
        pass
    table = read_labels(files, progress=False)
    assert (table.shapes_hw[:, 0] > 0).tolist() == [True, False, False, False]
    assert len(table.problems) == 3
    text = summarise(table)
    assert "1 images, 1 objects" in text
    assert "3 images left out" in text
    for bad in files[1:]:
        assert text.count(bad) == 1


def test_parallel_reading_by_processes_gives_the_same(tmp_path, monkeypatch):
    files = make_set(tmp_path, ["0 0.5 0.5 0.1 0.1", None, "1 0.2 0.2 0.1 0.1\n0 0.7 0.7 0.1 0.1", "0 x 0 0 0"])
    one = read_labels(files, workers=1, progress=False)
    monkeypatch.setattr("data.labels.probing.PROCESSES_FROM", 2)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    two = read_labels(files, workers=2, progress=False)
    for name in label_cache.ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert one.problems == two.problems
    assert len(one.problems) == 1


def test_class_without_a_name_stops_and_says_where(tmp_path):
    files = make_set(tmp_path, ["0 0.5 0.5 0.1 0.1", "1 0.2 0.2 0.1 0.1\n7 0.7 0.7 0.1 0.1"])
    table = read_labels(files, progress=False)
    check_classes(table, files, [str(i) for i in range(8)], tmp_path / "d.yaml")
    with pytest.raises(UserError) as error:
        check_classes(table, files, ("a", "b"), tmp_path / "d.yaml")
    assert "1.txt:2: class 7" in str(error.value)
    assert "2 classes" in str(error.value)


def test_table_returns_the_labels_of_each_image(tmp_path):
    table = build_table([parse("1 0.5 0.5 0.2 0.4"), parse(""), parse("2 0.1 0.1 0.3 0.1 0.3 0.5\n0 0.9 0.9 0.1 0.1")])
    assert table.starts.tolist() == [0, 1, 1, 3]
    instances = table.instances(2, hw=(50, 100))
    np.testing.assert_allclose(instances.boxes_xyxy, [[10, 5, 30, 25], [85, 42.5, 95, 47.5]], atol=1e-4)
    assert instances.counts.tolist() == [3, 0]
    np.testing.assert_allclose(instances.points, [[10, 5], [30, 5], [30, 25]], atol=1e-4)
    assert table.instances(1, hw=(50, 100)).boxes_xyxy.shape == (0, 4)
    kept = table.select(np.array([False, False, True]))
    assert kept.starts.tolist() == [0, 2]
    np.testing.assert_array_equal(kept.array(0), table.array(2))
    np.testing.assert_array_equal(kept.instances(0, hw=(9, 9)).points, table.instances(2, hw=(9, 9)).points)


class TestCache:
    @pytest.fixture
    def files(self, tmp_path):
        return make_set(tmp_path, ["0 0.5 0.5 0.1 0.1", "1 0.1 0.1 0.3 0.1 0.3 0.5", "0 bad 0 0 0"])

    @pytest.fixture
    def reads(self):
        """One entry for every time that labels are really read."""
        return []

    def get(self, tmp_path, files, reads=None):
        path = cache_path(files[0], tmp_path / "images")

        def read():
            if reads is not None:
                reads.append(1)
            return read_labels(files, progress=False)

        return cached_labels(path, content_key(files), read)

    def test_second_read_uses_the_cache(self, tmp_path, files, reads):
        first, remark = self.get(tmp_path, files, reads)
        second, _ = self.get(tmp_path, files, reads)
        assert len(reads) == 1
        assert remark == ""
        assert first.problems == second.problems
        assert len(first.problems) == 1
        for name in label_cache.ARRAYS:
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
        assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["labels.cache.npz"]

    def test_changed_label_invalidates_the_cache(self, tmp_path, files, reads):
        self.get(tmp_path, files, reads)
        (tmp_path / "labels/0.txt").write_text("1 0.5 0.5 0.1 0.1")  # same size
        os.utime(tmp_path / "labels/0.txt", ns=(1, 1))
        table, _ = self.get(tmp_path, files, reads)
        assert len(reads) == 2
        assert table.classes[0] == 1

    def test_added_and_removed_labels_invalidate_the_cache(self, tmp_path, files):
        key = content_key(files)
        (tmp_path / "labels/0.txt").unlink()
        assert content_key(files) != key
        assert content_key(files[:2]) != content_key(files)

    @pytest.mark.parametrize("damage", ["torn", "empty", "foreign", "pickle"])
    def test_a_damaged_cache_is_rebuilt(self, tmp_path, files, reads, damage):
        self.get(tmp_path, files, reads)
        path = tmp_path / "labels.cache.npz"
        if damage == "torn":
            path.write_bytes(path.read_bytes()[:-200])
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "foreign":
            np.savez(path, other=np.zeros(3))
        else:
            np.savez(path, key=np.array([{"a": 1}], dtype=object))
        table, _ = self.get(tmp_path, files, reads)
        assert len(reads) == 2
        assert len(table) == 3
        assert load(path, content_key(files)) is not None

    def test_unwritable_folder_gives_one_warning(self, tmp_path, files, monkeypatch):
        def refuse(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("data.labels.cache.atomic_write", refuse)
        table, remark = self.get(tmp_path, files)
        assert len(table) == 3
        assert "not cached" in remark
        assert "\n" not in remark

    def test_failed_write_keeps_the_old_file_and_no_temporary_one(self, tmp_path, files, monkeypatch):
        table, _ = self.get(tmp_path, files)
        path = tmp_path / "labels.cache.npz"
        before = path.read_bytes()

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("numpy.savez", full)
        with pytest.raises(OSError, match="No space"):
            save(path, "k", table)
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["labels.cache.npz"]


class TestPolygonBoxes:
    HW = (50, 100)

    @pytest.mark.parametrize(
        ("polygon", "box"),
        [
            ([(10, 10), (30, 10), (20, 40)], (10, 10, 30, 40)),  # inside
            ([(-10, 10), (20, 10), (20, 30), (-10, 30)], (0, 10, 20, 30)),  # over one border
            ([(-100, -100), (300, -100), (300, 300), (-100, 300)], (0, 0, 100, 50)),  # covers everything
            ([(60, -20), (200, -20), (200, 90), (60, 90)], (60, 0, 100, 50)),  # its outline inside is one line
            ([(-20, 20), (20, -20), (-20, -20)], (0, 0, 0, 0)),  # touches the corner only
            ([(-20, 30), (30, -20), (-20, -20)], (0, 0, 10, 10)),  # cut off corner
            ([(200, 200), (220, 200), (210, 220)], (0, 0, 0, 0)),  # outside
        ],
    )
    def test_clipped_polygons_give_tight_boxes(self, polygon, box):
        points = np.array(polygon, np.float32)
        np.testing.assert_allclose(clipped_polygon_boxes(points, np.array([len(points)]), self.HW), [box], atol=1e-4)

    def test_batched_clipping_equals_single_clipping(self):
        rng = np.random.default_rng(0)
        counts = rng.integers(3, 9, 20)
        points = rng.uniform(-60, 150, (counts.sum(), 2)).astype(np.float32)
        together = clipped_polygon_boxes(points, counts, self.HW)
        alone = [clipped_polygon_boxes(p, np.array([len(p)]), self.HW)[0] for p in np.split(points, np.cumsum(counts)[:-1])]
        np.testing.assert_array_equal(together, alone)
        assert (together[:, 2:] >= together[:, :2]).all()

    def test_clipped_boxes_match_drawn_masks(self):
        import cv2

        rng = np.random.default_rng(1)
        for _ in range(20):
            angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
            points = (rng.uniform(0, (100, 50)) + np.stack((np.cos(angles), np.sin(angles)), 1) * 40).astype(np.float32)
            mask = np.zeros(self.HW, np.uint8)
            cv2.fillPoly(mask, [np.round(points).astype(np.int32)], 1)
            y, x = np.nonzero(mask)
            box = clipped_polygon_boxes(points, np.array([7]), self.HW)[0]
            np.testing.assert_allclose(box, (x.min(), y.min(), x.max(), y.max()), atol=2)

    def test_no_polygon_gives_no_box(self):
        assert clipped_polygon_boxes(np.zeros((0, 2), np.float32), np.zeros(0, np.int64), self.HW).shape == (0, 4)


def test_empty_instances_are_supported():
    none = Instances.empty()
    for result in (none.shifted(1, 2), none.scaled(2, 3), none.mirrored(9), concatenate([none, none]), concatenate([])):
        assert result.boxes_xyxy.shape == (0, 4)
    assert none.select(np.zeros(0, bool)).points.shape == (0, 2)
    assert none.polygons() == []
