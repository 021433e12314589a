"""One stream and the thread that reads it: it keeps the newest frame, reconnects when the stream breaks, and records messages."""

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

MAX_FPS = 1000.0  # some cameras report the rate of their clock
_PORTS = {"rtmp": 1935, "rtmps": 443, "rtsp": 554, "rtsps": 322}
_LOG_LEVEL = "OPENCV_FFMPEG_LOGLEVEL"  # FFMPEG reads it at its first use in a process


@dataclass(frozen=True)
class ReconnectPolicy:
    """Time-outs of a stream, and how often it is reconnected."""

    open_s: float = 10.0  # to open it
    read_s: float = 15.0  # to its next frame; HLS delivers them in bursts, a segment at a time
    tries: int = 10  # to reconnect, one after another without a frame
    pause_s: float = 1.0  # before the first try; it doubles from one to the next
    max_pause_s: float = 10.0


class Stream(NamedTuple):
    """One camera, URL or video file."""

    target: str | int  # a URL as it was given, a file, or the number of a camera
    shown: str  # the same without secrets
    name: str  # of its results
    every_frame: bool = False  # of a recording every frame is used, none is dropped

    @property
    def is_file(self) -> bool:
        return isinstance(self.target, str) and not is_url(self.target)

    @property
    def is_http(self) -> bool:
        """HTTP delivers recordings as well as cameras; other schemes deliver cameras only, some of which report a length."""
        return isinstance(self.target, str) and self.target.lower().startswith("http")


class NewestFrame(NamedTuple):
    """The newest frame of a stream."""

    bgr: np.ndarray  # (H, W, 3) uint8
    fps: float
    frames: int  # of the whole recording, if all are used; else 0


class ReaderUpdate(NamedTuple):
    """What is new from a stream."""

    frame: NewestFrame | None
    messages: list[str]
    failed: bool  # it could not be opened at all


