"""One stream and the thread that reads it: it keeps the newest frame, connects again when the stream breaks, and says what happens."""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple
from urllib.parse import urlsplit

import cv2
import numpy as np

from data.images.reading import ImageError
from data.sources.urls import is_url, open_url
from utils.process_exit import MAY_HANG

MOST_FPS = 1000.0  # some cameras give the rate of their clock
_PORTS = {"rtmp": 1935, "rtmps": 443, "rtsp": 554, "rtsps": 322}
_LOUDNESS = "OPENCV_FFMPEG_LOGLEVEL"  # FFMPEG reads it at its first use in a process


@dataclass(frozen=True)
class ReconnectPolicy:
    """How long a stream is waited for."""

    open_s: float = 10.0  # until it can be opened,
    read_s: float = 15.0  # until its next frame; HLS brings them in bursts, a segment at a time
    tries: int = 10  # to connect again, one after another without a frame
    pause_s: float = 1.0  # before the first of them; it doubles from one to the next
    longest_pause_s: float = 10.0


class Stream(NamedTuple):
    """One camera, URL or video file."""

    target: str | int  # a URL as it was given, a file, or the number of a camera
    shown: str  # the same without secrets
    name: str  # of its results
    whole: bool = False  # of a recording every frame is looked at, none is left out

    @property
    def is_file(self) -> bool:
        return isinstance(self.target, str) and not is_url(self.target)

    @property
    def is_http(self) -> bool:
        """By HTTP come recordings as well as cameras; by other schemes cameras only, some of which claim a length."""
        return isinstance(self.target, str) and self.target.lower().startswith("http")


class NewestFrame(NamedTuple):
    """A frame as its reader leaves it to whoever looks at it."""

    bgr: np.ndarray  # (H, W, 3) uint8
    fps: float
    frames: int  # of the whole recording, if all are looked at; else 0


class Reader(threading.Thread):
    """Reads one stream as fast as it comes and keeps the newest frame.

    All that others read of it is guarded by ``changed``.
    """

    def __init__(
        self, stream: Stream, vid_stride: int, patience: ReconnectPolicy, changed: threading.Condition, stop: threading.Event
    ) -> None:
        super().__init__(name=f"{MAY_HANG}reader of {stream.shown}", daemon=True)
        self.stream, self.vid_stride, self.patience, self._changed, self._stop_asked = stream, vid_stride, patience, changed, stop
        self.newest: NewestFrame | None = None
        self.lines: list[str] = []
        self.failure, self._failed_now = "", False  # why there never was a frame, and whether that was not yet taken
        self.taken, self.ended = 0, False
        self._kept = 0  # frames, over all connections
        self._error: Exception | None = None

    @property
    def has_news(self) -> bool:
        """Whether there is something to take."""
        return self.newest is not None or bool(self.lines) or self._failed_now

    def take(self) -> tuple[NewestFrame | None, list[str], bool]:
        """The newest frame, lines to tell, and whether the stream failed, each if not taken before; called with ``changed`` held."""
        if self._error is not None:
            raise self._error
        caught, self.newest = self.newest, None
        lines, self.lines = self.lines, []
        failed, self._failed_now = self._failed_now, False
        self.taken += caught is not None
        return caught, lines, failed

    def run(self) -> None:
        """Reads until the stream ends, tries were in vain, or a stop is asked for."""
        try:
            self._keep_connecting()
        except Exception as error:  # raised again where the frames are taken
            self._error = error
        finally:
            with self._changed:
                self.ended = True
                self._changed.notify_all()

    def _keep_connecting(self) -> None:
        tries, patience = 0, self.patience
        while True:
            before = self._kept
            trouble = self._read_on()
            if self._stop_asked.is_set():
                return
            if not trouble:
                if not self.stream.whole:
                    self._say(f"ended after {self._kept} frames")
                return
            if not self._kept:
                with self._changed:
                    self.failure, self._failed_now = f"{self.stream.shown}: {trouble}", True
                    self._changed.notify_all()
                return
            tries = 0 if self._kept > before else tries
            if tries == patience.tries:
                self._say(f"{trouble}; given up after {tries} tries")
                return
            pause = min(patience.pause_s * 2**tries, patience.longest_pause_s)
            tries += 1
            self._say(f"{trouble}; connecting again in {pause:g} s (try {tries} of {patience.tries})")
            self._stop_asked.wait(pause)

    def _read_on(self) -> str:
        """Reads until it ends; returns what broke, or nothing where a recording has come to its end."""
        capture = open_capture(self.stream.target, self.patience)
        try:
            if not capture.isOpened():
                return "cannot be opened again" if self._kept else why_closed(self.stream)
            fps, length = _known(capture.get(cv2.CAP_PROP_FPS), MOST_FPS), _known(capture.get(cv2.CAP_PROP_FRAME_COUNT), math.inf)
            recorded = self.stream.is_file or bool(self.stream.is_http and length and fps)
            read = self._read_frames(capture, fps, int(length) if recorded else None)
        except cv2.error:
            return "OpenCV cannot decode it"
        finally:
            capture.release()
        if not read:
            return "no frame can be decoded"
        if not recorded:
            return f"broke off after {read} frames"
        if read < 0.9 * length and not self._stop_asked.is_set():  # lengths are estimates in some formats
            self._say(f"broke off after {read} of {int(length)} frames")
        return ""

    def _read_frames(self, capture: cv2.VideoCapture, fps: float, length: int | None) -> int:
        """Keeps the newest frame until the stream ends or breaks; returns how many there were.

        A recording (its ``length`` is not None) that stands for a camera comes at its own speed, a whole one at the network's.
        """
        start, every, paced = time.monotonic(), self.stream.whole and length is not None, length is not None and fps > 0
        for number in count():
            if self._stop_asked.is_set() or not capture.grab():
                break
            if number % self.vid_stride:
                continue
            done, bgr = capture.retrieve()
            if not done:
                break
            if paced and not every:
                self._stop_asked.wait(max(start + number / fps - time.monotonic(), 0.0))
            with self._changed:
                while every and self.newest is not None and not self._stop_asked.is_set():
                    self._changed.wait()
                self.newest = NewestFrame(bgr, fps, length or 0 if every else 0)
                self._kept += 1
                self._changed.notify_all()
        return number

    def _say(self, line: str) -> None:
        with self._changed:
            self.lines.append(f"{self.stream.shown}: {line}")
            self._changed.notify_all()


