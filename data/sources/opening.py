"""What detect.py looks at: an image, a folder, a glob, a list or a video; and, elsewhere, streams, webcams and the screen."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import cv2
import numpy as np

from data.images.bands import without_stored_arrays
from data.images.reading import IMAGE_SUFFIXES, ImageError, is_image, read_image
from data.labels.files import read_list
from data.sources.frames import VIDEO_SUFFIXES, Frame, FrameSource, VideoInfo
from data.sources.screen import ScreenSource, is_screen
from data.sources.streams import LIST_SUFFIX, StreamSource, listed_streams, stream_of
from data.sources.urls import is_url, read_remote_image, redacted
from utils.errors import UserError


class Source(FrameSource):
    """The frames of images and videos, one after another. Made by ``open_source``.

    Attributes:
        files: The images and videos, in order; an image may be a URL.
    """

    def __init__(self, files: tuple[str, ...], **settings: Any) -> None:
        """
        Args:
            files: At least one.
            settings: As ``FrameSource`` takes them.
        """
        super().__init__(**settings)
        self.files = files

    def __len__(self) -> int:
        """Number of files."""
        return len(self.files)

    def batches(self) -> Generator[Sequence[Frame], None, None]:
        """Frames in order, one at a time. A file that cannot be read is reported once and skipped.

        Raises:
            UserError: Not one could be read.
        """
        read = 0
        for index, path in enumerate(self.files):
            try:
                for frame in self._file(path, index):
                    read += 1
                    yield [frame]
            except ImageError as error:
                self.report(f"skipped: {error}")
        if not read:
            raise UserError(f"nothing readable among the {len(self.files)} files of the source, first: {redacted(self.files[0])}")

    def _file(self, path: str, index: int) -> Iterator[Frame]:
        if is_video(path):
            yield from self._video(path, index)
        elif is_url(path):
            shown = redacted(path)
            yield self._image(shown, read_remote_image(path, channels=self.channels), index)._replace(name=Path(unquote(shown)).name)
        else:
            yield self._image(path, read_image(path, channels=self.channels, dtype=None), index)

    def _image(self, path: str, image: np.ndarray, index: int) -> Frame:
        return Frame(path, image, self.boxed(image), index, len(self.files), None)

    def _video(self, path: str, index: int) -> Iterator[Frame]:
        self.check_channels(path)
        capture = cv2.VideoCapture(path)
        try:
            if not capture.isOpened():
                raise ImageError(f"{path}: not a video that can be opened")
            fps = float(capture.get(cv2.CAP_PROP_FPS))
            count = max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
            number, kept = 0, 0
            while capture.grab():
                if number % self.vid_stride == 0:
                    ok, bgr = capture.retrieve()
                    if not ok:
                        break
                    image = self.from_bgr(bgr)
                    info = VideoInfo(fps, image.shape[1], image.shape[0], kept, math.ceil(count / self.vid_stride))
                    yield Frame(path, image, self.boxed(image), index, len(self.files), info)
                    kept += 1
                number += 1
            if not kept:
                raise ImageError(f"{path}: no frame can be decoded")
        finally:
            capture.release()


def open_source(
    source: str | Path,
    *,
    imgsz: int | tuple[int, int],
    stride: int = 32,
    vid_stride: int = 1,
    auto_letterbox: bool = True,
    report: Callable[[str], None] = print,
    channels: int = 3,
) -> FrameSource:
    """The frames of a source.

    Args:
        source: An image, a video, a folder of them, a glob, a .txt list of paths, a URL, a .streams list, a webcam's number, the screen.
        imgsz: Side, or height and width, of the letterboxed image in px; rounded up to the stride.
        stride: Of the model in px.
        vid_stride: Of a video or stream, look at one frame in so many.
        auto_letterbox: Pad only to the next multiple of the stride, not to the whole shape.
        report: Takes one line for each file or stream that is skipped.
        channels: Of the images; grey (1) and RGB (3) are made of any, other numbers are what the files must hold.

    Raises:
        UserError: Not there, empty, or of a kind that is not read.
    """
    text = str(source)
    if vid_stride < 1:
        raise UserError(f"--vid-stride {vid_stride}: a number of at least 1 is expected")
    settings: dict[str, Any] = {"imgsz": imgsz, "stride": stride, "vid_stride": vid_stride, "report": report, "channels": channels}
    settings["auto_letterbox"] = auto_letterbox
    if is_url(text):
        if text.lower().startswith("http") and is_image(redacted(text)):
            return Source((text,), **settings)
        return StreamSource([stream_of(text, whole=True)], **settings)
    path = Path(text).expanduser()
    if path.suffix.lower() == LIST_SUFFIX and path.is_file():
        return StreamSource(listed_streams(path), **settings)
    if is_screen(text) and not path.exists():
        return ScreenSource(text, **settings)
    if text.isdecimal() and not path.exists():
        return StreamSource([stream_of(text)], **settings)
    return Source(tuple(_files(text)), **settings)


def is_video(path: str | Path) -> bool:
    """Whether the file name looks like a video's."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def _files(source: str) -> list[str]:
    path = Path(source).expanduser()
    if path.is_dir():
        found = without_stored_arrays(sorted(str(p) for p in path.iterdir() if is_image(p) or is_video(p)))
        if not found:
            raise UserError(f"--source {source}: no image and no video in this folder (its sub-folders are reached by '{source}/**/*')")
        return found
    if path.is_file():
        return _listed(path) if path.suffix.lower() == ".txt" else _single(path)
    if glob.has_magic(source):
        matching = sorted(glob.glob(os.path.expanduser(source), recursive=True))
        found = without_stored_arrays(f for f in matching if is_image(f) or is_video(f))
        if found:
            return found
        raise UserError(f"--source {source}: no image and no video matches")
    raise UserError(f"--source {redacted(source) if ':' in source else source}: no such file or folder")  # a URL, but for its scheme


def _listed(path: Path) -> list[str]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines(), 1):
        if is_url(line.strip()):
            raise UserError(f"--source {path}, line {number}: a URL in a list of files; a list of streams is called *{LIST_SUFFIX}")
    entries = read_list(path)
    if not entries:
        raise UserError(f"--source {path}: the list is empty, one path a line is expected")
    return entries


def _single(path: Path) -> list[str]:
    if is_image(path) or is_video(path):
        return [str(path)]
    known = " ".join(sorted(s.lstrip(".") for s in IMAGE_SUFFIXES | VIDEO_SUFFIXES))
    raise UserError(f"--source {path}: neither an image nor a video by its name; known suffixes: {known}")
