"""Images and videos from files, folders, globs, lists and single URLs, one after another."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import cv2
import numpy as np

from data.images.bands import without_stored_arrays
from data.images.reading import IMAGE_SUFFIXES, ImageError, is_image, read_image
from data.labels.lists import list_lines, read_list
from data.sources.frames import STREAM_LIST_SUFFIX, VIDEO_SUFFIXES, Frame, FrameSource, VideoInfo
from data.sources.globs import match_files
from data.sources.urls import is_url, read_remote_image, redacted
from utils.errors import UserError


class FileSource(FrameSource):
    """The frames of images and videos, one after another.

    Attributes:
        files: the images and videos, in order; an image may be a URL.
    """

    def __init__(self, files: tuple[str, ...], **settings: Any) -> None:
        """
        Args:
            files: at least one.
            settings: as ``FrameSource`` takes them.
        """
        super().__init__(**settings)
        self.files = files

    def __len__(self) -> int:
        """Number of files."""
        return len(self.files)

    def batches(self) -> Generator[Sequence[Frame], None, None]:
        """Frames in order, one at a time. A file that cannot be read is reported once and skipped.

        Raises:
            UserError: none could be read.
        """
        read = 0
        for index, path in enumerate(self.files):
            try:
                for frame in self._file(path, index):
                    read += 1
                    yield [frame]
            except ImageError as error:
                self.on_skip(f"skipped: {error}")
        if not read:
            raise UserError(f"nothing readable among the {len(self.files)} files of the source, first: {redacted(self.files[0])}")

    def _file(self, path: str, index: int) -> Iterator[Frame]:
        if is_video(path):
            yield from self._video(path, index)
        elif is_url(path):
            shown = redacted(path)
            yield self._image(shown, read_remote_image(path, channels=self.channels), index, name=Path(unquote(shown)).name)
        else:
            yield self._image(path, read_image(path, channels=self.channels, dtype=None), index)

    def _image(self, path: str, image: np.ndarray, index: int, *, name: str = "") -> Frame:
        return Frame(path, image, self.boxed(image), index, len(self.files), None, name)

    def _video(self, path: str, index: int) -> Iterator[Frame]:
        self.check_channels(path)
        if not os.path.isfile(path):  # a pipe would block
            raise ImageError(f"{path}: {'not a file' if os.path.exists(path) else 'no such file'}")
        capture = cv2.VideoCapture(path)
        try:
            if not capture.isOpened():
                raise ImageError(f"{path}: not a video that can be opened")
            fps = float(capture.get(cv2.CAP_PROP_FPS))
            count = max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
            number, yielded = 0, 0
            while capture.grab():
                if number % self.vid_stride == 0:
                    ok, bgr = capture.retrieve()
                    if not ok:
                        break
                    image = self.from_bgr(bgr)
                    info = VideoInfo(fps, image.shape[1], image.shape[0], yielded, math.ceil(count / self.vid_stride))
                    yield Frame(path, image, self.boxed(image), index, len(self.files), info)
                    yielded += 1
                number += 1
            if not yielded:
                raise ImageError(f"{path}: no frame can be decoded")
        finally:
            capture.release()


def is_video(path: str | Path) -> bool:
    """Whether a file has a video's suffix."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def find_files(source: str) -> list[str]:
    """The images and videos of a file, folder, glob or list.

    Raises:
        UserError: there are none.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = without_stored_arrays(sorted(str(p) for p in path.iterdir() if is_image(p) or is_video(p)))
        if not found:
            raise UserError(f"--source {source}: no image and no video in this folder (its sub-folders are reached by '{source}/**/*')")
        return found
    if path.is_file():
        return _read_files_list(path) if path.suffix.lower() == ".txt" else _check_file(path)
    if glob.has_magic(source):
        matching = match_files(os.path.expanduser(source))
        found = without_stored_arrays(f for f in matching if is_image(f) or is_video(f))
        if found:
            return found
        raise UserError(f"--source {source}: no image and no video matches")
    raise UserError(f"--source {redacted(source) if ':' in source else source}: no such file or folder")  # perhaps a URL without its scheme


def _read_files_list(path: Path) -> list[str]:
    for number, line in enumerate(list_lines(path), 1):
        if is_url(line):
            raise UserError(f"--source {path}, line {number}: a URL in a list of files; a list of streams is called *{STREAM_LIST_SUFFIX}")
    entries = read_list(path)
    if not entries:
        raise UserError(f"--source {path}: the list is empty, one path a line is expected")
    return entries


def _check_file(path: Path) -> list[str]:
    if is_image(path) or is_video(path):
        return [str(path)]
    known = " ".join(sorted(s.lstrip(".") for s in IMAGE_SUFFIXES | VIDEO_SUFFIXES))
    raise UserError(f"--source {path}: neither an image nor a video by its name; known suffixes: {known}")
