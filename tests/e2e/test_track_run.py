"""``detect.py --track``: numbers of objects on frames and in MOT's files, with a stand-in for the package and with the package itself."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

import detect
from data.sources.frames import Frame
from engine.inference.tracking import Tracking, check_tracking, labelled
from tasks import DETECT, TASKS
from utils.errors import UserError
from utils.types import Detections, Predictions
from utils.visual.draw import colour_of

FRAMES, SIDE = 8, 64


class TwoObjects:
    """One object moves to the right, another downwards; the order of the detections changes with every frame."""

    names, nc, ch, stride, task = ("行人", "car"), 2, 3, 32, DETECT

    def __init__(self) -> None:
        self.frame = 0

    def predict(self, images: Tensor, *, above: float = 0.0) -> Predictions:
        step, self.frame = 2.0 * self.frame, self.frame + 1
        boxes = torch.tensor([[4 + step, 4, 24 + step, 24], [40, 30 + step / 2, 60, 46 + step / 2]])
        scores = torch.tensor([[0.95, 0.0], [0.0, 0.9]])
        order = [0, 1] if self.frame % 2 else [1, 0]
        return Predictions(boxes[order][None], scores[order][None])


class Package:
    """As much of trackers and supervision as is used: objects are confirmed in their second frame, numbered by class."""

    class Detections(SimpleNamespace):
        def __len__(self) -> int:
            return len(self.xyxy)

    class ByteTrackTracker:
        made: ClassVar[list[float]] = []

        def __init__(self, frame_rate: float) -> None:
            self.made.append(frame_rate)
            self.frames = 0

        def update(self, found: Package.Detections) -> Package.Detections:
            self.frames += 1
            numbers = np.where(self.frames > 1, found.class_id, -1)
            order = np.arange(len(found))[::-1]
            return Package.Detections(xyxy=found.xyxy[order], tracker_id=numbers[order], data={"row": found.data["row"][order]})


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> type[Package]:
    monkeypatch.setattr(Package.ByteTrackTracker, "made", [])
    for name in ("trackers", "supervision"):
        monkeypatch.setitem(sys.modules, name, Package)  # type: ignore[arg-type]
    return Package


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    monkeypatch.setattr("engine.inference.detect.load_network", lambda *_: TwoObjects())

    def start(source: Path, *flags: str) -> int:
        common = ["--weights", "x.pt", "--imgsz", str(SIDE), "--device", "cpu", "--project", str(tmp_path / "runs")]
        return detect.main(["--source", str(source), *common, *flags])

    return start


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (SIDE, SIDE))
    if not writer.isOpened():
        pytest.skip("this OpenCV cannot write videos")
    for _ in range(FRAMES):
        writer.write(np.full((SIDE, SIDE, 3), 90, np.uint8))
    writer.release()
    return path


def rows_of(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def check_rows(rows: list[list[str]], first: int) -> None:
    """Every object keeps its number, and the columns are MOT's."""
    assert {int(row[0]) for row in rows} == set(range(first, FRAMES + 1))
    assert all(len(row) == 10 and row[8:] == ["-1", "-1"] for row in rows)
    number_of = {(row[7], row[1]) for row in rows}
    assert len(number_of) == 2
    assert min(int(row[1]) for row in rows) >= 1
    person = [[float(v) for v in row[2:6]] for row in rows if row[7] == "0"]
    assert person[0] == [4 + 2.0 * (first - 1), 4, 20, 20]
    assert len(rows) == 2 * (FRAMES - first + 1)


def test_a_video_gives_numbers_and_mot_rows(run, clip, package, tmp_path, capsys) -> None:
    assert run(clip, "--track") == 0
    check_rows(rows_of(tmp_path / "runs" / "exp" / "tracks" / "clip.csv"), first=2)
    assert package.ByteTrackTracker.made == [10.0]
    assert "1 track files" in capsys.readouterr().out
    assert (tmp_path / "runs" / "exp" / "clip.mp4").is_file()


