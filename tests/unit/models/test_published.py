"""Published weights: who publishes what, and a download that is looked at before it is kept. Nothing here touches the network."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.error import HTTPError, URLError

import pytest
import torch

import detect
import export
import train
import val
from models.checkpoints.checkpoint import load_checkpoint
from models.checkpoints.published import PUBLISHED, ensure_weights
from utils.errors import UserError


def downloads(monkeypatch: pytest.MonkeyPatch, result: bytes | Exception) -> list[str]:
    """torch.hub's downloader gives this; returns the addresses it was asked for."""
    asked: list[str] = []

    def fetch(url: str, dst: str, **_: object) -> None:
        asked.append(url)
        if isinstance(result, Exception):
            raise result
        Path(dst).write_bytes(result)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    return asked


@pytest.fixture
def checkpoint(tmp_path: Path) -> bytes:
    torch.save({"model.0.weight": torch.zeros(300_000)}, tmp_path / "made.pt")
    return (tmp_path / "made.pt").read_bytes()


def test_all_families_are_known_with_their_licences():
    for name, project, licence in (
        ("yolov5s6.pt", "ultralytics/yolov5", "AGPL-3.0"), ("yolov5nu.pt", "ultralytics", "AGPL-3.0"),
        ("yolov8x.pt", "ultralytics", "AGPL-3.0"),
        ("yolov7-e6e_training.pt", "WongKinYiu/yolov7", "GPL-3.0"), ("yolov9-c-converted.pt", "WongKinYiu/yolov9", "GPL-3.0"),
        ("gelan-c.pt", "WongKinYiu/yolov9", "GPL-3.0"), ("yolov9c.pt", "ultralytics", "AGPL-3.0"),
        ("yolov10b.pt", "THU-MIG/yolov10", "AGPL-3.0"), ("yolo11n.pt", "ultralytics", "AGPL-3.0"),
        ("yolo12x.pt", "ultralytics", "AGPL-3.0"),
        ("yolov12l.pt", "sunsmarterjie/yolov12", "AGPL-3.0"), ("yolo26m.pt", "ultralytics", "AGPL-3.0"),
        ("yolov13x.pt", "iMoonLab/yolov13", "AGPL-3.0"),
        ("yolov5x-seg.pt", "ultralytics/yolov5", "AGPL-3.0"), ("yolov8n-obb.pt", "ultralytics", "AGPL-3.0"),
        ("yolo11n-seg.pt", "ultralytics", "AGPL-3.0"), ("yolo26l-pose.pt", "ultralytics", "AGPL-3.0"),
        ("yolov9e-seg.pt", "ultralytics", "AGPL-3.0"), ("rtdetr-x.pt", "ultralytics", "AGPL-3.0"),
    ):  # fmt: skip
        assert PUBLISHED[name][:2] == (project, licence)
    assert all(re.match(r"https://github\.com/[\w./-]+/releases/download/(v[\d.]+|yolov13)$", r.folder) for r in PUBLISHED.values())


