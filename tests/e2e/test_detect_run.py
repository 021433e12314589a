"""detect.py from the command line to the files it leaves, with a stand-in network that finds bright rectangles and with real ones."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

import detect
from engine.inference import detect as detection
from models.export.exporting import ExportOptions, export_model
from tasks import DETECT
from tests.tiny import DUAL_HEAD, NAMES, tiny_checkpoint, tiny_model
from utils.types import Predictions

BOX = (40, 24, 120, 72)  # xyxy px of the bright rectangle in every test image


class BrightRectangle:
    """Finds the bright rectangle of each image, in px of the network's input."""

    names, nc, ch, stride, task = ("dull", "bright thing/2"), 2, 3, 32, DETECT

    def predict(self, images: Tensor, *, above: float = 0.0) -> Predictions:
        boxes = torch.zeros(len(images), 1, 4)
        for i, image in enumerate(images):
            ys, xs = (image.amin(dim=0) > 0.8).nonzero().unbind(dim=1)
            if len(ys):
                boxes[i, 0] = torch.stack((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
        scores = torch.stack((torch.full((len(images), 1), 0.1), torch.where(boxes.sum(dim=2) > 0, 0.75, 0.0)), dim=2)
        return Predictions(boxes, scores)


@pytest.fixture
def finder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "load_network", lambda weights, device, config: BrightRectangle())


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., int]:
    """Runs detect.py's main with results in tmp_path/out."""

    def call(*arguments: str | Path) -> int:
        return detect.main([*map(str, arguments), "--project", str(tmp_path / "out"), "--device", "cpu"])

    return call


def image(width: int, height: int) -> np.ndarray:
    image = np.full((height, width, 3), 60, np.uint8)
    image[BOX[1] : BOX[3], BOX[0] : BOX[2]] = 255
    return image


def save(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, image)[1])
    return path


def labels(path: Path) -> np.ndarray:
    return np.loadtxt(path, ndmin=2)


@pytest.mark.usefixtures("finder")
@pytest.mark.parametrize(("width", "height"), [(320, 240), (200, 333), (1111, 500), (129, 97)])
@pytest.mark.parametrize("size", [("320",), ("192", "320")])
def test_boxes_are_in_px_of_the_original_image(
    run: Callable[..., int], tmp_path: Path, width: int, height: int, size: tuple[str, ...]
) -> None:
    source = save(tmp_path / "Bilder für uns" / "ein Bild.png", image(width, height))
    assert run("--weights", "x.pt", "--source", source, "--img", *size, "--save-txt", "--save-conf") == 0
    (row,) = labels(tmp_path / "out/exp/labels/ein Bild.txt")
    cx, cy, w, h = row[1:5] * (width, height, width, height)
    px = max(width / 320, height / int(size[0]), 1) + 0.5  # one px of the network's input
    assert row[0] == 1
    assert (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2) == pytest.approx(BOX, abs=px)
    assert row[5] == pytest.approx(0.75, abs=1e-5)
    drawn = cv2.imdecode(np.fromfile(tmp_path / "out/exp/ein Bild.png", np.uint8), cv2.IMREAD_COLOR)
    assert drawn.shape == (height, width, 3)
    assert (drawn != image(width, height)).any()


