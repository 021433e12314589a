"""What detect.py can look at."""

import cv2
import numpy as np
import pytest
from PIL import Image

from data.sources.opening import open_source
from utils.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(("b.png", "a.jpg", "über uns.bmp")):
        Image.fromarray(np.full((30, 50 + i, 3), (200, 40, 10), np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.md").write_text("no image")
    return tmp_path


def video(path, frames=7):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5.0, (64, 48))
    for i in range(frames):
        writer.write(np.full((48, 64, 3), (10, 40, 30 * i), np.uint8))
    writer.release()
    return path


def names(source):
    return [f.path.rsplit("/")[-1] for f in source]


def test_image_file_gives_one_frame(folder):
    (frame,) = open_source(folder / "b.png", imgsz=64)
    assert frame.image.shape == (30, 50, 3)
    assert frame.image[0, 0].tolist() == [200, 40, 10]
    assert frame.boxed.image.shape == (64, 64, 3)
    assert (frame.index, frame.total, frame.video) == (0, 1, None)


def test_folder_glob_and_list(folder):
    assert names(open_source(folder, imgsz=64)) == ["a.jpg", "b.png", "über uns.bmp"]
    assert names(open_source(f"{folder}/[ab].*", imgsz=64)) == ["a.jpg", "b.png"]
    (folder / "list.txt").write_text("b.png\n./a.jpg\n")
    source = open_source(folder / "list.txt", imgsz=64)
    assert names(source) == ["b.png", "a.jpg"]
    assert len(source) == 2


def test_letterbox_shapes(folder):
    assert open_source(folder, imgsz=100, stride=32).hw == (128, 128)
    frame = next(iter(open_source(folder / "b.png", imgsz=(64, 128), auto_letterbox=False)))
    assert frame.boxed.image.shape == (64, 128, 3)


def test_video_is_read_with_stride(tmp_path):
    path = video(tmp_path / "ein video.avi")
    frames = list(open_source(path, imgsz=64))
    assert len(frames) == 7
    assert frames[6].image[20, 20, 0] > frames[1].image[20, 20, 0] + 100  # red grows: RGB order
    info = frames[3].video
    assert (info.number, info.width, info.height, info.frames, info.fps) == (3, 64, 48, 7, 5.0)
    third = list(open_source(path, imgsz=64, vid_stride=3))
    assert len(third) == 3
    np.testing.assert_array_equal(third[1].image, frames[3].image)
    assert third[0].video.frames == 3


def test_unreadable_files_are_reported_once_and_skipped(folder):
    (folder / "aa.jpg").write_text("no image")
    (folder / "c.avi").write_text("no video")
    said = []
    assert names(open_source(folder, imgsz=64, on_skip=said.append)) == ["a.jpg", "b.png", "über uns.bmp"]
    assert len(said) == 2
    assert "aa.jpg" in said[0]
    assert "c.avi" in said[1]


def test_source_without_readable_files_is_an_error(tmp_path):
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(UserError, match="nothing readable"):
        list(open_source(tmp_path, imgsz=64, on_skip=lambda line: None))


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("file:///a/b.jpg", "give the path of a file without file://"),
        ("sftp://me:PW@host/a.jpg", "sftp:// is not supported; known are http"),
        ("me:PW@host/a.jpg", r"\*\*\*@host/a.jpg: no such file"),
        ("123456", "no camera has this number"),
        ("nowhere.jpg", "no such file"),
        ("none*.jpg", "matches"),
    ],
)
def test_unsupported_sources_are_refused(source, said):
    with pytest.raises(UserError, match=said) as caught:
        open_source(source, imgsz=64)
    assert "PW" not in str(caught.value)


def test_unsupported_files_are_refused(folder):
    with pytest.raises(UserError, match="neither an image nor a video"):
        open_source(folder / "notes.md", imgsz=64)
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="no image and no video"):
        open_source(folder / "empty", imgsz=64)
    (folder / "list.txt").write_text("a.jpg\nrtsp://me:PW@host/1\n")
    with pytest.raises(UserError, match=r"list.txt, line 2: .* called \*.streams"):
        open_source(folder / "list.txt", imgsz=64)
    (folder / "list.txt").write_text("\n")
    with pytest.raises(UserError, match="list is empty"):
        open_source(folder / "list.txt", imgsz=64)
    with pytest.raises(UserError, match="--vid-stride 0"):
        open_source(folder, imgsz=64, vid_stride=0)


def test_missing_webcam_is_an_error():
    with pytest.raises(UserError, match="webcam93"):
        list(open_source("93", imgsz=64))
