"""Stream sources for tests: an HTTP camera with videos and images on 127.0.0.1, a fake cv2.VideoCapture and a fake screen."""

from __future__ import annotations

import base64
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np

SECRET = "s3cret%2Fw0rd"  # URL-encoded
USER = "admin"
_BOUNDARY = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n"

WHOLE = {"left": 0, "top": 0, "width": 300, "height": 100}
SCREENS = [WHOLE, {**WHOLE, "width": 200, "name": "left"}, {**WHOLE, "left": 200, "width": 100}]


def solid_image(width: int, height: int, value: int = 60) -> np.ndarray:
    """Grey (H, W, 3) uint8 with a white box, which the networks of the tests detect."""
    image = np.full((height, width, 3), value, np.uint8)
    image[height // 4 : height // 2, width // 4 : width // 2] = 255
    return image


def video(path: Path, frames: int, *, size_wh: tuple[int, int] = (64, 48), fps: float = 25.0) -> Path:
    """Writes a motion JPEG AVI whose frames grow brighter by twelve, up to 240."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), fps, size_wh)
    for i in range(frames):
        writer.write(solid_image(*size_wh, value=12 * i % 240))
    writer.release()
    return path


class Camera:
    """Settings and log of the server.

    Attributes:
        files: path of the URL -> bytes.
        deaths: number of frames after which each further connection of ``/cam`` breaks; connections beyond the list do not break.
        stalls: whether the connection stays open without data after the last frame.
        requests: path and ``Authorization`` header (empty if absent) of every request.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.deaths: list[int] = []
        self.refusals, self.stalls = 0, False
        self.period_s = 0.02
        self.requests: list[tuple[str, str]] = []
        self.over = threading.Event()
        self.silent = threading.Event()  # a stream has stalled
        self.url = ""

    def with_password(self, path: str) -> str:
        """The URL of a path with user name and password in it."""
        return f"{self.url}{path}".replace("://", f"://{USER}:{SECRET}@")


@contextmanager
def camera() -> Iterator[Camera]:
    """A server in a thread: ``/cam`` (motion JPEG, 64x48), ``/wide`` (the same, 96x32), ``/locked/...`` (with a password), and files."""
    state = Camera()
    handler = type("Handler", (_Handler,), {"state": state})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Camera

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path, state = self.path.split("?")[0], self.state
        state.requests.append((self.path, self.headers.get("Authorization", "")))
        if path.startswith("/locked/"):
            expected = base64.b64encode(f"{USER}:{SECRET.replace('%2F', '/')}".encode()).decode()
            if self.headers.get("Authorization") != f"Basic {expected}":
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="camera"')
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            path = path.removeprefix("/locked")
        if path in state.files:
            self._give(state.files[path])
        elif path in ("/cam", "/wide") and not state.refusals:
            self._stream(path)
        else:
            state.refusals = max(state.refusals - 1, 0)
            self.send_error(404)

    def _give(self, data: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, path: str) -> None:
        state = self.state
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        size = (64, 48) if path == "/cam" else (96, 32)
        last = state.deaths.pop(0) if path == "/cam" and state.deaths else -1
        number = 0
        try:
            while number != last and not state.over.is_set():
                jpeg = cv2.imencode(".jpg", solid_image(*size, value=number % 60))[1].tobytes()
                self.wfile.write(_BOUNDARY % (len(jpeg), jpeg))
                number += 1
                time.sleep(state.period_s)
            if state.stalls:
                state.silent.set()
                state.over.wait()
        except OSError:
            pass  # the reader has left


class FakeCapture:
    """A fake cv2.VideoCapture: gives the requested number of frames and tracks which are still referenced."""

    def __init__(self, frames=10**9, *, size_wh=(64, 48), fps=30.0, length=0, period_s=0.0):
        self.frames, self.size_wh, self.period_s, self.released = frames, size_wh, period_s, False
        self.facts = {cv2.CAP_PROP_FPS: fps, cv2.CAP_PROP_FRAME_COUNT: length}
        self.grabbed, self.alive = 0, weakref.WeakSet()

    def isOpened(self):
        return self.frames > 0

    def get(self, key):
        return float(self.facts[key])

    def grab(self):
        assert not self.released
        time.sleep(self.period_s)
        self.grabbed += 1
        return self.grabbed <= self.frames

    def retrieve(self):
        image = np.full((self.size_wh[1], self.size_wh[0], 3), self.grabbed % 256, np.uint8).view(Tracked)
        image[0, 1] = self.grabbed // 256 % 256
        self.alive.add(image)
        return True, image

    def release(self):
        self.released = True


class Tracked(np.ndarray):
    """An array that can be referred to weakly, and compares by identity."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


class FakeScreen:
    """A fake screen of the package mss: images (H, W, 4) BGRX whose blue is half the column and whose red counts captures."""

    def __init__(self):
        self.monitors, self.grabs = SCREENS, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def grab(self, area):
        shot = np.zeros((100, 300, 4), np.uint8)
        shot[:, :, 0] = np.arange(300) // 2
        shot[:, :, 2] = self.grabs = self.grabs + 1
        y, x = area["top"], area["left"]
        return shot[y : y + area["height"], x : x + area["width"]]