@pytest.mark.usefixtures("finder")
def test_csv_and_crops_are_written(run: Callable[..., int], tmp_path: Path) -> None:
    for folder in ("a", "b"):
        save(tmp_path / folder / "same.jpg", image(320, 240))
    assert run("--weights", "x.pt", "--source", tmp_path / "*/same.jpg", "--img", "320", "--save-csv", "--save-crop", "--save-txt") == 0
    out = tmp_path / "out/exp"
    assert {p.name for p in out.glob("*.jpg")} == {"same.jpg", "same_2.jpg"}
    assert {p.name for p in out.glob("labels/*")} == {"same.txt", "same_2.txt"}
    with open(out / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [r["Image Name"] for r in rows] == ["same.jpg", "same_2.jpg"]
    assert [(r["Prediction"], r["Confidence"]) for r in rows] == [("bright thing/2", "0.7500")] * 2
    assert [float(rows[0][k]) for k in ("X1", "Y1", "X2", "Y2")] == pytest.approx(BOX, abs=2)
    crops = sorted(out.glob("crops/*/*.jpg"))
    assert [c.relative_to(out / "crops").as_posix() for c in crops] == ["bright thing_2/same.jpg", "bright thing_2/same_2.jpg"]
    crop = cv2.imread(str(crops[0]))
    assert crop.shape[0] == pytest.approx((BOX[3] - BOX[1]) * 1.02 + 10, abs=3)
    assert crop[10:-10, 10:-10].min() > 200  # cut from the image before boxes were drawn on it


@pytest.mark.usefixtures("finder")
def test_no_detection_is_supported(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "dark.png", np.zeros((64, 80, 3), np.uint8))
    flags = ("--save-txt", "--save-csv", "--save-crop", "--img", "64")
    assert run("--weights", "x.pt", "--source", tmp_path / "dark.png", *flags) == 0
    assert "nothing found" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out/exp").iterdir()) == ["dark.png", "predictions.csv"]


@pytest.mark.usefixtures("finder")
def test_a_full_image_is_told(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = save(tmp_path / "in/p.png", image(320, 240)), save(tmp_path / "in/q.png", np.zeros((240, 320, 3), np.uint8))
    for most, told in (("1", True), ("2", False)):
        assert run("--weights", "x.pt", "--source", sources[0].parent, "--img", "320", "--nosave", "--max-det", most) == 0
        assert ("1 images have as many objects as --max-det lets through" in capsys.readouterr().out) == told


@pytest.mark.usefixtures("finder")
def test_flags_filter_detections(run: Callable[..., int], tmp_path: Path) -> None:
    source = save(tmp_path / "p.png", image(320, 240))
    common = ("--weights", "x.pt", "--source", source, "--img", "320")
    assert run(*common, "--nosave") == 0
    assert not (tmp_path / "out").exists()
    for flags in (("--classes", "0"), ("--conf", "0.8"), ("--max-det", "1")):
        assert run(*common, "--nosave", "--save-txt", "--name", flags[0].strip("-"), *flags) == 0
    assert [p.relative_to(tmp_path / "out").as_posix() for p in sorted((tmp_path / "out").rglob("*.txt"))] == ["max-det/labels/p.txt"]
    for _ in range(2):
        assert run(*common, "--name", "again", "--exist-ok") == 0
    assert run(*common, "--name", "again") == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("again*")) == ["again", "again2"]


@pytest.mark.usefixtures("finder")
def test_hidden_labels_and_thickness_change_the_drawing(run: Callable[..., int], tmp_path: Path) -> None:
    source, painted = save(tmp_path / "p.png", image(320, 240)), []
    for i, flags in enumerate([(), ("--hide-conf",), ("--hide-labels",), ("--hide-labels", "--line-thickness", "9")]):
        assert run("--weights", "x.pt", "--source", source, "--img", "320", "--name", f"r{i}", *flags) == 0
        painted.append(int((cv2.imread(str(tmp_path / f"out/r{i}/p.png")) != image(320, 240)).any(axis=2).sum()))
    assert painted[0] > painted[1] > painted[2]
    assert painted[3] > painted[2]


def video(path: Path, frames: int) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (320, 240))
    if not writer.isOpened():
        pytest.skip("this OpenCV cannot write videos")
    for _ in range(frames):
        writer.write(image(320, 240))
    writer.release()
    return path


@pytest.mark.usefixtures("finder")
@pytest.mark.parametrize(("stride", "frames"), [(1, 7), (3, 3)])
def test_video_input_gives_video_output(run: Callable[..., int], tmp_path: Path, stride: int, frames: int) -> None:
    source = video(tmp_path / "clip.mp4", 7)
    assert run("--weights", "x.pt", "--source", source, "--img", "320", "--save-txt", "--save-csv", "--vid-stride", str(stride)) == 0
    out = tmp_path / "out/exp"
    assert sorted(p.name for p in out.glob("labels/*")) == [f"clip_{i}.txt" for i in range(1, frames + 1)]
    capture = cv2.VideoCapture(str(out / "clip.mp4"))
    assert int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) == frames
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(10 / stride, rel=0.01)
    drawn = capture.read()[1].astype(int)
    assert np.abs(drawn[BOX[1] : BOX[3], BOX[0]] - image(320, 240)[BOX[1] : BOX[3], BOX[0]]).mean() > 30  # an edge of the box
    assert (out / "predictions.csv").read_text().splitlines()[-1].split(",")[3] == str(frames)


