"""Streams: the newest frame of each, together; breaks, ends and passwords; nothing left behind."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.sources import stream_reader
from data.sources.opening import open_source
from data.sources.stream_reader import ReconnectPolicy, Stream, open_capture, silenced_opencv
from data.sources.streams import StreamSource, listed_streams, stream_of
from tests.rtsp_server import rtsp_camera
from tests.stream_sources import SECRET, FakeCapture, camera, solid_image, video
from utils.errors import UserError
from utils.process_exit import MAY_HANG

QUICK = ReconnectPolicy(open_s=60.0, read_s=60.0, tries=3, pause_s=0.05, max_pause_s=0.2)


@pytest.fixture
def server():
    with camera() as state:
        yield state


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [t for t in threading.enumerate() if t.name.startswith(MAY_HANG)]


@pytest.fixture
def given(monkeypatch):
    """Captures by target; each further connection takes the next of a list."""
    captures = {}

    def opened(target, patience):
        return captures[target].pop(0) if isinstance(captures[target], list) else captures[target]

    monkeypatch.setattr(stream_reader, "open_capture", opened)
    return captures


def streams(*targets, **more):
    return [Stream(t, f"webcam{t}", f"webcam{t}", **more) for t in targets]


def wait_until(condition):
    """Waits for an event, however slow the machine is."""
    end = time.monotonic() + 300  # then it will not come
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


class Gated(FakeCapture):
    """A capture whose next frame comes when ``opens(capture)`` says so; its last one when ``ends()`` does."""

    def __init__(self, opens, *, ends=lambda: False, **more):
        super().__init__(**more)
        self.opens, self.ends = opens, ends

    def grab(self):
        wait_until(lambda: self.opens(self))
        return super().grab() and not self.ends()


def grabs(capture, count):
    """Waits until the reader has asked a capture for so many more frames."""
    before = capture.grabbed
    wait_until(lambda: capture.grabbed >= before + count)


def first(source, count):
    """The first frames, after which the source is closed."""
    found = []
    with closing(source.batches()) as batches:
        for frames in batches:
            found += frames
            if len(found) >= count:
                break
    return found


def test_http_camera_is_read(server):
    source = open_source(f"{server.url}/cam?channel=1", imgsz=64)
    frames = first(source, 5)
    assert [f.video.number for f in frames] == [0, 1, 2, 3, 4]
    assert frames[0].path == f"{server.url}/cam"
    assert frames[0].name == server.url.partition("://")[2].replace(".", "-").replace(":", "_") + "_cam"
    assert frames[0].image.shape == (48, 64, 3)
    assert frames[0].boxed.image.shape == (64, 64, 3)
    assert (frames[0].index, frames[0].total, frames[0].video.frames) == (0, 1, 0)
    assert frames[0].image[13, 17].tolist() == pytest.approx([255] * 3, abs=12)  # px


@pytest.mark.parametrize("vid_stride", [1, 5])
def test_http_video_is_read_without_dropping_frames(server, tmp_path, vid_stride):
    server.files["/clip.avi"] = video(tmp_path / "clip.avi", 12, fps=1000 / 3).read_bytes()
    notes = []
    clip = stream_of(f"{server.url}/clip.avi", every_frame=True)
    source = StreamSource([clip], policy=QUICK, on_event=notes.append, imgsz=64, vid_stride=vid_stride)
    seen = []
    for frame in source:
        time.sleep(0.02)  # slower than they come
        seen.append(frame)
    assert [round(int(f.image[0, 0, 0]) / 12) for f in seen] == list(range(0, 12, vid_stride))
    assert {f.video.frames for f in seen} == {len(seen)}
    assert (seen[0].name, notes) == ("clip", [])


def test_truncated_video_is_reported(server, tmp_path):
    data = video(tmp_path / "clip.avi", 40).read_bytes()
    server.files["/clip.avi"] = data[: len(data) // 2]
    notes = []
    seen = list(StreamSource([stream_of(f"{server.url}/clip.avi", every_frame=True)], policy=QUICK, on_event=notes.append, imgsz=64))
    assert 0 < len(seen) < 30
    assert notes == [f"{server.url}/clip.avi: broke off after {len(seen)} of 40 frames"]


def test_password_is_sent_to_the_camera_and_never_printed(server):
    url = server.with_password("/locked/cam")
    (frame,) = first(open_source(url, imgsz=64), 1)
    with pytest.raises(UserError, match="answers 404") as caught:
        list(open_source(server.with_password("/locked/nothing"), imgsz=64))
    with pytest.raises(UserError, match="answers 401"):
        list(open_source(f"{server.url}/locked/cam", imgsz=64))
    said = str(caught.value) + frame.path + frame.name
    assert "***@" in said
    assert not any(part in said for part in (SECRET, "s3cret", "admin"))


def test_rtsp_camera_is_read():
    with rtsp_camera(solid_image(128, 96), user="admin:s3cret/w0rd", deaths=[8]) as place:
        notes = []
        source = StreamSource([stream_of(f"RTSP://admin:{SECRET}@{place}/live?channel=1")], policy=QUICK, on_event=notes.append, imgsz=64)
        frames = first(source, 12)
        shown = f"rtsp://***@{place}/live"
        assert notes == [f"{shown}: broke off after 8 frames; connecting again in 0.05 s (try 1 of 3)"]
        assert {(f.path, f.image.shape, f.video.frames) for f in frames} == {(shown, (96, 128, 3), 0)}
        np.testing.assert_allclose(frames[-1].image[[12, 36], [16, 48]], [[60] * 3, [255] * 3], atol=8)
        with pytest.raises(UserError, match="check path, user name and password") as caught:
            list(open_source(f"rtsp://admin:wr0ng@{place}/live", imgsz=64))
        assert "wr0ng" not in str(caught.value)


def test_broken_stream_reconnects(server):
    server.deaths = [5, 3]
    notes, seen = [], []
    source = StreamSource([stream_of(f"{server.url}/cam")], policy=QUICK, on_event=notes.append, imgsz=64)
    with closing(source.batches()) as batches:
        for frames in batches:
            seen += frames
            if len(server.requests) == 3 and len(notes) == 2 and len(seen) > 10:
                break
    assert notes == [
        f"{server.url}/cam: broke off after {n} frames; connecting again in 0.05 s (try 1 of 3)" for n in (5, 3)
    ]  # the counting of tries begins anew with every frame
    assert [f.video.number for f in seen] == list(range(len(seen)))


def test_lost_stream_ends_after_retries_and_the_other_continues(given):
    given[0] = [FakeCapture(4), *(FakeCapture(0) for _ in range(3))]
    notes: list[str] = []
    last = "webcam0: cannot be opened again; given up after 3 tries"
    given[1] = [Gated(lambda capture: True, ends=lambda: last in notes), *(FakeCapture(0) for _ in range(3))]
    seen = list(StreamSource(streams(0, 1), policy=QUICK, on_event=notes.append, imgsz=64))
    assert seen[-1].path == "webcam1"
    mine = [line for line in notes if line.startswith("webcam0")]
    assert mine == [
        "webcam0: broke off after 4 frames; connecting again in 0.05 s (try 1 of 3)",
        "webcam0: cannot be opened again; connecting again in 0.1 s (try 2 of 3)",
        "webcam0: cannot be opened again; connecting again in 0.2 s (try 3 of 3)",
        last,
    ]
    assert sum(line.startswith("webcam1") for line in notes) == 4


def test_only_the_newest_frame_is_kept(given):
    capture = given[0] = FakeCapture(period_s=0.001)
    source = StreamSource(streams(0), policy=QUICK, imgsz=64)
    numbers, held = [], 0
    with closing(source.batches()) as batches:
        for frames in batches:
            grabs(capture, 10)
            held = max(held, len(capture.alive))
            numbers.append(int(frames[0].image[0, 0, 0]) + 256 * int(frames[0].image[0, 1, 0]))
            if len(numbers) == 4:
                break
    assert min(np.diff(numbers)) > 5  # those between are gone
    assert held <= 3  # the newest, the one that is about to become it, and the one that is looked at
    assert capture.released


def test_frames_of_one_shape_form_one_batch(given):
    for target, size in enumerate(((64, 48), (640, 480), (96, 32))):
        given[target] = FakeCapture(size_wh=size, period_s=0.002)
    source = StreamSource(streams(0, 1, 2), imgsz=64)
    groups = []
    with closing(source.batches()) as batches:
        for frames in batches:
            for capture in given.values():
                grabs(capture, 2)  # the first of them is there by then
            groups.append(tuple(f.index for f in frames))
            if len(groups) == 12:
                break
    assert {(0, 1), (2,)} == set(groups[4:])
    assert len(source) == source.at_once == 3


def test_video_file_in_a_stream_list_plays_at_its_own_rate(tmp_path):
    video(tmp_path / "a.avi", 11, fps=25)
    video(tmp_path / "b.avi", 6, fps=25, size_wh=(96, 32))
    (tmp_path / "cams.streams").write_text("# two\n\na.avi\n" + str(tmp_path / "b.avi") + "\n")
    notes = []
    source = StreamSource(listed_streams(tmp_path / "cams.streams"), on_event=notes.append, imgsz=64)
    start = time.monotonic()
    seen = list(source)
    assert time.monotonic() - start >= 10 / 25
    assert {f.path for f in seen} == {str(tmp_path / "a.avi"), str(tmp_path / "b.avi")}
    assert sorted(notes) == [f"{tmp_path / 'a.avi'}: ended after 11 frames", f"{tmp_path / 'b.avi'}: ended after 6 frames"]
    assert seen[-1].image[0, 0, 0] == pytest.approx(120, abs=3)  # the last frame is looked at


def test_unopenable_stream_is_skipped(given):
    given[0], given[1] = FakeCapture(0), [FakeCapture(30, period_s=0.005), *(FakeCapture(0) for _ in range(9))]
    skipped = []
    seen = list(StreamSource(streams(0, 1), policy=QUICK, on_skip=skipped.append, on_event=lambda line: None, imgsz=64))
    assert {f.path for f in seen} == {"webcam1"}
    assert skipped == ["skipped: webcam0: no such camera, or it is in use"]
    given[1] = FakeCapture(0)
    with pytest.raises(UserError, match="none of the 2 streams can be read, first: webcam0: no such camera"):
        list(StreamSource(streams(0, 1), policy=QUICK, on_skip=skipped.append, imgsz=64))
    with pytest.raises(UserError, match=r"^webcam0: no such camera"):
        list(StreamSource(streams(0), policy=QUICK, imgsz=64))


def test_connection_errors_hide_the_password():
    for url, said in (("rtsp://admin:PW@127.0.0.1:1/x", "no server answers .Connection refused"), ("http://127.0.0.1:1/x", "refused")):
        with pytest.raises(UserError, match=said) as caught:
            list(open_source(url, imgsz=64))
        assert "PW" not in str(caught.value)
    with pytest.raises(UserError, match="not a valid URL") as caught:
        list(open_source("rtsp://admin:P/W@127.0.0.1/x", imgsz=64))
    assert "P/W" not in str(caught.value)


def test_webcams_are_read_by_number_with_stride(given):
    seen: list[int] = []
    camera = Gated(lambda capture: capture.grabbed < 4 * len(seen) + 1, frames=20, length=99)  # a camera's length is no end
    given[7] = [camera, *(FakeCapture(0) for _ in range(3))]
    source = StreamSource([stream_of("7")], policy=QUICK, on_event=lambda line: None, imgsz=64, vid_stride=4)
    for frame in source:
        seen.append(int(frame.image[0, 0, 0]))
    assert seen == [1, 5, 9, 13, 17]


def test_reader_error_is_raised_in_the_main_thread(given):
    class Broken(FakeCapture):
        def grab(self):
            raise RuntimeError("driver")

    given[0] = Broken()
    with pytest.raises(RuntimeError, match="driver"):
        list(StreamSource(streams(0), imgsz=64))
    assert given[0].released


def test_stop_does_not_wait_for_reconnect_pauses_or_full_queues(given):
    for more, capture in (({}, [FakeCapture(3), FakeCapture(0)]), ({"every_frame": True}, FakeCapture(length=100))):
        target = "http://x" if more else 0
        given[target] = capture
        opened = capture if more else capture[0]
        policy = ReconnectPolicy(pause_s=3600, max_pause_s=3600)
        source = StreamSource([Stream(target, "x", "x", **more)], policy=policy, on_event=print, imgsz=64)
        batches = source.batches()
        next(batches)
        if not more:
            wait_until(lambda opened=opened: opened.released)  # its reader is about to pause
        start = time.monotonic()
        batches.close()
        assert time.monotonic() - start < 300  # it did not wait for the pause


def test_opencv_is_opened_with_time_outs(monkeypatch):
    asked = []
    monkeypatch.setattr(cv2, "VideoCapture", lambda *arguments: asked.append(arguments))
    patience = ReconnectPolicy(open_s=3, read_s=4.5)
    for target in ("RTSP://u:p@cam/Live", "clip.avi", 2):
        open_capture(target, patience)
    waits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, 3000, cv2.CAP_PROP_READ_TIMEOUT_MSEC, 4500]
    assert asked == [("rtsp://u:p@cam/Live", cv2.CAP_FFMPEG, waits), ("clip.avi",), (2,)]


def test_silent_server_is_dropped_after_the_time_out(server):
    server.deaths, server.stalls = [5], True
    notes = []
    source = StreamSource([stream_of(f"{server.url}/cam")], policy=replace(QUICK, read_s=1.0), on_event=notes.append, imgsz=64)
    start = time.monotonic()
    with closing(source.batches()) as batches:
        for _ in batches:
            if notes:
                break
    assert time.monotonic() - start >= 1  # the server itself never ends it
    assert "broke off after" in notes[0]


HANGS_AT_THE_END = """
import sys, time
from contextlib import closing
from data.sources.stream_reader import ReconnectPolicy
from data.sources.streams import StreamSource, stream_of

