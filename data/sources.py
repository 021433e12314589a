"""What detect.py looks at: a picture, a folder, a glob, a list, a video or a webcam, as one stream of frames."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from data.augment import Boxed, letterbox
from data.bands import without_stored_arrays
from data.images import CONVERTED, IMAGE_SUFFIXES, ImageError, is_image, read_image
from data.labels import read_list
from data.pixels import as_hwc
from utils.errors import UserError

VIDEO_SUFFIXES = frozenset((".asf", ".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"))
_URL = ("rtsp://", "rtmp://", "rtp://", "udp://", "tcp://", "http://", "https://")


class VideoInfo(NamedTuple):
    """What is known about the video that a frame is from."""

    fps: float  # of the file; 0 where unknown
    width: int  # px
    height: int  # px
    number: int  # of the frame in its video, from 0
    frames: int  # of the whole video at the given stride; 0 where unknown (a webcam)


class Frame(NamedTuple):
    """One picture to look at."""

    path: str  # of the picture or video; ``webcam0`` for a webcam
    image: np.ndarray  # (H, W, C) uint8 or uint16, the original; RGB where C is 3
    boxed: Boxed  # the same, letterboxed for the network
    index: int  # of the file among all, from 0
    total: int  # number of files; 0 for a webcam
    video: VideoInfo | None  # None for a picture


class Source:
    """Iterates over the frames of pictures and videos. Made by ``open_source``.

    Attributes:
        files: The pictures and videos, in order.
        webcam: Number of the camera, or None.
    """

    def __init__(
        self,
        files: tuple[str, ...],
        *,
        webcam: int | None,
        imgsz: int | tuple[int, int],
        stride: int,
        vid_stride: int,
        auto_letterbox: bool,
        report: Callable[[str], None],
        channels: int = 3,
    ) -> None:
        self.files, self.webcam, self.vid_stride, self.report, self.channels = files, webcam, vid_stride, report, channels
        height, width = (imgsz, imgsz) if isinstance(imgsz, int) else imgsz
        self.hw = tuple(math.ceil(side / stride) * stride for side in (height, width))
        self.stride, self.auto = stride, auto_letterbox

    def __len__(self) -> int:
        """Number of files; 0 for a webcam."""
        return len(self.files)

    def __iter__(self) -> Iterator[Frame]:
        """Frames in order. A file that cannot be read is reported once and skipped.

        Raises:
            UserError: Not one could be read.
        """
        if self.webcam is not None:
            yield from self._video(f"webcam{self.webcam}", self.webcam, 0)
            return
        read = 0
        for index, path in enumerate(self.files):
            try:
                for frame in self._file(path, index):
                    read += 1
                    yield frame
            except ImageError as error:
                self.report(f"skipped: {error}")
        if not read:
            raise UserError(f"nothing readable among the {len(self.files)} files of the source, first: {self.files[0]}")

    def _file(self, path: str, index: int) -> Iterator[Frame]:
        if is_video(path):
            yield from self._video(path, path, index)
        else:
            image = read_image(path, channels=self.channels, dtype=None)
            yield Frame(path, image, self._boxed(image), index, len(self.files), None)

    def _video(self, name: str, target: str | int, index: int) -> Iterator[Frame]:
        if self.channels not in CONVERTED:
            raise ImageError(f"{name}: a video has 3 channels, {self.channels} are expected; give pictures")
        capture = cv2.VideoCapture(target)
        try:
            if not capture.isOpened():
                kind = "no such camera, or it is in use" if isinstance(target, int) else "not a video that can be opened"
                raise ImageError(f"{name}: {kind}")
            fps = float(capture.get(cv2.CAP_PROP_FPS))
            count = max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0) if isinstance(target, str) else 0
            number, kept = 0, 0
            while capture.grab():
                if number % self.vid_stride == 0:
                    ok, bgr = capture.retrieve()
                    if not ok:
                        break
                    image = as_hwc(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB if self.channels == 3 else cv2.COLOR_BGR2GRAY))
                    info = VideoInfo(fps, image.shape[1], image.shape[0], kept, math.ceil(count / self.vid_stride))
                    yield Frame(name, image, self._boxed(image), index, len(self.files), info)
                    kept += 1
                number += 1
            if not kept:
                raise ImageError(f"{name}: no frame can be decoded")
        finally:
            capture.release()

    def _boxed(self, image: np.ndarray) -> Boxed:
        return letterbox(image, self.hw, auto=self.auto, stride=self.stride)


def open_source(
    source: str | Path,
    *,
    imgsz: int | tuple[int, int],
    stride: int = 32,
    vid_stride: int = 1,
    auto_letterbox: bool = True,
    report: Callable[[str], None] = print,
    channels: int = 3,
) -> Source:
    """The frames of a source.

    Args:
        source: A picture, a video, a folder of them, a glob, a .txt list of paths, or a webcam's number.
        imgsz: Side, or height and width, of the letterboxed picture in px; rounded up to the stride.
        stride: Of the model in px.
        vid_stride: Of a video, look at one frame in so many.
        auto_letterbox: Pad only to the next multiple of the stride, not to the whole shape.
        report: Takes one line for each file that is skipped.
        channels: Of the pictures; grey (1) and RGB (3) are made of any, other numbers are what the files must hold.

    Raises:
        UserError: Not there, empty, or a kind that is not built yet (streams, screen).
    """
    text = str(source)
    if text.lower().startswith("screen"):
        raise UserError(f"--source {text}: reading the screen is not built yet; give a file, folder, glob, list, video or webcam number")
    if text.lower().startswith(_URL) or text.lower().endswith(".streams"):
        raise UserError(f"--source {text}: streams and URLs are not built yet; save it to a file, or give a webcam number")
    if vid_stride < 1:
        raise UserError(f"--vid-stride {vid_stride}: a number of at least 1 is expected")
    webcam = int(text) if text.isdecimal() and not Path(text).exists() else None
    files = () if webcam is not None else tuple(_files(text))
    return Source(
        files, webcam=webcam, imgsz=imgsz, stride=stride, vid_stride=vid_stride, auto_letterbox=auto_letterbox, report=report,
        channels=channels,
    )  # fmt: skip


def is_video(path: str | Path) -> bool:
    """Whether the file name looks like a video's."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def _files(source: str) -> list[str]:
    path = Path(source).expanduser()
    if path.is_dir():
        found = without_stored_arrays(sorted(str(p) for p in path.iterdir() if is_image(p) or is_video(p)))
        if not found:
            raise UserError(f"--source {source}: no picture and no video in this folder (its sub-folders are reached by '{source}/**/*')")
        return found
    if path.is_file():
        return _listed(path) if path.suffix.lower() == ".txt" else _single(path)
    if glob.has_magic(source):
        matching = sorted(glob.glob(os.path.expanduser(source), recursive=True))
        found = without_stored_arrays(f for f in matching if is_image(f) or is_video(f))
        if found:
            return found
        raise UserError(f"--source {source}: no picture and no video matches")
    raise UserError(f"--source {source}: no such file or folder")


def _listed(path: Path) -> list[str]:
    entries = read_list(path)
    if not entries:
        raise UserError(f"--source {path}: the list is empty, one path a line is expected")
    return entries


def _single(path: Path) -> list[str]:
    if is_image(path) or is_video(path):
        return [str(path)]
    known = " ".join(sorted(s.lstrip(".") for s in IMAGE_SUFFIXES | VIDEO_SUFFIXES))
    raise UserError(f"--source {path}: neither a picture nor a video by its name; known suffixes: {known}")