def test_missing_published_file_names_its_publisher_in_one_line(tmp_path):
    with pytest.raises(UserError) as caught:
        load_checkpoint(tmp_path / "yolov9-c.pt")
    assert str(caught.value) == (
        f"{tmp_path}/yolov9-c.pt: not here; WongKinYiu/yolov9 publishes it at "
        "https://github.com/WongKinYiu/yolov9/releases/download/v0.1/yolov9-c.pt under GPL-3.0: add --download to fetch it"
    )
    with pytest.raises(UserError, match=r"no such checkpoint; of published ones, did you mean 'yolov9-c\.pt'\?"):
        load_checkpoint(tmp_path / "yolo9-c.pt")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("yolo11n", r"not here; ultralytics publishes it at https://\S+/v8\.3\.0/yolo11n\.pt under AGPL-3\.0: add --download"),
        ("yolo26x", r"not here; ultralytics publishes it at https://\S+/v8\.4\.0/yolo26x\.pt"),
        ("yolov11s", r"no such checkpoint; of published ones, did you mean 'yolo11s\.pt'\?"),
        ("yolo10n", r"no such checkpoint; of published ones, did you mean 'yolov10n\.pt'\?"),
        ("yolo11q", r"no such checkpoint; of published ones, did you mean 'yolo11[nsmlx]\.pt'\?"),
        ("yolo26n-sem", r"no such checkpoint; a network for semantic segmentation by its name; tasks here are"),
        ("yolov13l", r"not here; iMoonLab/yolov13 publishes it at https://\S+/yolov13/yolov13l\.pt under AGPL-3\.0"),
        ("yolov6n", r"no such checkpoint; YOLOv6 is not here"),
        ("yolo14n", r"no such checkpoint; YOLO14 is not here"),
        ("yolo12n-seg", r"no such checkpoint; YOLO12 has no network for segmentation here; YOLOv5, .* and YOLO26 have one$"),
        ("yolov10n-seg", r"no such checkpoint; YOLOv10 has no network for segmentation here"),
        ("yolo26n-pose", r"not here; ultralytics publishes it at https://\S+/v8\.4\.0/yolo26n-pose\.pt"),
        ("yolov11n-seg", r"no such checkpoint; of published ones, did you mean 'yolo11n-seg\.pt'\?"),
        ("yolo11nn-seg", r"no such checkpoint; of published ones, did you mean 'yolo11n-seg\.pt'\?"),
        ("yolo26n-p2", r"no such checkpoint; not among the published files that --download fetches$"),
        ("yolov3", r"no such checkpoint; not among the published files that --download fetches$"),
        ("rtdetr-l", r"not here; ultralytics publishes it at https://\S+/v8\.3\.0/rtdetr-l\.pt"),
        ("mine", r"no such checkpoint$"),
    ],
)
def test_a_missing_file_is_never_answered_with_the_name_of_another_family(tmp_path, name, says):
    with pytest.raises(UserError, match=says) as caught:
        load_checkpoint(tmp_path / f"{name}.pt")
    assert "\n" not in str(caught.value)


def test_published_file_is_downloaded_only_on_request(tmp_path, monkeypatch, checkpoint, capsys):
    asked = downloads(monkeypatch, checkpoint)
    path = tmp_path / "sub" / "yolov9-c.pt"
    ensure_weights(path, download=False)
    assert not asked
    ensure_weights(path, download=True)
    assert asked == ["https://github.com/WongKinYiu/yolov9/releases/download/v0.1/yolov9-c.pt"]
    assert path.read_bytes() == checkpoint
    said = capsys.readouterr().out
    assert "GPL-3.0" in said
    assert "sha256" in said
    ensure_weights(path, download=True)
    assert len(asked) == 1
    assert [p.name for p in path.parent.iterdir()] == ["yolov9-c.pt"]


@pytest.mark.parametrize(
    ("result", "says"),
    [
        (URLError("[Errno -3] Temporary failure in name resolution"), "cannot be fetched .*Temporary failure in name resolution"),
        (HTTPError("u", 404, "Not Found", None, None), "cannot be fetched .*Not Found"),  # type: ignore[arg-type]
        (TimeoutError("timed out"), "cannot be fetched .*timed out"),
        (RuntimeError("invalid hash value"), "cannot be fetched .*invalid hash"),
        (b"\n<!DOCTYPE html><html>" + b" " * (2 << 20), "gave a web page"),
        (b"PK\3\4" + b"\0" * 100, "gave 104 bytes, too few"),
        (b"PK\3\4" + b"\0" * (2 << 20), "gave a damaged checkpoint"),
        (b"x" * (2 << 20), "gave a damaged checkpoint|gave a pickle"),
    ],
)
def test_download_that_is_no_checkpoint_is_deleted(tmp_path, monkeypatch, result, says):
    downloads(monkeypatch, result)
    with pytest.raises(UserError, match=rf"--download: https://github\.com/\S+/yolov8n\.pt {says}") as caught:
        ensure_weights(tmp_path / "yolov8n.pt", download=True)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_unknown_file_name_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no publisher of yolov9-q\.pt is known; did you mean 'yolov9-"):
        ensure_weights(tmp_path / "yolov9-q.pt", download=True)


@pytest.mark.parametrize("script", [train, val, detect, export], ids=lambda s: s.__name__)
@pytest.mark.parametrize("flag", [False, True])
def test_every_script_has_the_download_flag(script, flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = downloads(monkeypatch, URLError("no network"))
    data = [] if script is export else ["--data", "shapes.yaml"]
    assert script.main(["--weights", "yolov9-c.pt", *data, *(["--download"] if flag else [])]) == 1
    said = capsys.readouterr().err
    assert ("cannot be fetched (no network)" if flag else "WongKinYiu/yolov9 publishes it at") in said
    assert len(asked) == flag
