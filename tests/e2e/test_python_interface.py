"""``results = load_model("best.pt")("a.jpg")``: what people write in Python and in a notebook."""

from __future__ import annotations

import base64
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

import models
from engine import Results, load_model
from engine.inference.image_model import ImageModel
from engine.inference.task_fields import corners
from models import list_blocks, list_models
from models.spec.registry import BLOCKS
from tasks import TASKS
from tests.tiny import NAMES, tiny_checkpoint
from utils.errors import UserError
from utils.types import Detections

SIZE = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("python")
    tiny_checkpoint(made / "best.pt")
    (made / "photos").mkdir()
    for seed, (height, width) in enumerate([(70, 150), (131, 60), (64, 64)]):
        noise = np.random.default_rng(seed).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        cv2.imwrite(str(made / "photos" / f"{seed}.png"), cv2.resize(noise, (width, height)))
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> ImageModel:
    loaded = load_model(folder / "best.pt", device="cpu")
    loaded.conf = 0.01
    return loaded


@pytest.fixture
def one(model: ImageModel, folder: Path) -> Results:
    return model(folder / "photos" / "0.png", imgsz=SIZE)


def test_a_result_has_what_people_ask_of_it(one: Results, model: ImageModel) -> None:
    assert len(one.boxes) == len(one.scores) == len(one.classes) == len(one.class_names) > 3
    assert one.boxes.shape[1] == 4
    assert (one.scores[:-1] >= one.scores[1:]).all()
    assert one.names == NAMES
    assert one.class_names[0] == NAMES[int(one.classes[0])]
    assert torch.equal(one.xyxy[0][:, :4], one.boxes)
    assert one.plot().shape == one.image.shape == (70, 150, 3)
    assert not np.array_equal(one.plot(), one.image)
    assert (one.masks, one.keypoints, one.obb, one.probs) == (None, None, None, None)


def test_folders_globs_and_lists_are_their_images(model: ImageModel, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["0.png", "1.png", "2.png"]
    (folder / "list.txt").write_text("".join(f"{folder}/photos/{name}\n" for name in names))
    for source in (folder / "photos", f"{folder}/photos/*.png", folder / "list.txt"):
        assert [Path(file).name for file in model(source, SIZE).files] == names
    (folder / "photos" / "clip.mp4").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert len(model(folder / "photos", SIZE)) == 3
    (folder / "photos" / "clip.mp4").unlink()
    assert "1 videos are left out" in caplog.text
    assert [len(r) for r in model.stream(folder / "photos", SIZE)] == [1, 1, 1]


def test_several_images_are_a_sequence_of_results(model: ImageModel, folder: Path, one: Results) -> None:
    results = model(folder / "photos", SIZE)
    assert torch.equal(results[0].boxes, one.boxes)
    with pytest.raises(UserError, match=r"boxes is of one image and these are 3: take results\[0\], or loop"):
        results.boxes  # noqa: B018
    with pytest.raises(UserError, match="masks is of one image"):
        results.masks  # noqa: B018
    assert not hasattr(results, "nothing_of_the_kind")
    assert [Path(file).name for file in results[1:].files] == ["1.png", "2.png"]
    assert torch.equal(results[-3].boxes, one.boxes)
    assert len(list(results[:2])) == 2
    with pytest.raises(IndexError, match="results of 3 images have no number 3"):
        results[3]
    assert len(model([])) == 0


def test_settings_of_a_call_are_those_of_detect(model: ImageModel, folder: Path) -> None:
    path = folder / "photos" / "0.png"
    assert len(model(path, SIZE, conf=0.99).boxes) == 0
    assert len(model(path, SIZE, max_det=2).boxes) == 2
    assert set(model(path, SIZE, classes=[1]).classes.tolist()) == {1}
    assert model.conf == 0.01
    with pytest.raises(UserError, match="no setting 'confs'; did you mean 'conf'"):
        model(path, confs=0.5)
    with pytest.raises(UserError, match=r"no setting 'stream'; write for result in model.stream\(source\)"):
        model(path, stream=True)
    with pytest.raises(UserError, match="conf should be from 0 to 1, got 25"):
        model(path, conf=25)


def test_predict_takes_tensors_and_says_where_the_rest_goes(model: ImageModel, folder: Path) -> None:
    predictions = model.predict(torch.rand(2, 3, 64, 64))
    assert predictions.boxes.shape[0] == 2
    network = models.load_model(folder / "best.pt").deploy()
    for bare in (network, network.predict):
        for given in ("a.jpg", np.zeros((64, 64, 3), np.uint8), [torch.zeros(3, 64, 64)]):
            with pytest.raises(UserError, match=r"a network takes a tensor.*from engine import load_model"):
                bare(given)
    with pytest.raises(UserError, match=r"predict\(\) takes a tensor .* 'a.jpg' goes to the model itself"):
        model.predict("a.jpg")
    with pytest.raises(UserError, match="a ndarray goes to the model itself"):
        model.predict(np.zeros((64, 64, 3), np.uint8))


def test_videos_are_detects(model: ImageModel) -> None:
    for source in ("clip.mp4", 0):
        with pytest.raises(UserError, match=r"videos, streams and webcams are read by detect.py --source"):
            model(source)


def test_a_notebook_shows_images_and_escapes_names(model: ImageModel, folder: Path) -> None:
    results = model(folder / "photos", SIZE)
    shown = Results(results.ims, results.found, ("<b>red</b>", "二", "三"), results.files, results.times_ms)._repr_html_()
    assert shown.count("<img src=") == 3
    assert "<b>red" not in shown
    assert "&lt;b&gt;red" in shown
    data = base64.b64decode(shown.split("base64,")[1].split('"')[0])
    assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).shape == (70, 150, 3)


