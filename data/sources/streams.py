"""Cameras and streams, one or many at once: a thread for each keeps its newest frame, and all newest frames are looked at together."""

from __future__ import annotations

import atexit
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data.images.reading import is_image
from data.sources.frames import VIDEO_SUFFIXES, Frame, FrameSource, VideoInfo
from data.sources.stream_reader import NewestFrame, Reader, ReconnectPolicy, Stream, quiet_opencv
from data.sources.urls import is_url, plain_name, redacted
from utils.errors import UserError

LIST_SUFFIX = ".streams"
SCHEMES = ("http", "https", "rtmp", "rtmps", "rtp", "rtsp", "rtsps", "tcp", "udp")
MOST_CAMERAS = 1000  # a larger number is a mistake
STOP_S = 1.0  # that a stop waits for readers; one that hangs in the network ends by itself at its time-out


class StreamSource(FrameSource):
    """Frames of streams: those that have a new one since the last look, of each the newest.

    Memory holds one frame of each stream besides those that are looked at, however slow the network is.
    """

    def __init__(
        self, streams: Sequence[Stream], *, patience: ReconnectPolicy | None = None, note: Callable[[str], None] = print, **settings: Any
    ) -> None:
        """
        Args:
            streams: At least one.
            patience: Time-outs and tries.
            note: Takes one line for whatever happens to a stream that was read.
            settings: As ``FrameSource`` takes them.
        """
        super().__init__(**settings)
        names = _distinct([stream.name for stream in streams])
        self.streams = tuple(stream._replace(name=name) for stream, name in zip(streams, names))
        self.at_once, self.patience, self.note = len(streams), patience or ReconnectPolicy(), note
        for stream in streams:
            self.check_channels(stream.shown)

    def __len__(self) -> int:
        """Number of streams."""
        return len(self.streams)

    def batches(self) -> Generator[Sequence[Frame], None, None]:
        """Groups of newest frames; when all streams have ended, the last ones.

        Raises:
            UserError: Not one could be opened.
        """
        changed, stop = threading.Condition(), threading.Event()
        readers = [Reader(stream, self.vid_stride, self.patience, changed, stop) for stream in self.streams]
        at_exit = partial(_stop, readers, changed, stop, wait_s=None)
        atexit.register(at_exit)  # Python must not end while one of them is in OpenCV
        with quiet_opencv():
            try:
                for reader in readers:
                    reader.start()
                yield from self._newest(readers, changed)
            finally:
                if _stop(readers, changed, stop, wait_s=STOP_S):
                    atexit.unregister(at_exit)
        if not any(reader.taken for reader in readers):
            reason = readers[0].failure
            raise UserError(reason if len(readers) == 1 else f"none of the {len(readers)} streams can be read, first: {reason}")

    def _newest(self, readers: Sequence[Reader], changed: threading.Condition) -> Iterator[list[Frame]]:
        over = False
        while not over:
            with changed:
                while not (over := all(r.ended for r in readers)) and not any(r.has_news for r in readers):
                    changed.wait(0.5)  # with an end, so that Ctrl-C is heard on every system
                taken = [(index, reader, *reader.take()) for index, reader in enumerate(readers)]
                changed.notify_all()  # those that leave no frame out go on
            groups: dict[tuple[int, ...], list[Frame]] = {}
            for index, reader, caught, lines, failed in taken:
                for line in lines:
                    self.note(line)
                if failed and len(readers) > 1:  # of a single one it is the error
                    self.report(f"skipped: {reader.failure}")
                if caught is not None:
                    frame = self._frame(index, reader, caught)
                    groups.setdefault(frame.boxed.image.shape, []).append(frame)
            yield from groups.values()

    def _frame(self, index: int, reader: Reader, caught: NewestFrame) -> Frame:
        image = self.from_bgr(caught.bgr)
        info = VideoInfo(caught.fps, image.shape[1], image.shape[0], reader.taken - 1, math.ceil(caught.frames / self.vid_stride))
        return Frame(reader.stream.shown, image, self.boxed(image), index, len(self.streams), info, reader.stream.name)


def stream_of(text: str, *, whole: bool = False) -> Stream:
    """The stream behind a URL or the number of a camera.

    Raises:
        UserError: A scheme that streams do not have.
    """
    if not is_url(text):
        if int(text) > MOST_CAMERAS:
            raise UserError(f"--source {text}: no camera has this number, and no file this name")
        return Stream(int(text), f"webcam{int(text)}", f"webcam{int(text)}")
    scheme = text.partition("://")[0].lower()
    if scheme == "file":
        raise UserError(f"--source {redacted(text)}: give the path of a file without file://")
    if scheme not in SCHEMES:
        raise UserError(f"--source {redacted(text)}: {scheme}:// is not read; known are {' '.join(SCHEMES)}")
    shown = redacted(text)
    is_file = Path(shown).suffix.lower() in VIDEO_SUFFIXES
    return Stream(text, shown, plain_name(Path(shown).stem if is_file else text), whole=whole)


def listed_streams(path: Path) -> list[Stream]:
    """The streams of a list: a URL, the number of a camera or a video file a line; empty lines and those that begin with # say nothing.

    Raises:
        UserError: A line that is none of these; it quotes the line's number and no secret.
    """
    lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    found = [_listed(text, path, number) for number, line in enumerate(lines, 1) if (text := line.strip()) and not text.startswith("#")]
    if not found:
        raise UserError(f"--source {path}: the list is empty, one URL, camera number or video file a line is expected")
    return found


def _listed(text: str, path: Path, number: int) -> Stream:
    if is_url(text):
        if is_image(redacted(text)):
            raise UserError(f"{path}, line {number}: {redacted(text)} is an image; give it as a --source of its own")
        return stream_of(text)
    if text.isdecimal():
        return stream_of(text)
    file = next((f for f in (path.parent / text, Path(text).expanduser()) if f.is_file()), None)
    if file is None or file.suffix.lower() not in VIDEO_SUFFIXES:
        raise UserError(f"{path}, line {number}: {redacted(text)} is no URL, no finite number of a camera and no video file that is there")
    return Stream(str(file), str(file), plain_name(file.stem))


def _distinct(names: Sequence[str]) -> list[str]:
    """The names; one that was there before gets a number. Upper and lower case count as one, as on some disks."""
    found: list[str] = []
    for name in names:
        number, free, taken = 1, name, {n.lower() for n in found}
        while free.lower() in taken:
            number += 1
            free = f"{name}_{number}"
        found.append(free)
    return found


def _stop(readers: Sequence[Reader], changed: threading.Condition, stop: threading.Event, *, wait_s: float | None) -> bool:
    """Asks readers to end and waits for them, without limit if ``wait_s`` is None; tells whether all have ended."""
    stop.set()
    with changed:
        changed.notify_all()
    deadline = time.monotonic() + wait_s if wait_s is not None else None
    for reader in readers:
        if reader.ident is not None:  # it was started
            reader.join(None if deadline is None else max(deadline - time.monotonic(), 0.0))
    return not any(reader.is_alive() for reader in readers)