class Reader(threading.Thread):
    """Reads one stream as fast as it arrives and keeps the newest frame.

    What other threads read of it is guarded by ``changed``.
    """

    def __init__(
        self, stream: Stream, vid_stride: int, policy: ReconnectPolicy, changed: threading.Condition, stop: threading.Event
    ) -> None:
        super().__init__(name=f"{MAY_HANG}reader of {stream.shown}", daemon=True)
        self.stream, self.vid_stride, self.policy, self._changed, self._stop_requested = stream, vid_stride, policy, changed, stop
        self.newest: NewestFrame | None = None
        self.messages: list[str] = []
        self.failure, self._failure_pending = "", False  # why there never was a frame, and whether ``pop_update`` has yet to say so
        self.delivered, self.ended = 0, False  # frames that ``pop_update`` returned
        self._received = 0  # frames, over all connections
        self._error: Exception | None = None

    @property
    def has_update(self) -> bool:
        """Whether ``pop_update`` has something to return."""
        return self.newest is not None or bool(self.messages) or self._failure_pending

    def pop_update(self) -> ReaderUpdate:
        """What is new since the last call; to be called with ``changed`` held. Raises what the thread failed with."""
        if self._error is not None:
            raise self._error
        update = ReaderUpdate(self.newest, self.messages, self._failure_pending)
        self.newest, self.messages, self._failure_pending = None, [], False
        self.delivered += update.frame is not None
        return update

    def run(self) -> None:
        """Reads until the stream ends, all tries have failed, or a stop is requested."""
        try:
            self._read_with_reconnects()
        except Exception as error:  # raised again by pop_update
            self._error = error
        finally:
            with self._changed:
                self.ended = True
                self._changed.notify_all()

    def _read_with_reconnects(self) -> None:
        tries, policy = 0, self.policy
        while True:
            before = self._received
            trouble = self._read_connection()
            if self._stop_requested.is_set():
                return
            if not trouble:
                if not self.stream.every_frame:
                    self._add_message(f"ended after {self._received} frames")
                return
            if not self._received:
                with self._changed:
                    self.failure, self._failure_pending = f"{self.stream.shown}: {trouble}", True
                    self._changed.notify_all()
                return
            tries = 0 if self._received > before else tries
            if tries == policy.tries:
                self._add_message(f"{trouble}; given up after {tries} tries")
                return
            pause = min(policy.pause_s * 2**tries, policy.max_pause_s)
            tries += 1
            self._add_message(f"{trouble}; connecting again in {pause:g} s (try {tries} of {policy.tries})")
            self._stop_requested.wait(pause)

    def _read_connection(self) -> str:
        """Reads one connection until it ends; returns what broke, or nothing where a recording was read to its end."""
        capture = open_capture(self.stream.target, self.policy)
        try:
            if not capture.isOpened():
                return "cannot be opened again" if self._received else diagnose_closed(self.stream)
            fps = _zero_if_unknown(capture.get(cv2.CAP_PROP_FPS), MAX_FPS)
            length = _zero_if_unknown(capture.get(cv2.CAP_PROP_FRAME_COUNT), math.inf)
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
        if read < 0.9 * length and not self._stop_requested.is_set():  # lengths are estimates in some formats
            self._add_message(f"broke off after {read} of {int(length)} frames")
        return ""

    def _read_frames(self, capture: cv2.VideoCapture, fps: float, length: int | None) -> int:
        """Keeps the newest frame until the stream ends or breaks; returns the number of frames.

        A recording (its ``length`` is not None) in place of a camera is read at its own speed, one whose every frame is used at the
        network's.
        """
        start, every, paced = time.monotonic(), self.stream.every_frame and length is not None, length is not None and fps > 0
        for number in count():
            if self._stop_requested.is_set() or not capture.grab():
                break
            if number % self.vid_stride:
                continue
            done, bgr = capture.retrieve()
            if not done:
                break
            if paced and not every:
                self._stop_requested.wait(max(start + number / fps - time.monotonic(), 0.0))
            with self._changed:
                while every and self.newest is not None and not self._stop_requested.is_set():
                    self._changed.wait()
                self.newest = NewestFrame(bgr, fps, length or 0 if every else 0)
                self._received += 1
                self._changed.notify_all()
        return number

    def _add_message(self, line: str) -> None:
        with self._changed:
            self.messages.append(f"{self.stream.shown}: {line}")
            self._changed.notify_all()


def open_capture(target: str | int, policy: ReconnectPolicy) -> cv2.VideoCapture:
    """OpenCV's capture of a camera, a file or, through FFMPEG and with time-outs, a URL."""
    if not isinstance(target, str) or not is_url(target):
        return cv2.VideoCapture(target)
    scheme, rest = target.split("://", 1)
    timeouts = (cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, policy.open_s), (cv2.CAP_PROP_READ_TIMEOUT_MSEC, policy.read_s)
    return cv2.VideoCapture(f"{scheme.lower()}://{rest}", cv2.CAP_FFMPEG, [int(n) for key, s in timeouts for n in (key, 1000 * s)])


def diagnose_closed(stream: Stream) -> str:
    """Why a stream cannot be opened, as far as another connection shows."""
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
        return f"no server answers ({error.strerror or 'no answer within 3 s'})"
    except ValueError:
        return "not a valid URL; write reserved characters as %40 (@), %3A (:), %2F (/)"
    return f"no video that can be opened; check path, user name and password ({_LOG_LEVEL}=24 shows FFMPEG's messages)"


def _zero_if_unknown(value: float, limit: float) -> float:
    """OpenCV returns negative or huge values for what it does not know."""
    return value if 0 < value < limit else 0.0


@contextmanager
def silenced_opencv() -> Iterator[None]:
    """Turns off the messages of OpenCV and FFMPEG, which quote URLs with their secrets; a level that the user has set is kept."""
    level, given = cv2.utils.logging.getLogLevel(), os.environ.get(_LOG_LEVEL)
    os.environ.setdefault(_LOG_LEVEL, "-8")
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)
        if given is None:
            os.environ.pop(_LOG_LEVEL, None)