class LateEnd:
    def __del__(self):
        time.sleep(1.5)  # Python is taken to pieces meanwhile

late = LateEnd()
source = StreamSource([stream_of(sys.argv[1])], imgsz=64, policy=ReconnectPolicy(read_s=2.5))
with closing(source.batches()) as batches:
    next(batches)
    time.sleep(0.5)  # the reader waits for a frame that does not come
print("left")
"""


def test_interpreter_exit_waits_for_a_hanging_reader(server):
    server.deaths, server.stalls = [3], True
    command = [sys.executable, "-c", HANGS_AT_THE_END, f"{server.url}/cam"]
    ended = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=600)
    assert (ended.returncode, ended.stdout) == (0, "left\n"), ended.stderr


def test_opencv_log_settings_are_restored(monkeypatch):
    level = cv2.utils.logging.getLogLevel()
    monkeypatch.delenv("OPENCV_FFMPEG_LOGLEVEL", raising=False)
    with silenced_opencv():
        assert stream_reader.os.environ["OPENCV_FFMPEG_LOGLEVEL"] == "-8"
    assert "OPENCV_FFMPEG_LOGLEVEL" not in stream_reader.os.environ
    monkeypatch.setenv("OPENCV_FFMPEG_LOGLEVEL", "24")
    with silenced_opencv():
        assert stream_reader.os.environ["OPENCV_FFMPEG_LOGLEVEL"] == "24"
    assert cv2.utils.logging.getLogLevel() == level


def test_stream_list_is_parsed(tmp_path):
    path = tmp_path / "cams.streams"
    path.write_text("\ufeff# cameras\n\n rtsp://u:PW@a.local/x \n0\nrtsp://b.local/x\nrtsp://B.local/x?n=2\n", encoding="utf-8")
    source = open_source(path, imgsz=64)
    assert [s.name for s in source.streams] == ["a-local_x", "webcam0", "b-local_x", "B-local_x_2"]
    assert [s.shown for s in source.streams][:2] == ["rtsp://***@a.local/x", "webcam0"]
    assert source.streams[0].target == "rtsp://u:PW@a.local/x"
    assert not any(s.every_frame for s in source.streams)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("u:PW@cam/live", r"line 2: \*\*\*@cam/live is neither a URL nor the number"),
        ("notes.md", "line 2: notes.md is neither a URL nor the number of a camera nor an existing video file"),
        ("http://u:PW@cam/now.jpg", "line 2: .* is an image"),
        ("file:///x/PW.mp4?", "without file://"),
        ("gopher://u:PW@cam/", "gopher:// is not supported; known are http"),
        ("# nothing", "the list is empty"),
        ("12345", "no camera has this number"),
    ],
)
def test_invalid_stream_list_lines_are_refused(tmp_path, line, said):
    (tmp_path / "notes.md").touch()
    (tmp_path / "cams.streams").write_text(f"# cameras\n{line}\n")
    with pytest.raises(UserError, match=said) as caught:
        open_source(tmp_path / "cams.streams", imgsz=64)
    assert ":PW" not in str(caught.value)
    assert "\n" not in str(caught.value)
