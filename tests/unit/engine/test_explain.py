"""explain() and explain.py: any head, any image, chosen detections, files and a page that opens offline."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import explain as script
from engine.explain import explain
from engine.explain.comparing import explain_as
from engine.explain.explaining import ExplainOptions
from engine.explain.figures import cam_figure
from engine.explain.numbers import RANDOM, faithfulness_of
from engine.explain.page import Section, write_page
from engine.inference.image_model import ImageModel
from models import build_model
from models.analysis.explained_targets import Target, TargetRequest, candidates_of, choose_target
from models.analysis.faithfulness import Faithfulness, faithfulness, randomised, rank_correlation
from tasks import DETECT
from tests.golden import assert_close, fill_
from tests.image_files import write_images
from tests.tiny import DUAL_HEAD, NAMES, tiny_cfg, tiny_checkpoint, tiny_model
from utils.cli.explain_arguments import METHODS, ExplainConfig, parse_arguments
from utils.errors import UserError
from utils.nms import Suppression
from utils.types import Detections, Predictions

LOW = Suppression(conf=0.02, max_det=20)
OPTIONS = ExplainOptions(suppression=LOW, hw=(96, 96))
END_TO_END = [[3, 4, 7], 1, "v10Detect", ["nc"]]
ANCHORS = [[3, 4, 7], 1, "Detect", ["nc", "anchors"]]


def photo(height: int = 80, width: int = 120, channels: int = 3, dtype: type = np.uint8) -> np.ndarray:
    image = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, channels), dtype=np.uint8)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC).reshape(height, width, channels)
    return image if dtype is np.uint8 else image.astype(np.uint16) * 200


def heads():
    """A network of each kind of head."""
    yield "one branch", tiny_model()
    yield "two branches", tiny_model(head=DUAL_HEAD)
    yield "end to end", tiny_model(head=END_TO_END)
    yield "anchors", fill_(build_model(tiny_cfg(head=ANCHORS), names=NAMES), 1.35).eval()


@pytest.mark.parametrize(("name", "model"), list(heads()), ids=[name for name, _ in heads()])
def test_every_head_can_be_explained(name, model):
    found = explain(model, photo(), replace(OPTIONS, methods=METHODS))
    assert list(found.titles) == [3, 4, 7]
    assert set(found.planes) == set(METHODS)
    for method in METHODS:
        assert found.planes[method].max() == pytest.approx(1.0)
        assert found.planes[method].min() >= 0
        assert [cam.shape for cam in found.cams[method].values()] == [(8, 12), (4, 6), (2, 3)]
    assert found.map.shape == (80, 120)
    assert found.overlay().shape == (80, 120, 3)
    assert found.modules


def test_deployed_network_can_be_explained():
    found = explain(tiny_model(head=DUAL_HEAD).deploy(), photo(), OPTIONS)
    assert found.planes["layercam"].max() == pytest.approx(1.0)


@pytest.mark.parametrize("quantity", ["score", "box", "both"])
def test_one_detection_is_explained_by_its_own_candidate(quantity):
    model = tiny_model()
    whole = explain(model, photo(), OPTIONS)
    assert len(whole.found) >= 2
    one = explain(model, photo(), OPTIONS, target=1, quantity=quantity)
    assert one.chosen == (1,)
    place, label = int(one.target.candidates[0]), int(one.target.classes[0])
    assert label == int(whole.found.classes[1])
    assert_close(one.trace.predictions.scores[0, place, label], whole.found.scores[1])
    assert one.target.text.startswith(f"detection 1: {NAMES[label]}")
    assert not np.allclose(one.map, whole.map)


def test_targets_are_found_among_equal_scores_by_their_boxes():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [50, 50, 60, 60], [20, 20, 30, 30]]])
    predictions = Predictions(boxes, torch.tensor([[[0.5, 0.1], [0.5, 0.1], [0.2, 0.6]]]))
    found = Detections(boxes[0, [2, 1]], torch.tensor([0.6, 0.5]), torch.tensor([1, 0]))
    assert candidates_of(found, predictions).tolist() == [2, 1]
    target, chosen = choose_target(predictions, found, TargetRequest(classes=(0,)), NAMES)
    assert (target.candidates.tolist(), chosen.tolist()) == ([1], [1])
    assert target.value(predictions, (100, 100)) == pytest.approx(0.5)
    box = Target(torch.tensor([0, 1]), torch.tensor([0, 0]), "box")
    assert box.value(predictions, (100, 200)) == pytest.approx(2 * (10 / 100 + 10 / 200))


def test_detection_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"target 99: the image has \d+ detections, 0 to \d+"):
        explain(tiny_model(), photo(), OPTIONS, target=99)
    with pytest.raises(UserError, match="unknown option 'taget'"):
        explain(tiny_model(), photo(), OPTIONS, taget=1)


def test_nothing_found_explains_the_best_candidates():
    found = explain(tiny_model(), photo(), replace(OPTIONS, suppression=Suppression(conf=0.9999)), classes=1)
    assert found.target.text.startswith(f"nothing found of {NAMES[1]}: the 10 best candidates")
    assert set(found.target.classes.tolist()) == {1}
    assert found.chosen == ()
    assert found.map.max() > 0


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (3, np.uint16), (5, np.uint8), (1, np.uint16)])
def test_grey_deep_and_multi_channel_images(channels, dtype, tmp_path):
    cfg = tiny_cfg() | {"ch": channels}
    model = fill_(build_model(cfg, names=NAMES), 1.35).eval()
    found = explain(model, photo(channels=channels, dtype=dtype), OPTIONS)
    assert found.overlay().shape == (80, 120, 3)
    assert found.save(tmp_path)


def test_large_image_keeps_its_map_small(tmp_path):
    found = explain(tiny_model(), photo(2400, 3200), OPTIONS)
    assert found.planes["layercam"].shape == (72, 96)
    assert found.map.shape == (2400, 3200)
    (figure, *_) = found.save(tmp_path)
    assert max(cv2.imread(str(figure)).shape) < 3000


def test_files_hold_the_maps(tmp_path):
    found = explain(tiny_model(), photo(), replace(OPTIONS, methods=("layercam", "gradcam++")))
    figures = found.save(tmp_path, stem="a")
    assert {path.name for path in figures} >= {"a_layercam.png", "a_gradcam++.png", "a_row07_FocalModulation.png"}
    assert_close(np.load(tmp_path / "a_layercam.npy"), found.planes["layercam"])
    assert_close(np.load(tmp_path / "a_gradcam++_row4.npy"), found.cams["gradcam++"][4])


def test_place_of_interest_is_given_in_px_of_the_image():
    found = explain(tiny_model(), photo(), OPTIONS, query_xy=(60.0, 40.0))
    x, y = found.placement.fractions_to_image(torch.tensor((found.query.x, found.query.y))).tolist()
    assert (x, y) == pytest.approx((0.5, 0.5))


def test_same_object_in_the_same_network_gives_the_same_map():
    model = tiny_model()
    one = explain(model, photo(), OPTIONS, target=0)
    again = explain_as(one, model, OPTIONS)
    assert_close(again.map, one.map, tol=1e-3)
    assert "score · IoU" in again.target.text


def test_other_network_without_the_class_is_named():
    other = tiny_model(names=("blood", "x", "y"))
    with pytest.raises(UserError, match="the other network has no class"):
        explain_as(explain(tiny_model(), photo(), OPTIONS), other, OPTIONS)


def test_random_weights_give_another_map():
    model = tiny_model()
    one = explain(model, photo(), OPTIONS)
    other = explain_as(one, randomised(model), OPTIONS)
    assert rank_correlation(torch.from_numpy(one.map), torch.from_numpy(one.map)) == pytest.approx(1.0)
    assert rank_correlation(torch.from_numpy(one.map), torch.from_numpy(other.map)) < 0.8


class Brightness(torch.nn.Module):
    """A detector of one object whose score is how much of it is seen as it was: 1 where the pixels of its box are all bright."""

    box = (8, 8, 24, 24)
    task = DETECT

    def predict(self, images: torch.Tensor) -> Predictions:
        x1, y1, x2, y2 = self.box
        boxes = torch.tensor([self.box], dtype=torch.float32).expand(len(images), 1, 4)
        return Predictions(boxes, images[:, :, y1:y2, x1:x2].mean((1, 2, 3)).view(-1, 1, 1))


def test_a_right_map_is_more_faithful_than_a_random_and_a_wrong_one():
    images = torch.zeros(1, 1, 32, 32)
    images[..., 8:24, 8:24] = 1
    right = images[0, 0].clone()
    scene = {"boxes_xyxy": torch.tensor([[8.0, 8, 24, 24]]), "classes": torch.tensor([0])}

    def of(cam: torch.Tensor) -> Faithfulness:
        return faithfulness(Brightness(), images, cam, **scene)

    random = torch.rand(32, 32, generator=torch.Generator().manual_seed(0))
    areas = [(one.deletion_area, one.insertion_area) for one in map(of, (right, random, -right))]
    assert areas[0][0] < areas[1][0] < areas[2][0]
    assert areas[0][1] > areas[1][1] > areas[2][1]
    assert of(right).deletion[0] == of(right).insertion[-1] == pytest.approx(1.0)


def test_faithfulness_is_measured_against_a_random_order():
    found = explain(tiny_model(), photo(), OPTIONS)
    assert set(faithfulness_of(tiny_model(), found)) == {"layercam", RANDOM}


def test_page_is_self_contained_and_harmless(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), photo())
    section = Section(
        "<b>$name_%</b>\n", ["a & b"], [(tmp_path / "a.png", 'x" onload="y')], [(tmp_path / "missing.png", "m")], [["k"], ["<i>"]]
    )
    write_page(tmp_path / "index.html", "<title>", [section, Section("two")])
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<b>" not in text
    assert 'onload="y' not in text
    assert "<i>" not in text
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", text)
    assert "<script" not in text


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "best.pt")


def test_command_line_writes_figures_arrays_and_a_page(checkpoint, tmp_path, capsys):
    write_images(tmp_path / "data", {"train": [[]], "val": [[(0, 0.5, 0.5, 0.3, 0.3)]]}, names=NAMES)
    (tmp_path / "data" / "images" / "val" / "broken.jpg").write_bytes(b"no image")
    argv = [
        "--weights",
        checkpoint,
        "--source",
        tmp_path / "data/images/val",
        "--imgsz",
        "64",
        "--conf",
        "0.02",
        "--project",
        tmp_path / "runs",
    ]
    argv += ["--compare", checkpoint, "--faithfulness", "--sanity", "--receptive-field", "--errors", "--data", tmp_path / "data/data.yaml"]
    assert script.main([*map(str, argv), "--method", "layercam", "eigencam", "--panels", "3"]) == 0
    folder = tmp_path / "runs" / "exp"
    names = {path.name for path in folder.iterdir()}
    assert {"index.html", "0000_0_layercam.png", "0000_0_layercam.npy", "0000_0_row07_FocalModulation.png"} <= names
    assert {"0000_0_compared_eigencam.png", "0000_0_random_weights.png", "receptive_fields.png"} <= names
    assert any(name.startswith("errors_") for name in names)
    out = capsys.readouterr().out
    assert "skipped: " in out
    assert "images explained: 1, compared with labels: 1, figures: " in out
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert "deletion" in text
    assert "cost in AP50" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--method", "scorecam"], "--method scorecam: one of layercam"),
        (["--query", "3"], "--query 3: x and y"),
        (["--no-cam", "--sanity"], "--no-cam"),
        (["--no-cam", "--compare", "other.pt"], "--no-cam: .*--compare"),
        (["--no-cam", "--no-modules"], "leave nothing to draw"),
        (["--no-cam", "--no-modules", "--errors", "--source", "a.jpg"], "leave nothing to draw"),
        (["--errors", "--imgsz", "480", "640"], "--imgsz 480 640: --errors fits the longer side"),
        (["--layer", "3"], "--layer: write --rows"),
    ],
)
def test_wrong_flags_are_one_line(argv, message):
    with pytest.raises(UserError, match=message):
        parse_arguments(argv)
    assert ExplainConfig().rows is None


def test_exported_file_and_unknown_class_are_refused(tmp_path, checkpoint):
    with pytest.raises(UserError, match="an exported file shows nothing of its rows"):
        script.explain(ExplainConfig(weights=str(tmp_path / "a.onnx"), project=str(tmp_path)))
    with pytest.raises(UserError, match="--classes 7: the network knows the classes 0 to 2"):
        script.explain(ExplainConfig(weights=str(checkpoint), classes=(7,), project=str(tmp_path)))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"rows": (999,)}, "--rows: row 999: .* has the rows 0 to"),
        ({"modules": (999,)}, r"--modules: row 999: no attention module there; rows that have one: \d"),
        ({"target": (99,)}, "no image could be explained"),
        ({"query": (5000, 5000)}, "no image could be explained"),
    ],
)
def test_what_no_image_has_is_refused_and_leaves_no_run_folder(tmp_path, checkpoint, capsys, flags, says):
    write_images(tmp_path / "data", {"val": [[]]}, names=NAMES)
    source = str(tmp_path / "data" / "images" / "val")
    with pytest.raises(UserError, match=says):
        script.explain(ExplainConfig(weights=str(checkpoint), source=source, imgsz=(64, 64), project=str(tmp_path / "runs"), **flags))
    assert not list((tmp_path / "runs").glob("*"))
    if "query" in flags:
        assert "query 5000 5000: lies outside of the image of " in capsys.readouterr().out


def test_wrong_arguments_of_the_function_are_one_line():
    with pytest.raises(UserError, match="expected a model, as load_model gives it, got str"):
        explain("best.pt", photo())
    model = tiny_model()
    with pytest.raises(UserError, match="classes 50: the network knows the classes 0 to 2"):
        explain(model, photo(), OPTIONS, classes=[50])
    first = int(explain(model, photo(), OPTIONS).found.classes[0])
    with pytest.raises(UserError, match=f"target 0: is {NAMES[first]}, and the classes asked for are {NAMES[first - 1]}"):
        explain(model, photo(), OPTIONS, target=0, classes=(first - 1) % 3)
    assert explain(model, photo(), OPTIONS, target=(1, 1)).target.text.startswith("detection 1: ")


def test_the_model_that_takes_images_can_be_explained_with_all_that_it_takes(tmp_path):
    model, image = ImageModel(tiny_model().deploy()), photo()
    wanted = explain(tiny_model().deploy(), image, OPTIONS).map
    Image.fromarray(image).save(tmp_path / "a.png")
    with_alpha = np.dstack((image, np.full(image.shape[:2], 9, np.uint8)))
    for given in (image, Image.fromarray(image), with_alpha, tmp_path / "a.png"):
        assert_close(explain(model, given, OPTIONS).map, wanted)
    palette = Image.fromarray(image).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(explain(model, palette, OPTIONS).image, np.asarray(palette.convert("RGB")))
    for given, says in ((torch.zeros(3, 80, 120), "got a tensor"), (5, "explain: an image should be a path"), ([image], "not list")):
        with pytest.raises(UserError, match=says):
            explain(model, given, OPTIONS)
    exported = SimpleNamespace(names=NAMES, stride=32, task=DETECT)
    with pytest.raises(UserError, match="explain: an exported file shows nothing of its rows"):
        explain(ImageModel(exported), image, OPTIONS)


def test_missing_source_leaves_no_run_folder(tmp_path, checkpoint):
    with pytest.raises(UserError, match=r"nowhere\.png"):
        script.explain(ExplainConfig(weights=str(checkpoint), source="nowhere.png", imgsz=(64, 64), project=str(tmp_path / "runs")))
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(("hw", "is_stretched"), [((8, 600), True), ((600, 8), True), ((64, 320), False)])
def test_a_strip_fills_its_panels(hw, is_stretched):
    """At its own aspect it would be a few px high; the titles say so."""
    panel = cam_figure(explain(tiny_model(), photo(*hw), OPTIONS), "layercam").axes[0]
    assert (panel.get_aspect() == "auto") is is_stretched
    assert ("stretched" in panel.get_title()) is is_stretched
