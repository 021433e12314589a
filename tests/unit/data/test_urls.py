"""What of a URL is shown, and images fetched from one."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from data.images.reading import ImageError
from data.sources import urls
from data.sources.urls import plain_name, read_remote_image, redacted
from tests.stream_sources import SECRET, camera, solid_image


@pytest.mark.parametrize(
    ("url", "shown", "name"),
    [
        ("rtsp://cam.local:8554/stream1", "rtsp://cam.local:8554/stream1", "cam-local_8554_stream1"),
        ("RTSP://Admin:PW@192.168.1.10/live", "rtsp://***@192.168.1.10/live", "192-168-1-10_live"),
        ("rtsp://admin:p@PW@cam/live", "rtsp://***@cam/live", "cam_live"),
        ("rtsp://admin:p/PW@cam/live", "rtsp://***@cam/live", "cam_live"),
        ("rtsp://admin:12/PW@cam/live", "rtsp://***@cam/live", "cam_live"),
        ("rtsp://admin:p?PW@cam/live", "rtsp://***@cam/live", "cam_live"),
        ("rtsp://admin:p#PW@cam/live", "rtsp://***@cam/live", "cam_live"),
        ("http://cam/video?user=admin&password=PW", "http://cam/video", "cam_video"),
        ("rtsp://cam/user=admin_password=PW_channel=1.sdp", "rtsp://cam/user=admin_password=***", "cam_user_admin_password"),
        ("admin:PW@cam/live", "***@cam/live", "cam_live"),
        ("http://[::1]:80/a/../b", "http://[::1]:80/a/../b", "1_80_a_--_b"),
        ("http://", "http://", "stream"),
    ],
)
def test_passwords_are_redacted(url, shown, name):
    assert redacted(url) == shown
    assert plain_name(url) == name
    assert "PW" not in redacted(url) + plain_name(url)


def test_names_are_short():
    assert len(plain_name("rtsp://cam/" + "x" * 500)) == 60


@pytest.fixture(scope="module")
def server():
    with camera() as state:
        state.files["/über uns.png"] = state.files["/%C3%BCber%20uns.png"] = cv2.imencode(".png", solid_image(40, 30))[1].tobytes()
        state.files["/deep.png"] = cv2.imencode(".png", np.full((12, 14, 3), 40000, np.uint16))[1].tobytes()
        state.files["/text.jpg"], state.files["/empty.jpg"] = b"<html>no image</html>", b""
        yield state


def test_an_image_is_fetched_and_decoded(server):
    image = read_remote_image(f"{server.url}/über uns.png?size=large")
    np.testing.assert_array_equal(image, solid_image(40, 30))
    assert server.requests[-1][0] == "/%C3%BCber%20uns.png?size=large"
    assert read_remote_image(f"{server.url}/deep.png").dtype == np.uint16
    assert read_remote_image(f"{server.url}/deep.png", channels=1).shape == (12, 14, 1)


def test_a_password_is_sent_to_the_host_that_asks_for_it_only(server):
    assert read_remote_image(server.with_password("/locked/deep.png")).shape == (12, 14, 3)
    read_remote_image(server.with_password("/deep.png"))
    assert server.requests[-1] == ("/deep.png", "")  # nobody asked


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/nothing.jpg", "the server answers 404 Not Found"),
        ("/text.jpg", "not an image that can be read"),
        ("/empty.jpg", "the file is empty"),
    ],
)
def test_unreadable_url_gives_one_line_without_the_password(server, path, said):
    with pytest.raises(ImageError) as caught:
        read_remote_image(server.with_password(path))
    assert said in str(caught.value)
    assert str(caught.value).startswith("http://***@127.0.0.1:")
    assert not any(part in str(caught.value) for part in (SECRET, "s3cret", "admin", "\n"))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://admin:PW@127.0.0.1:1/a.jpg", "Connection refused"),
        ("http://admin:PW@127.0.0.1:port/a.jpg", "not a valid URL"),
        ("http://admin:x/PW@127.0.0.1/a.jpg", "not a valid URL"),
        ("file:///etc/PW@x.jpg", "only http"),
        ("ftp://admin:PW@host/a.jpg", "only http"),
    ],
)
def test_unreachable_urls_are_refused(url, said):
    with pytest.raises(ImageError, match=said) as caught:
        read_remote_image(url)
    assert "PW" not in str(caught.value)


def test_limits_of_size_and_time(server, monkeypatch):
    server.files["/large.jpg"] = bytes(2000)
    monkeypatch.setattr(urls, "MAX_BYTES", 1000)
    with pytest.raises(ImageError, match="larger than"):
        read_remote_image(f"{server.url}/large.jpg")
    monkeypatch.undo()
    monkeypatch.setattr(urls, "DOWNLOAD_S", 0.3)
    with pytest.raises(ImageError, match="not downloaded after"):
        read_remote_image(f"{server.url}/cam")  # which never ends
    monkeypatch.setattr(urls, "ANSWER_S", 0.2)
    server.deaths, server.stalls = [0], True
    with pytest.raises(ImageError, match="no answer within"):
        read_remote_image(f"{server.url}/cam")