def test_a_notebook_shows_a_strip() -> None:
    shown = Results([np.zeros((1, 20_000, 3), np.uint8)], [Detections.empty()], NAMES, ["a.png"], (0.0, 0.0, 0.0))._repr_html_()
    data = base64.b64decode(shown.split("base64,")[1].split('"')[0])
    assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).shape == (1, 640, 3)


def test_tables_and_supervision_are_asked_for_where_they_are_missing(one: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, call in (("pandas", one.to_dataframe), ("supervision", one.to_supervision)):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=rf"needs the package {package}: pip install {package}"):
            call()
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda rows, columns: [dict(zip(columns, r)) for r in rows]))
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=SimpleNamespace))
    row = one.to_dataframe()[0]
    assert list(row) == ["image", "class", "name", "confidence", "xmin", "ymin", "xmax", "ymax"]
    assert row["name"] == one.class_names[0]
    found = one.to_supervision()
    assert np.array_equal(found.xyxy, one.boxes.numpy())
    assert found.data["class_name"].tolist() == one.class_names
    assert found.mask is None


def result_with(**fields: torch.Tensor) -> Results:
    found = Detections(torch.tensor([[10.0, 20.0, 30.0, 30.0]]), torch.ones(1), torch.zeros(1, dtype=torch.long), fields)
    return Results([np.zeros((40, 50, 3), np.uint8)], [found], NAMES, ["a.png"], (0.0, 0.0, 0.0))


def test_fields_of_a_task_are_attributes(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = np.zeros((1, 40, 50), bool)
    bits[0, 20:30, 11:29] = True
    packed = torch.from_numpy(np.packbits(bits, axis=2))
    masked = result_with(masks=packed, keypoints=torch.ones(1, 17, 3))
    assert np.array_equal(masked.masks.data.numpy(), bits)
    assert len(masked.masks) == len(masked.masks.xy) == 1
    assert masked.keypoints.shape == (1, 17, 3)
    turned = result_with(angle=torch.tensor([[torch.pi / 2]]))
    torch.testing.assert_close(turned.obb, torch.tensor([[20.0, 25.0, 20.0, 10.0, torch.pi / 2]]))
    torch.testing.assert_close(corners(turned.obb)[0], torch.tensor([[25.0, 15.0], [25.0, 35.0], [15.0, 35.0], [15.0, 15.0]]))
    (x1, y1, x2, y2) = Results(turned.ims, turned.found, NAMES, turned.files, turned.times_ms, TASKS["obb"]).boxes[0].tolist()
    assert (x1, y1, x2, y2) == pytest.approx((15, 15, 25, 35))  # the box about it
    own = result_with(colour=torch.tensor([[3]]))
    assert own.colour.item() == 3
    assert own.fields.keys() == {"colour"}
    task = SimpleNamespace(result_fields={"probs": lambda found, hw: found.scores * hw[0]})
    assert Results(own.ims, own.found, NAMES, own.files, own.times_ms, task).probs.item() == 40
    with pytest.raises(AttributeError, match="results have no 'box'; did you mean 'boxes'"):
        own.box  # noqa: B018


def test_what_can_be_built_is_listed() -> None:
    found = list_models("*BiFormer*")
    assert found
    assert all("biformer" in name.lower() for name in found)
    assert found == list_models("biformer")
    assert {"yolov8n", "yolov8", "yolo11s", "yolov9-c-FocalModulation", "yolov8n-p2"} <= set(list_models())
    assert "yolov8n" not in list_models(scales=False)
    assert {"CBAM", "EMA"} <= set(list_blocks(kind="attention"))
    assert "Conv" in list_blocks("conv")
    assert set(list_blocks()) == set(BLOCKS)
    with pytest.raises(UserError, match="did you mean 'attention'"):
        list_blocks(kind="attentions")  # type: ignore[arg-type]
