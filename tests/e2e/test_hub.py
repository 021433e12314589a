"""torch.hub's model: any kind of image in, detect.py's boxes out, and what can be done with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import detect
from engine.inference.image_model import ImageModel
from models import build_model, list_models
from models.spec.config_files import find_config
from tests.stream_sources import camera
from tests.tiny import DUAL_HEAD, NAMES, tiny_cfg, tiny_checkpoint
from utils.errors import UserError
from utils.types import Detections
from utils.visual.savers import ResultWriter

ROOT = Path(__file__).parents[2]
SIZE, CONF = 96, 0.01
SHAPES = {"wide.png": (70, 150), "tall.png": (131, 60), "small.png": (31, 33)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("hub")
    tiny_checkpoint(made / "best.pt", head=DUAL_HEAD)
    (made / "photos").mkdir()
    for seed, (name, (height, width)) in enumerate(SHAPES.items()):
        noise = np.random.default_rng(seed).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        cv2.imwrite(str(made / "photos" / name), cv2.resize(noise, (width, height)))
    return made


@pytest.fixture(scope="module")
def model(folder):
    loaded = torch.hub.load(str(ROOT), "custom", str(folder / "best.pt"), source="local", device="cpu", _verbose=False)
    loaded.conf = CONF
    return loaded


@pytest.fixture(scope="module")
def paths(folder) -> list[Path]:
    return [folder / "photos" / name for name in sorted(SHAPES)]


def boxes_of_detect(folder: Path, monkeypatch: pytest.MonkeyPatch, **flags) -> list[Detections]:
    found: list[Detections] = []
    monkeypatch.setattr(ResultWriter, "write", lambda self, path, image, boxes, **_: found.append(boxes))
    config = detect.DetectConfig(
        weights=str(folder / "best.pt"), source=str(folder / "photos"), imgsz=(SIZE,), conf_thres=CONF, device="cpu",
        project=str(folder / "runs"), **flags,
    )  # fmt: skip
    detect.detect(config)
    return found


def assert_same(results, expected: list[Detections]) -> None:
    assert sum(len(d.scores) for d in expected) > 3, "nothing to compare"
    assert len(results) == len(expected)
    for ours, theirs in zip(results.found, expected):
        assert torch.equal(ours.boxes, theirs.boxes)
        assert torch.equal(ours.scores, theirs.scores)
        assert torch.equal(ours.classes, theirs.classes)


def test_boxes_equal_those_of_detect(folder, model, paths, monkeypatch):
    expected = boxes_of_detect(folder, monkeypatch)
    assert_same(model(paths, size=SIZE), expected)
    arrays = [cv2.cvtColor(cv2.imread(str(p)), cv2.COLOR_BGR2RGB) for p in paths]
    assert_same(model(arrays, size=SIZE), expected)
    assert_same(model([Image.open(p) for p in paths], size=SIZE), expected)
    assert_same(model([str(paths[0]), arrays[1], Image.open(paths[2])], size=(SIZE, SIZE)), expected)
    assert_same(model(paths[1], size=SIZE), expected[1:2])


def test_attributes_act_like_the_flags_of_detect(folder, model, paths, monkeypatch):
    flags = {"classes": (1, 2), "agnostic_nms": True, "max_det": 5, "iou_thres": 0.3}
    expected = boxes_of_detect(folder, monkeypatch, **flags, augment=True)
    model.classes, model.agnostic, model.max_det, model.iou = [1, 2], True, 5, 0.3
    try:
        assert_same(model(paths, size=SIZE, augment=True), expected)
    finally:
        del model.classes, model.agnostic, model.max_det, model.iou
    assert (model.iou, model.max_det) == (0.45, 1000)


def test_tensors_are_used_without_letterbox(model):
    image = torch.randint(0, 255, (3, 70, 100), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    as_bytes, as_floats = model(image), model(image[None] / 255)
    assert len(as_bytes) == len(as_floats) == 1
    assert torch.equal(as_bytes.xyxy[0], as_floats.xyxy[0])
    assert as_bytes.ims[0].shape == (70, 100, 3)
    assert torch.equal(torch.from_numpy(as_bytes.ims[0]).permute(2, 0, 1), image)
    assert as_bytes.xyxy[0][:, [0, 2]].max() <= 100
    assert len(model(torch.rand(2, 3, 64, 64))) == 2


def test_results_have_all_documented_forms(model, paths, folder, capsys):
    results = model(paths, size=SIZE)
    xyxy, xywh, xyxyn, xywhn = results.xyxy[2], results.xywh[2], results.xyxyn[2], results.xywhn[2]
    height, width = results.ims[2].shape[:2]
    assert torch.allclose(xywh[:, 2:4], xyxy[:, 2:4] - xyxy[:, :2], atol=1e-4)
    assert torch.allclose(xyxyn[:, :4] * torch.tensor([width, height, width, height]), xyxy[:, :4], atol=1e-4)
    assert torch.allclose(xywhn[:, 4:], xyxy[:, 4:])
    assert [len(one.xyxy[0]) for one in results] == [len(x) for x in results.xyxy]
    results.print()
    printed = capsys.readouterr().out
    assert "image 3/3" in printed
    assert f"{height}x{width}" in printed
    drawn = results.render()
    assert not np.array_equal(drawn[2], results.ims[2])
    saved = results.save(folder / "saved")
    assert sorted(p.name for p in saved.iterdir()) == sorted(SHAPES)
    assert results.save(folder / "saved").name == "saved2"
    crops = results.crop(save_dir=folder / "cut")
    assert len(crops) == sum(map(len, results.xyxy))
    assert len(list((folder / "cut").rglob("*.jpg"))) == len(crops)
    assert crops[0].label in NAMES
    assert crops[0].im.size


def test_images_are_shown_one_by_one(model, paths, monkeypatch):
    shown: list[tuple[int, int]] = []
    monkeypatch.setattr(Image.Image, "show", lambda self: shown.append(self.size))
    model(paths, size=SIZE).show()
    assert shown == [SHAPES[p.name][::-1] for p in paths]


def test_tables_need_pandas(model, paths, monkeypatch):
    results = model(paths, size=SIZE)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r"needs the package pandas: pip install pandas"):
        results.pandas()

    class Frames:
        @staticmethod
        def DataFrame(rows, columns):
            return [dict(zip(columns, row, strict=True)) for row in rows]

    monkeypatch.setitem(sys.modules, "pandas", Frames)
    tables = results.pandas()
    first = tables.xyxy[2][0]
    assert list(first) == ["xmin", "ymin", "xmax", "ymax", "confidence", "class", "name"]
    assert first["name"] == NAMES[first["class"]]
    assert "xcenter" in tables.xywhn[2][0]


def test_images_of_other_channel_counts_are_accepted(tmp_path):
    deployed = build_model(tiny_cfg() | {"ch": 1, "nc": 3}, names=NAMES).deploy()
    grey = ImageModel(deployed)
    grey.conf = 0.0
    array = np.random.default_rng(0).integers(0, 65535, (50, 70), dtype=np.uint16)
    results = grey([array, array[:, :, None], Image.fromarray(np.zeros((40, 40, 3), np.uint8)), torch.zeros(1, 32, 32)], size=64)
    assert [im.shape for im in results.ims] == [(50, 70, 3)] * 2 + [(40, 40, 3), (32, 32, 3)]
    assert torch.equal(results.xyxy[0], results.xyxy[1])
    with pytest.raises(UserError, match=r"should be \(H, W, 1\), not \(50, 70, 3\)"):
        grey(np.zeros((50, 70, 3), np.uint8))


def test_no_detection_is_supported(model, paths):
    model.conf = 0.9999
    try:
        results = model(paths, size=SIZE)
    finally:
        model.conf = CONF
    assert [x.shape for x in results.xyxyn] == [(0, 6)] * 3
    assert "nothing found" in str(results)
    assert results.crop(save=False) == []


def test_image_url_is_fetched(model, paths):
    with camera() as server:
        server.files["/bus.png"] = paths[0].read_bytes()
        results = model([server.with_password("/locked/bus.png"), paths[0]], size=SIZE)
    torch.testing.assert_close(*results.xyxy)
    assert results.files[0].startswith("http://***@127.0.0.1")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("rtsp://me:PW@host/bus.jpg", r"rtsp://\*\*\*@host/bus.jpg: only http:// and https:// are fetched"),
        ("nowhere.jpg", "nowhere.jpg"),
        (np.zeros((3, 64, 64), np.uint8), r"should be \(H, W, 3\) in RGB order, not \(3, 64, 64\)"),
        (np.zeros((64, 64, 3)), "uint8 or uint16, not float64"),
        (torch.zeros(1, 64, 64, 3), r"should be \(3, H, W\), or a batch"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "not torch.int64"),
        (7, "not int"),
    ],
)
def test_non_image_input_gives_one_line(model, source, says):
    with pytest.raises(UserError, match=says):
        model(source)


ELSEWHERE = """
import sys, torch, numpy as np
root, weights = sys.argv[1:]
model = torch.hub.load(root, "custom", weights, source="local", device="cpu")
results = model(np.zeros((70, 90, 3), np.uint8), size=64)
results.save("here"); results.crop(save_dir="cut"); results.print()
detector = torch.hub.load(root, "custom", weights, autoshape=False, source="local", device="cpu", _verbose=False)
print(type(detector).__name__)
"""


def test_hub_works_from_another_folder(folder, tmp_path):
    """torch.hub takes the project off the import path once the model is there."""
    command = [sys.executable, "-c", ELSEWHERE, str(ROOT), str(folder / "best.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].endswith("3 classes, 0.2 M parameters, on cpu")
    assert lines[-1] == "Model"
    assert (tmp_path / "here" / "image0.jpg").is_file()


def test_every_entry_is_listed_and_named():
    import hubconf

    wanted = {"custom", "yolov9_c", "yolov9_c_FocalModulation", "yolov8n", "yolov8s_p2", "yolov8_CBAM", "yolov5s", "gelan_c"}
    assert wanted <= set(dir(hubconf))
    assert "yolov9-c.pt" in hubconf.yolov9_c.__doc__
    with pytest.raises(AttributeError, match="no entry 'nothing'"):
        hubconf.nothing  # noqa: B018


def test_every_scale_of_a_config_is_an_entry_that_finds_its_file():
    import hubconf

    configs = ("yolo11n-seg", "yolo26n-pose", "yolo11n-obb", "yolov5s-cls", "yolov8n-cls", "yolo12x", "yolov10b", "yolov13l", "yolov5s-seg")
    assert {config.replace("-", "_") for config in configs} <= set(dir(hubconf))
    for config in configs:
        assert f"{config}.pt" in getattr(hubconf, config.replace("-", "_")).__doc__
        assert find_config(config)[0].is_file()
    assert len(hubconf._configs()) == len(list_models()), "two names of models have one entry"


def test_pretrained_weights_say_how_many_classes_they_know(monkeypatch, tmp_path):
    import hubconf

    tiny_checkpoint(tmp_path / "yolo11n-obb.pt", head=DUAL_HEAD)
    monkeypatch.chdir(tmp_path)
    for classes in (None, len(NAMES)):
        loaded = hubconf.yolo11n_obb(pretrained=True, classes=classes, autoshape=False, device="cpu", _verbose=False)
        assert len(loaded.names) == len(NAMES)
    with pytest.raises(UserError, match=f"yolo11n-obb.pt knows {len(NAMES)} classes, not 80"):
        hubconf.yolo11n_obb(pretrained=True, classes=80, device="cpu", _verbose=False)


@pytest.mark.slow
def test_an_entry_builds_its_network():
    fresh = torch.hub.load(str(ROOT), "yolov9_t_FocalModulation", source="local", classes=2, device="cpu")
    assert len(fresh(np.zeros((64, 64, 3), np.uint8), size=64)) == 1
    assert len(fresh.names) == 2
    assert len(torch.hub.load(str(ROOT), "yolov8n_cls", source="local", device="cpu").names) == 1000