@pytest.mark.usefixtures("finder")
def test_unreadable_files_give_one_line_each(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "in/good.jpg", image(320, 240))
    (tmp_path / "in/text.jpg").write_text("not an image")
    (tmp_path / "in/empty.png").touch()
    assert run("--weights", "x.pt", "--source", tmp_path / "in", "--img", "320") == 0
    text = capsys.readouterr().out
    assert sum(line.startswith("skipped: ") for line in text.splitlines()) == 2
    assert "2 skipped, for the reasons above" in text
    assert [p.name for p in (tmp_path / "out/exp").iterdir()] == ["good.jpg"]


@pytest.mark.usefixtures("finder")
@pytest.mark.parametrize("augment", [False, True])
def test_list_of_files_and_augmentation(run: Callable[..., int], tmp_path: Path, augment: bool) -> None:
    paths = [save(tmp_path / f"p{i}.png", image(320, 240)) for i in range(2)]
    (tmp_path / "list.txt").write_text("\n".join(map(str, paths)), encoding="utf-8")
    flags = ("--augment",) if augment else ()
    assert run("--weights", "x.pt", "--source", tmp_path / "list.txt", "--img", "320", "--save-txt", *flags) == 0
    for name in ("p0", "p1"):
        (row,) = labels(tmp_path / f"out/exp/labels/{name}.txt")  # all versions of the image agree on one box
        assert row[1:3] * (320, 240) == pytest.approx([80, 48], abs=2)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One network as checkpoint (with auxiliary branches), ONNX and TorchScript, of fixed and of free size."""
    folder = tmp_path_factory.mktemp("weights")
    found = {"pt": tiny_checkpoint(folder / "tiny.pt", head=DUAL_HEAD)}
    for name, suffix, options in (
        ("onnx", ".onnx", ExportOptions(imgsz=(96, 96))),
        ("onnx", "-dynamic.onnx", ExportOptions(imgsz=(96, 96), dynamic=True)),
        ("torchscript", ".torchscript", ExportOptions(imgsz=(96, 96), dynamic=True)),
        ("onnx_end2end", "-end2end.onnx", ExportOptions(imgsz=(96, 96), dynamic=True, conf=0.01)),
    ):
        path = folder / f"tiny{suffix}"
        export_model(tiny_model(head=DUAL_HEAD), name, path, options)
        found[suffix] = path
    return found


def test_exported_files_detect_like_the_checkpoint(run: Callable[..., int], tmp_path: Path, weights: dict[str, Path]) -> None:
    save(tmp_path / "p.jpg", np.random.default_rng(0).integers(0, 255, (40, 103, 3), np.uint8))
    flags = ("--source", tmp_path / "p.jpg", "--img", "96", "--conf", "0.5", "--save-txt", "--save-conf")
    for name, path in weights.items():
        assert run("--weights", path, *flags, "--name", f"run{name}") == 0
    expected = labels(tmp_path / "out/runpt/labels/p.txt")
    assert len(expected) > 3
    for name in ("-dynamic.onnx", ".torchscript", "-end2end.onnx"):
        np.testing.assert_allclose(labels(tmp_path / f"out/run{name}/labels/p.txt"), expected, atol=1e-4)
    assert len(labels(tmp_path / "out/run.onnx/labels/p.txt")) > 3  # square, so it sees another border


def test_checkpoint_is_deployed(weights: dict[str, Path]) -> None:
    model = detection.load_network(weights["pt"], torch.device("cpu"), detect.DetectConfig())
    assert model.head.branch_weights == (1.0,)
    assert model.spec.fused
    assert model.names == NAMES


def test_feature_maps_of_every_layer(run: Callable[..., int], tmp_path: Path, weights: dict[str, Path]) -> None:
    source = save(tmp_path / "p.png", image(320, 240))
    assert run("--weights", weights["pt"], "--source", source, "--img", "96", "--visualize") == 0
    made = sorted((tmp_path / "out/exp/features/p").glob("*.png"))
    assert [m.name[:3] for m in made] == [f"{i:03d}" for i in range(8)]
    assert all(cv2.imread(str(m)).std() > 0 for m in made)


def test_without_weights_the_newest_run_and_its_data_are_taken(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("--img", "96") == 1
    assert "train first" in capsys.readouterr().err
    save(tmp_path / "set/images/val/v.jpg", image(320, 240))
    (tmp_path / "set/data.yaml").write_text("train: images/val\nval: images/val\nnames: [a, b, c]\n")
    tiny_checkpoint(tmp_path / "runs/train/exp7/weights/best.pt", config={"data": str(tmp_path / "set/data.yaml")})
    assert run("--img", "96") == 0
    text = capsys.readouterr().out
    assert "no --weights: taking the newest run's, runs/train/exp7/weights/best.pt" in text
    assert "no --source: taking the 1 validation images" in text
    assert (tmp_path / "out/exp/v.jpg").is_file()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--dnn",), "--dnn: "),
        (("--half",), "--half: needs a GPU"),
        (("--view-img",), "--view-img: "),
        (("--classes", "3"), "--classes 3: .* 0 to 2"),
        (("--source", "screen"), "mss|no display"),
        (("--source", "file:///p.png"), "without file://"),
        (("--source", "nowhere.jpg"), "nowhere.jpg"),
        (("--conf", "25"), "--conf-thres 25"),
        (("--vid-stride", "0"), "--vid-stride 0"),
        (("--slice", "0"), "--slice 0"),
        (("--slice", "31", "64"), "--slice 31 64: whole numbers of at least 32 are needed"),
        (("--slice", "64", "--slice-overlap", "-0.1"), "--slice-overlap -0.1: .* from 0 to 0.9"),
        (("--slice-overlap", "0.1"), "--slice-overlap: belongs to --slice"),
        (("--imgsz", "1", "2", "3"), "--imgsz 1 2 3"),
        (("--device", "7"), "--device 7"),
        (("--plugins", "mine.py"), "mine.py"),
    ],
)
def test_unsupported_requests_give_one_line(
    run: Callable[..., int], tmp_path: Path, weights: dict, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...], said: str,
) -> None:  # fmt: skip
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    source = save(tmp_path / "p.png", image(320, 240))
    assert detect.main(["--weights", str(weights["pt"]), "--source", str(source), "--project", str(tmp_path / "out"), *flags]) == 1
    text = capsys.readouterr().err
    assert text.startswith("detect.py: ")
    assert len(text.splitlines()) == 1
    assert re.search(said, text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        (".onnx", ("--img", "64"), "--imgsz 64 64: .* made for 96 96"),
        (".onnx", ("--augment",), "--augment: "),
        (".onnx", ("--visualize",), "--visualize: "),
        ("damaged.onnx", (), "not an ONNX model"),
        ("damaged.pt", (), "not a checkpoint"),
        ("absent.pt", (), "no such"),
    ],
)
def test_unsuitable_weights_give_one_line(
    run: Callable[..., int], tmp_path: Path, weights: dict, capsys: pytest.CaptureFixture[str], name: str, flags: tuple[str, ...], said: str
) -> None:
    for suffix in ("onnx", "pt"):
        (tmp_path / f"damaged.{suffix}").write_bytes(b"not a model")
    source = save(tmp_path / "p.png", image(320, 240))
    assert run("--weights", weights.get(name, tmp_path / name), "--source", source, *flags) == 1
    text = capsys.readouterr().err
    assert re.search(said, text)
    assert len(text.splitlines()) == 1


@pytest.mark.usefixtures("finder")
def test_unwritable_project_gives_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "p.png", image(320, 240))
    assert detect.main(["--weights", "x.pt", "--source", str(source), "--project", str(source / "runs")]) == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.usefixtures("finder")
def test_interruption_gives_one_line(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(detection, "save_frame", interrupted)
    assert run("--weights", "x.pt", "--source", save(tmp_path / "p.png", image(320, 240))) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.usefixtures("finder")
def test_python_interface(tmp_path: Path) -> None:
    save(tmp_path / "p.png", image(320, 240))
    config = detect.DetectConfig(weights=tmp_path / "x.pt", source=tmp_path / "p.png", imgsz=320, project=tmp_path / "out", device="cpu")
    report = detect.detect(config)
    assert (report.frames, report.detections, report.skipped) == (1, 1, [])
    assert report.folder == tmp_path / "out/exp"
    assert report.written == {"images": 1}
    assert set(report.seconds) == {"reading and letterbox", "pre-process", "inference", "NMS", "drawing and saving"}
