"""detect.py on streams, URLs and the screen: what it prints, what it leaves, and how it ends."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import cv2
import pytest
import torch
from torch import Tensor

import detect
from data.sources.stream_reader import ReconnectPolicy
from tasks import DETECT
from tests.stream_sources import SECRET, FakeCapture, FakeScreen, camera, solid_image, video
from tests.tiny import tiny_checkpoint
from utils.process_exit import MAY_HANG
from utils.types import Predictions

ROOT = Path(__file__).parents[2]


PATIENT = """
import sys
from functools import partial
import detect
from data.sources import streams
from utils.process_exit import exit_process

streams.ReconnectPolicy = partial(streams.ReconnectPolicy, read_s=3600.0)
exit_process(detect.main(sys.argv[1:]))
"""


class Finder:
    """Finds one thing in the middle of every image, and notes how many images come at once."""

    names, nc, ch, stride, task = ("thing",), 1, 3, 32, DETECT

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def predict(self, images: Tensor, *, above: float = 0.0) -> Predictions:
        self.batches.append(tuple(images.shape))
        height, width = images.shape[2:]
        box = torch.tensor([width * 0.4, height * 0.4, width * 0.6, height * 0.6])
        return Predictions(box.expand(len(images), 1, 4), torch.full((len(images), 1, 1), 0.9))


@pytest.fixture
def finder(monkeypatch):
    model = Finder()
    monkeypatch.setattr("engine.inference.detect.load_network", lambda weights, device, config: model)
    monkeypatch.setattr("data.sources.streams.ReconnectPolicy", partial(ReconnectPolicy, tries=1, pause_s=0.05))
    return model


@pytest.fixture
def run(tmp_path):
    def call(*arguments):
        common = ("--weights", "x.pt", "--img", "64", "--project", tmp_path / "out", "--device", "cpu")
        status = detect.main([*map(str, (*common, *arguments))])
        assert not [t for t in threading.enumerate() if t.name.startswith(MAY_HANG)]
        return status

    return call


@pytest.fixture
def server():
    with camera() as state:
        yield state


def frames_of(path):
    capture = cv2.VideoCapture(str(path))
    return int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), int(capture.get(cv2.CAP_PROP_FRAME_WIDTH))


def test_stream_list_is_detected(run, server, finder, tmp_path, capsys):
    video(tmp_path / "wide.avi", 8, size_wh=(96, 32))
    video(tmp_path / "clip.avi", 30)  # long enough that a camera which opens late still meets it
    server.deaths = [40, 0]
    lines = (f"{server.with_password('/locked/cam')}?channel=1", "wide.avi", str(tmp_path / "clip.avi"), f"{server.url}/nothing")
    (tmp_path / "cams.streams").write_text("# all kinds\n" + "\n".join(lines))
    assert run("--source", tmp_path / "cams.streams", "--save-txt", "--save-csv", "--save-crop") == 0
    out, said = tmp_path / "out/exp", capsys.readouterr().out
    cam = server.url.partition("://")[2].replace(".", "-").replace(":", "_") + "_locked_cam"
    for name, width in ((cam, 64), ("wide", 96), ("clip", 64)):
        count, wide = frames_of(out / f"{name}.mp4")
        assert wide == width
        assert sorted(p.name for p in out.glob(f"labels/{name}_*")) == sorted(f"{name}_{i}.txt" for i in range(1, count + 1))
        assert len(list(out.glob(f"crops/thing/{name}*.jpg"))) == count
    with open(out / "predictions.csv", newline="", encoding="utf-8") as file:
        assert {row["Image Name"] for row in csv.DictReader(file)} == {cam, "wide", "clip"}
    assert {shape[2:] for shape in finder.batches} >= {(64, 64), (32, 64)}
    assert "answers 404" in next(line for line in said.splitlines() if line.startswith("skipped: "))
    assert "locked/cam: broke off after 40 frames; connecting again in 0.05 s (try 1 of 1)" in said
    assert "wide.avi: ended after 8 frames" in said
    assert "4/4" not in said
    assert not any(part in said for part in (SECRET, "s3cret", "admin"))


@pytest.mark.usefixtures("finder")
def test_no_openable_stream_gives_one_line(run, server, tmp_path, capsys):
    assert run("--source", f"{server.url}/nothing") == 1
    assert capsys.readouterr().err == f"detect.py: {server.url}/nothing: the server answers 404 Not Found\n"
    (tmp_path / "cams.streams").write_text(f"{server.url}/a\n{server.url}/b\n")
    assert run("--source", tmp_path / "cams.streams") == 1
    captured = capsys.readouterr()
    assert captured.out.count("skipped: ") == 2
    assert captured.err.startswith("detect.py: none of the 2 streams can be read")
    assert len(captured.err.splitlines()) == 1


@pytest.mark.usefixtures("finder")
def test_images_and_videos_over_http_are_detected(run, server, tmp_path, capsys):
    server.files["/bus%20stop.png"] = cv2.imencode(".png", solid_image(80, 60))[1].tobytes()
    server.files["/clip.avi"] = video(tmp_path / "clip.avi", 9).read_bytes()
    assert run("--source", f"{server.with_password('/bus%20stop.png')}?key=1", "--save-txt") == 0
    assert run("--source", f"{server.url}/clip.avi", "--save-txt", "--vid-stride", "2") == 0
    left = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    clips = {f"exp2/labels/clip_{i}.txt" for i in range(1, 6)}
    assert left == {"exp/bus stop.png", "exp/labels/bus stop.txt", "exp2/clip.mp4"} | clips
    assert frames_of(tmp_path / "out/exp2/clip.mp4") == (5, 64)
    said = capsys.readouterr().out
    assert "image 1/1 http://***@127.0.0.1:" in said
    assert "video frame 5/5 of 1/1" in said


@pytest.mark.usefixtures("finder")
def test_camera_reconnecting_with_another_size_starts_a_new_video(run, tmp_path, monkeypatch):
    captures = [FakeCapture(3, period_s=0.05), FakeCapture(4, size_wh=(96, 32), period_s=0.05), FakeCapture(0), FakeCapture(0)]
    monkeypatch.setattr("data.sources.stream_reader.open_capture", lambda target, patience: captures.pop(0))
    assert run("--source", "0") == 0
    assert [frames_of(tmp_path / "out/exp" / name) for name in ("webcam0.mp4", "webcam0_2.mp4")] == [(3, 64), (4, 96)]


@pytest.mark.usefixtures("finder")
def test_screen_is_captured_until_q_is_pressed(run, tmp_path, monkeypatch):
    class Module:
        MSS, ScreenShotError = FakeScreen, OSError

    shown = []
    monkeypatch.setitem(sys.modules, "mss", Module)
    monkeypatch.setattr("engine.inference.detect._check_machine", lambda config, device: None)
    monkeypatch.setattr(cv2, "imshow", lambda title, image: shown.append((title, image.shape)))
    monkeypatch.setattr(cv2, "waitKey", lambda delay: ord("q") if len(shown) == 3 else -1)
    assert run("--source", "screen 2", "--view-img") == 0
    assert shown == [("screen 2 (q to stop)", (100, 100, 3))] * 3
    assert frames_of(tmp_path / "out/exp/screen2.mp4") == (3, 100)


@pytest.mark.parametrize("display", [None, ":0"])
def test_view_img_without_a_display_is_refused_first(run, tmp_path, monkeypatch, capsys, display):
    def work(*_):
        raise AssertionError("weights are read")

    monkeypatch.setattr("engine.inference.detect.load_network", work)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.delenv("DISPLAY", raising=False)
    if display:
        monkeypatch.setenv("DISPLAY", display)
        monkeypatch.setattr(cv2, "getBuildInformation", lambda: "  GUI:                           NONE\n")
    assert run("--source", "rtsp://camera/1", "--view-img") == 1
    reason = "this OpenCV cannot open windows" if display else "there is no display here"
    said = capsys.readouterr().err
    assert said.startswith(f"detect.py: --view-img: {reason}") or not sys.platform.startswith("linux")
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("finder")
def test_visualize_saves_features_of_the_first_frame_of_each_stream(run, tmp_path, monkeypatch):
    drawn = []

    def note(model, images, folder, report):
        drawn.append((tuple(images.shape), folder.name))

    monkeypatch.setattr("engine.inference.detect.visualize", note)
    for name in ("a", "b"):
        video(tmp_path / f"{name}.avi", 5)
    (tmp_path / "two.streams").write_text("a.avi\nb.avi\n")
    assert run("--source", tmp_path / "two.streams", "--nosave", "--visualize") == 0
    assert sorted(drawn) == [((1, 3, 64, 64), "a"), ((1, 3, 64, 64), "b")]


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_ends_a_run_on_a_silent_camera_immediately(server, tmp_path):
    """Its reader hangs in the network then, for an hour if it may; the video is closed whole, and nothing tells the password."""
    server.deaths, server.stalls = [40], True
    server.files["/live.m3u8"] = b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nseg0.ts\n#EXT-X-ENDLIST\n"
    # FFMPEG quotes the URL of a segment that is missing
    (tmp_path / "cams.streams").write_text(f"{server.with_password('/locked/cam')}\n{server.with_password('/live.m3u8')}\n")
    weights = tiny_checkpoint(tmp_path / "tiny.pt")
    command = [sys.executable, "-c", PATIENT, "--weights", str(weights), "--img", "64", "--device", "cpu", "--save-txt"]
    command += ["--source", str(tmp_path / "cams.streams"), "--project", str(tmp_path / "out"), "--conf", "0.01"]
    log = tmp_path / "log.txt"
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    try:
        while not (server.silent.is_set() and "video frame 2/" in log.read_text()):
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=600) == 130
    finally:
        process.kill()
        process.wait()
    said = log.read_text()
    assert said.splitlines()[-1] == "detect.py: stopped; what was saved so far is complete"
    assert "Traceback" not in said
    (written,) = (tmp_path / "out/exp").glob("*.mp4")
    assert 0 <= frames_of(written)[0] - said.count("video frame ") <= 1  # the interrupt may come between a frame and its line
    assert said.count("video frame ") > 1
    assert f"skipped: http://***@{server.url.partition('://')[2]}/live.m3u8: no video that can be opened" in said
    assert not any(part in said + str(sorted(tmp_path.rglob("*"))) for part in (SECRET, "s3cret", "admin"))