def test_a_folder_of_images_is_one_sequence(run, package, tmp_path) -> None:
    (tmp_path / "MOT-01").mkdir()
    for number in range(FRAMES):
        cv2.imwrite(str(tmp_path / "MOT-01" / f"{number:06d}.png"), np.full((SIDE, SIDE, 3), 90, np.uint8))
    assert run(tmp_path / "MOT-01", "--track", "--nosave") == 0
    check_rows(rows_of(tmp_path / "runs" / "exp" / "tracks" / "MOT-01.csv"), first=2)
    assert package.ByteTrackTracker.made == [30.0]


def test_an_image_that_cannot_be_read_leaves_a_gap_in_the_frames(run, package, tmp_path) -> None:
    (tmp_path / "MOT-01").mkdir()
    for number in range(FRAMES):
        cv2.imwrite(str(tmp_path / "MOT-01" / f"{number:06d}.png"), np.full((SIDE, SIDE, 3), 90, np.uint8))
    (tmp_path / "MOT-01" / "000002.png").write_bytes(b"nothing")
    assert run(tmp_path / "MOT-01", "--track", "--nosave") == 0
    rows = rows_of(tmp_path / "runs" / "exp" / "tracks" / "MOT-01.csv")
    assert sorted({int(row[0]) for row in rows}) == [n for n in range(2, FRAMES + 1) if n != 3]


def test_oriented_boxes_are_followed_by_the_boxes_about_them(package, tmp_path) -> None:
    frame = Frame("a.jpg", np.zeros((64, 64, 3), np.uint8), None, 0, 1, None)  # type: ignore[arg-type]
    angle = torch.full((1, 1), torch.pi / 2)
    upright = Detections(torch.tensor([[10.0, 20, 50, 30]]), torch.ones(1), torch.zeros(1, dtype=torch.long), {"angle": angle})
    with Tracking("bytetrack", tmp_path, TASKS["obb"]) as tracking:
        for _ in range(2):
            found = tracking.follow(frame, upright, stem="a", number=None, fps=30.0)
    assert torch.equal(found.boxes, upright.boxes)  # what is drawn stays
    (row,) = rows_of(next(tmp_path.glob("*.csv")))
    assert [float(v) for v in row[2:6]] == pytest.approx([25, 5, 10, 40], abs=0.01)


def test_a_classifier_has_no_objects_to_follow() -> None:
    check_tracking(TASKS["classify"], "")
    with pytest.raises(UserError, match="--track: trackers follow objects, and the task 'classify' has one result an image"):
        check_tracking(TASKS["classify"], "sort")


def test_without_the_package_one_line_says_what_to_install(run, clip, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "trackers", None)
    assert run(clip, "--track") == 1
    assert capsys.readouterr().err.splitlines() == ["detect.py: --track: needs the package trackers: pip install trackers"]


def test_a_tracker_that_the_installed_version_lacks_is_named(run, clip, package, capsys) -> None:
    assert run(clip, "--track", "ocsort") == 1
    assert "the installed version of trackers has no OCSORTTracker" in capsys.readouterr().err


def test_objects_have_names_and_colours_of_their_own() -> None:
    found = Detections(torch.zeros(3, 4), torch.ones(3), torch.tensor([1, 1, 0]), {"track": torch.tensor([7, 0, 2])})
    shown, names = labelled(found, ("person", "car"))
    assert [names[key] for key in shown.classes.tolist()] == ["car #7", "car", "person #2"]
    assert colour_of(shown.classes.tolist()[1])
    assert not shown.fields
    assert labelled(found.replace(fields={}), ("person", "car"))[1] == ("person", "car")


@pytest.mark.parametrize("kind", ["bytetrack", "sort", "ocsort"])
def test_the_package_itself_keeps_the_numbers(run, clip, tmp_path, kind) -> None:
    pytest.importorskip("trackers")
    assert run(clip, "--track", kind, "--nosave") == 0
    rows = rows_of(tmp_path / "runs" / "exp" / "tracks" / "clip.csv")
    check_rows(rows, first=min(int(row[0]) for row in rows))