def open_capture(target: str | int, patience: ReconnectPolicy) -> cv2.VideoCapture:
    """OpenCV's reader of a camera, a file or, through FFMPEG and with time-outs, a URL."""
    if not isinstance(target, str) or not is_url(target):
        return cv2.VideoCapture(target)
    scheme, rest = target.split("://", 1)
    waits = (cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, patience.open_s), (cv2.CAP_PROP_READ_TIMEOUT_MSEC, patience.read_s)
    return cv2.VideoCapture(f"{scheme.lower()}://{rest}", cv2.CAP_FFMPEG, [int(n) for key, s in waits for n in (key, 1000 * s)])


def why_closed(stream: Stream) -> str:
    """Why a stream cannot be opened, as far as a second look tells."""
    if not isinstance(stream.target, str):
        return "no such camera, or it is in use"
    if stream.is_file:
        return "not a video that can be opened"
    try:
        parts = urlsplit(stream.target)
        host, port = parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 0)
        if stream.is_http:
            open_url(stream.target).close()
        elif port:
            socket.create_connection((host, port), timeout=3).close()
    except ImageError as error:
        return str(error).removeprefix(f"{stream.shown}: ")
    except OSError as error:
        return f"nobody answers there ({error.strerror or 'no answer within 3 s'})"
    except ValueError:
        return "not a URL that can be understood; write what has a meaning in URLs as %40 (@), %3A (:), %2F (/)"
    return f"no video that can be opened; check path, user name and password ({_LOUDNESS}=24 shows what FFMPEG says)"


def _known(value: float, most: float) -> float:
    """Zero for what OpenCV says where it does not know."""
    return value if 0 < value < most else 0.0


@contextmanager
def quiet_opencv() -> Iterator[None]:
    """Silence from OpenCV and FFMPEG, which say in many lines, secrets of URLs included, what is said here in one; a set level is kept."""
    level, given = cv2.utils.logging.getLogLevel(), os.environ.get(_LOUDNESS)
    os.environ.setdefault(_LOUDNESS, "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)
        if given is None:
            os.environ.pop(_LOUDNESS, None)
