"""An RTSP camera on 127.0.0.1 for tests: motion JPEG in RTP packets (RFC 2435), interleaved in the RTSP connection."""

from __future__ import annotations

import base64
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import cv2
import numpy as np

PACKET = 1200  # bytes of an image in one packet
TICKS = 3600  # of the 90 kHz clock from frame to frame: 25 a second
ANSWERS = {
    "OPTIONS": "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n",
    "SETUP": "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n",
    "PLAY": "Session: 1\r\n",
}
DESCRIPTION = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\nm=video 0 RTP/AVP 26\r\na=control:track1\r\n"


@contextmanager
def rtsp_camera(image: np.ndarray, *, user: str, deaths: Sequence[int] = ()) -> Iterator[str]:
    """Runs a server in threads; yields its ``host:port``.

    Args:
        image: the frame (H, W, 3) BGR, sides multiples of 8 px.
        user: the expected ``name:password``.
        deaths: number of frames after which the first connections break; later ones do not.
    """
    over, lives = threading.Event(), list(deaths)
    listener = socket.create_server(("127.0.0.1", 0))
    expected = base64.b64encode(user.encode()).decode()

    def accept() -> None:
        while not over.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    def talk(connection: socket.socket) -> None:
        with connection:
            try:
                if _plays(connection, expected):
                    _send_frames(connection, image, lives.pop(0) if lives else 10**9, over)
            except OSError:
                pass  # the reader has left

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        over.set()
        listener.close()


def _plays(connection: socket.socket, expected: str) -> bool:
    """Answers requests until PLAY; returns False if the client disconnects."""
    waiting = b""
    while True:
        while b"\r\n\r\n" not in waiting:
            received = connection.recv(4096)
            if not received:
                return False
            waiting += received
        head, waiting = waiting.split(b"\r\n\r\n", 1)
        request, method = head.decode(), head.split()[0].decode()
        number = re.search(r"CSeq: (\d+)", request, re.IGNORECASE)[1]
        body, more, status = "", ANSWERS.get(method, ""), "200 OK"
        if method == "DESCRIBE":
            body, more = DESCRIPTION, f"Content-Type: application/sdp\r\nContent-Length: {len(DESCRIPTION)}\r\n"
        if method != "OPTIONS" and f"Basic {expected}" not in request:
            body, more, status = "", 'WWW-Authenticate: Basic realm="camera"\r\n', "401 Unauthorized"
        connection.sendall(f"RTSP/1.0 {status}\r\nCSeq: {number}\r\n{more}\r\n{body}".encode())
        if method == "PLAY" and status == "200 OK":
            return True


def _send_frames(connection: socket.socket, image: np.ndarray, count: int, over: threading.Event) -> None:
    tables, kind, scan = _parts(cv2.imencode(".jpg", image)[1].tobytes())
    height, width = image.shape[:2]
    sent = 0
    for frame in range(count):
        for offset in range(0, len(scan), PACKET):
            last = offset + PACKET >= len(scan)
            frame_image = struct.pack(">IBBBB", offset, kind, 255, width // 8, height // 8)
            frame_image += struct.pack(">HH", 0, len(tables)) + tables if not offset else b""
            head = struct.pack(">BBHII", 0x80, 26 | 0x80 * last, sent & 0xFFFF, frame * TICKS, 7)
            packet = head + frame_image + scan[offset : offset + PACKET]
            connection.sendall(b"$\0" + struct.pack(">H", len(packet)) + packet)
            sent += 1
        if over.is_set():
            return
        time.sleep(0.02)


def _parts(jpeg: bytes) -> tuple[bytes, int, bytes]:
    """Quantisation tables, RFC 2435's type (0: 4:2:2, 1: 4:2:0) and scan data of a baseline JPEG."""
    tables, kind, at = b"", 0, 2
    while True:
        marker, length = jpeg[at + 1], struct.unpack(">H", jpeg[at + 2 : at + 4])[0]
        segment = jpeg[at + 4 : at + 2 + length]
        if marker == 0xDB:
            tables += b"".join(segment[i + 1 : i + 65] for i in range(0, len(segment), 65))
        if marker == 0xC0:
            kind = int(segment[7] == 0x22)
        at += 2 + length
        if marker == 0xDA:
            return tables, kind, jpeg[at:-2]
