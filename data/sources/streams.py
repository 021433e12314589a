"""Cameras and streams, one or many at once: a thread for each keeps its newest frame, and new frames are batched."""

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
from data.sources.stream_reader import NewestFrame, Reader, ReconnectPolicy, Stream, silenced_opencv
from data.sources.urls import is_url, plain_name, redacted
from utils.errors import UserError
from utils.reading.text_files import read_bytes

SCHEMES = ("http", "https", "rtmp", "rtmps", "rtp", "rtsp", "rtsps", "tcp", "udp")
MAX_CAMERA = 1000  # a larger number is a mistake in --source
STOP_S = 1.0  # for readers to end; one that is blocked by the network ends at its own time-out


class StreamSource(FrameSource):
    """The newest frame of each stream that has a new one since the last batch.

    Besides the batch, memory holds one frame of each stream, however slow the network is.
    """

    def __init__(
        self, streams: Sequence[Stream], *, policy: ReconnectPolicy | None = None, on_event: Callable[[str], None] = print, **settings: Any
    ) -> None:
        """
        Args:
            streams: at least one.
            policy: time-outs and tries.
            on_event: called with one line when a stream that was read breaks, is reconnected or ends.
            settings: as ``FrameSource`` takes them.
        """
        super().__init__(**settings)
        names = _make_distinct([stream.name for stream in streams])
        self.streams = tuple(stream._replace(name=name) for stream, name in zip(streams, names))
        self.at_once, self.policy, self.on_event = len(streams), policy or ReconnectPolicy(), on_event
        for stream in streams:
            self.check_channels(stream.shown)

    def __len__(self) -> int:
        """Number of streams."""
        return len(self.streams)

    def batches(self) -> Generator[Sequence[Frame], None, None]:
        """Batches of newest frames, until all streams have ended.

        Raises:
            UserError: none could be opened.
        """
        changed, stop = threading.Condition(), threading.Event()
        readers = [Reader(stream, self.vid_stride, self.policy, changed, stop) for stream in self.streams]
        at_exit = partial(_stop_readers, readers, changed, stop, wait_s=None)
        atexit.register(at_exit)  # Python must not exit while a reader is inside OpenCV
        with silenced_opencv():
            try:
                for reader in readers:
                    reader.start()
                yield from self._newest_frames(readers, changed)
            finally:
                if _stop_readers(readers, changed, stop, wait_s=STOP_S):
                    atexit.unregister(at_exit)
        if not any(reader.delivered for reader in readers):
            reason = readers[0].failure
            raise UserError(reason if len(readers) == 1 else f"none of the {len(readers)} streams can be read, first: {reason}")

    def _newest_frames(self, readers: Sequence[Reader], changed: threading.Condition) -> Iterator[list[Frame]]:
        all_ended = False
        while not all_ended:
            with changed:
                while not (all_ended := all(r.ended for r in readers)) and not any(r.has_update for r in readers):
                    changed.wait(0.5)  # with a time-out, so that Ctrl-C is handled on every system
                updates = [reader.pop_update() for reader in readers]
                changed.notify_all()  # readers that drop no frame wait for this
            by_shape: dict[tuple[int, ...], list[Frame]] = {}
            for index, (reader, update) in enumerate(zip(readers, updates)):
                for message in update.messages:
                    self.on_event(message)
                if update.failed and len(readers) > 1:  # for a single stream this is the error
                    self.on_skip(f"skipped: {reader.failure}")
                if update.frame is not None:
                    frame = self._frame(index, reader, update.frame)
                    by_shape.setdefault(frame.boxed.image.shape, []).append(frame)
            yield from by_shape.values()

    def _frame(self, index: int, reader: Reader, newest: NewestFrame) -> Frame:
        image = self.from_bgr(newest.bgr)
        info = VideoInfo(newest.fps, image.shape[1], image.shape[0], reader.delivered - 1, math.ceil(newest.frames / self.vid_stride))
        return Frame(reader.stream.shown, image, self.boxed(image), index, len(self.streams), info, reader.stream.name)


def stream_of(text: str, *, every_frame: bool = False) -> Stream:
    """The stream behind a URL or the number of a camera.

    Raises:
        UserError: an unknown scheme or camera number.
    """
    if not is_url(text):
        if int(text) > MAX_CAMERA:
            raise UserError(f"--source {text}: no camera has this number, and no file this name")
        return Stream(int(text), f"webcam{int(text)}", f"webcam{int(text)}")
    scheme = text.partition("://")[0].lower()
    if scheme == "file":
        raise UserError(f"--source {redacted(text)}: give the path of a file without file://")
    if scheme not in SCHEMES:
        raise UserError(f"--source {redacted(text)}: {scheme}:// is not supported; known are {' '.join(SCHEMES)}")
    shown = redacted(text)
    is_file = Path(shown).suffix.lower() in VIDEO_SUFFIXES
    return Stream(text, shown, plain_name(Path(shown).stem if is_file else text), every_frame=every_frame)


def listed_streams(path: Path) -> list[Stream]:
    """The streams of a list: a URL, the number of a camera or a video file a line; empty lines and those that begin with # are skipped.

    Raises:
        UserError: a line that is none of these; the message has the line's number and no secret.
    """
    lines = read_bytes(path, kind="list of streams").decode("utf-8-sig", errors="surrogateescape").splitlines()
    found = [_parse_line(text, path, number) for number, line in enumerate(lines, 1) if (text := line.strip()) and not text.startswith("#")]
    if not found:
        raise UserError(f"--source {path}: the list is empty, one URL, camera number or video file a line is expected")
    return found


def _parse_line(text: str, path: Path, number: int) -> Stream:
    if is_url(text):
        if is_image(redacted(text)):
            raise UserError(f"{path}, line {number}: {redacted(text)} is an image; give it as a --source of its own")
        return stream_of(text)
    if text.isdecimal():
        return stream_of(text)
    file = next((f for f in (path.parent / text, Path(text).expanduser()) if f.is_file()), None)
    if file is None or file.suffix.lower() not in VIDEO_SUFFIXES:
        raise UserError(f"{path}, line {number}: {redacted(text)} is neither a URL nor the number of a camera nor an existing video file")
    return Stream(str(file), str(file), plain_name(file.stem))


def _make_distinct(names: Sequence[str]) -> list[str]:
    """The names, a repeated one with a number. Upper and lower case count as equal, as on some disks."""
    found: list[str] = []
    for name in names:
        number, free, used = 1, name, {n.lower() for n in found}
        while free.lower() in used:
            number += 1
            free = f"{name}_{number}"
        found.append(free)
    return found


def _stop_readers(readers: Sequence[Reader], changed: threading.Condition, stop: threading.Event, *, wait_s: float | None) -> bool:
    """Asks readers to end and waits for them, without limit if ``wait_s`` is None; returns whether all have ended."""
    stop.set()
    with changed:
        changed.notify_all()
    deadline = time.monotonic() + wait_s if wait_s is not None else None
    for reader in readers:
        if reader.ident is not None:  # it was started
            reader.join(None if deadline is None else max(deadline - time.monotonic(), 0.0))
    return not any(reader.is_alive() for reader in readers)
