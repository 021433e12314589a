"""The screen as a source, with a stand-in for the package that reads it."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from data.sources.opening import open_source
from tests.stream_sources import FakeScreen
from utils.errors import UserError


@pytest.fixture(params=["mss", "MSS"])  # the older and the newer name
def mss(request, monkeypatch):
    module = ModuleType("mss")
    module.ScreenShotError = type("ScreenShotError", (Exception,), {})
    setattr(module, request.param, FakeScreen)
    monkeypatch.setitem(sys.modules, "mss", module)
    return module


@pytest.mark.usefixtures("mss")
@pytest.mark.parametrize(
    ("source", "size_hw", "first_column", "called"),
    [
        ("screen", (100, 300), 0, "screen0"),
        ("screen 2", (100, 100), 100, "screen2"),
        ("Screen 10 20 64 32", (32, 64), 5, "screen0"),
        ("screen 2 10 20 64 32", (32, 64), 105, "screen2"),
    ],
)
def test_whole_screens_and_parts(source, size_hw, first_column, called):
    frames = iter(open_source(source, imgsz=64))
    first, second = next(frames), next(frames)
    assert first.image.shape == (*size_hw, 3)
    assert (first.image[0, 0].tolist(), second.image[0, 0].tolist()) == ([1, 0, first_column], [2, 0, first_column])  # RGB
    assert (first.path, first.output_name) == (f"screen {called[-1]}", called)
    assert (first.video.number, second.video.number, first.video.frames, first.total) == (0, 1, 0, 1)


@pytest.mark.usefixtures("mss")
def test_one_channel_network_gets_grey_captures():
    assert next(iter(open_source("screen 1", imgsz=64, channels=1))).image.shape == (100, 200, 1)


@pytest.mark.usefixtures("mss")
@pytest.mark.parametrize(
    ("source", "more", "said"),
    [
        ("screen 3", {}, "there is no screen 3; known are 0 .all as one. to 2"),
        ("screen one", {}, "'screen N LEFT TOP WIDTH HEIGHT' is expected"),
        ("screen 1 2 3", {}, "is expected"),
        ("screen 2 50 0 64 32", {}, r"64x32 px at \(50, 0\) do not lie within screen 2 of 100x100 px"),
        ("screen 0 0 0 32", {}, "64x32|0x32"),
        ("screen", {"vid_stride": 2}, "--vid-stride 2"),
        ("screen", {"channels": 4}, "4 are expected"),
    ],
)
def test_invalid_screen_regions_are_refused(source, more, said):
    with pytest.raises(UserError, match=said):
        open_source(source, imgsz=64, **more)


def test_missing_mss_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mss", None)
    with pytest.raises(UserError, match="pip install mss"):
        open_source("screen 0", imgsz=64)


def test_missing_display_is_an_error(mss):
    def no_display():
        raise mss.ScreenShotError("Unable to open\ndisplay")

    mss.MSS = no_display
    with pytest.raises(UserError, match=r"there is no display that can be read here .Unable to open display."):
        open_source("screen", imgsz=64)


def test_lost_display_is_an_error(mss, monkeypatch):
    source = open_source("screen", imgsz=64)

    def gone(self, area):
        raise mss.ScreenShotError("connection lost")

    monkeypatch.setattr(FakeScreen, "grab", gone)
    with pytest.raises(UserError, match="connection lost"):
        next(iter(source))


def test_file_named_screen_takes_precedence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("screen", "screenshots"):
        (tmp_path / folder).mkdir()
        with pytest.raises(UserError, match="no image and no video in this folder"):
            open_source(folder, imgsz=64)
