"""Exported files: what is in them, that they compute what torch computes at any size, and that one that does not is never left behind."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.inference.augmented import AugmentedModel
from models.analysis.compare import PredictionDifference, matched_difference, prediction_difference
from models.export import networks, parity, registry
from models.export.exporting import ExportOptions, export_model
from models.export.facts import ExportFacts
from models.export.formats import BUILTIN, REFUSED, describe_formats, find_format, formats_to_write
from models.export.model import ExportedModel, load_exported
from models.export.source import ExportSource
from models.export.suppression import Suppression, threshold_in_widest_gap
from models.export.torchscript import move_constants
from models.model import Model
from tasks import DETECT
from tests.tiny import DUAL_HEAD, NAMES, tiny_model
from utils.errors import UserError
from utils.nms import Suppression as NMS
from utils.nms import non_max_suppression
from utils.types import Predictions

SUFFIX = {export_format.name: export_format.suffix for export_format in BUILTIN}
SIZE = (64, 96)
PLAIN = ("torchscript", "onnx")
pytestmark = pytest.mark.filterwarnings(r"ignore:`?torch\.jit\.:FutureWarning")  # where the tests themselves call it


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


@pytest.fixture(scope="module")
def files(model: Model, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Path]:
    """Every format, static with two images a call, and dynamic."""
    folder, made = tmp_path_factory.mktemp("exports"), {}
    for name in SUFFIX:
        for dynamic in (False, True):
            path = folder / f"{name}-{dynamic}{SUFFIX[name]}"
            options = ExportOptions(imgsz=SIZE, batch_size=1 if dynamic else 2, dynamic=dynamic, conf=0.4)
            assert export_model(model, name, path, options).holds
            made[name, dynamic] = path
    return made


def images(batch: int, height: int, width: int, seed: int = 7) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("shape", [(1, 64, 96), (3, 32, 32), (2, 224, 160), (1, 96, 352)])
def test_dynamic_file_agrees_at_any_size(model: Model, files: dict, name: str, shape: tuple[int, int, int]) -> None:
    x = images(*shape)
    expected, got = model.predict(x), load_exported(files[name, True]).predict(x)
    torch.testing.assert_close(got.boxes, expected.boxes, rtol=0, atol=1e-3)
    torch.testing.assert_close(got.scores, expected.scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_fixed_batch_file_accepts_any_number_of_images(model: Model, files: dict, name: str, count: int) -> None:
    exported, x = load_exported(files[name, False]), images(count, *SIZE)
    got = exported.predict(x)
    assert got.boxes.shape == (count, 126, 4)
    assert got.scores.shape == (count, 126, 3)
    if count:
        torch.testing.assert_close(got.boxes, model.predict(x).boxes, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dynamic", [False, True])
def test_onnx_output_layout_is_the_common_one(model: Model, files: dict, dynamic: bool) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(files["onnx", dynamic]), providers=["CPUExecutionProvider"])
    (entry,), (output,) = session.get_inputs(), session.get_outputs()
    assert (entry.name, output.name) == ("images", "output0")
    assert entry.shape == (["batch", 3, "height", "width"] if dynamic else [2, 3, *SIZE])
    x = images(2, *SIZE)
    (array,) = session.run(None, {"images": x.numpy()})
    assert array.shape == (2, 4 + 3, 126)
    boxes, scores = model.predict(x)
    np.testing.assert_allclose(array[:, 0], ((boxes[..., 0] + boxes[..., 2]) / 2).numpy(), atol=1e-3)  # centre x
    np.testing.assert_allclose(array[:, 3], (boxes[..., 3] - boxes[..., 1]).numpy(), atol=1e-3)  # height
    np.testing.assert_allclose(array[:, 4:], scores.transpose(1, 2).numpy(), atol=1e-4)


@pytest.mark.parametrize("name", SUFFIX)
@pytest.mark.parametrize("dynamic", [False, True])
def test_names_and_sizes_are_stored_in_the_file(files: dict, name: str, dynamic: bool) -> None:
    exported = load_exported(files[name, dynamic])
    assert exported.names == NAMES
    assert (exported.nc, exported.ch, exported.stride, exported.imgsz, exported.dynamic) == (3, 3, 32, SIZE, dynamic)


def test_metadata_has_the_keys_and_forms_of_other_yolos(files: dict) -> None:
    onnx = pytest.importorskip("onnx")
    stored = {p.key: p.value for p in onnx.load(files["onnx", False]).metadata_props}
    extra = {"config.txt": ""}
    torch.jit.load(str(files["torchscript", False]), _extra_files=extra)
    assert json.loads(extra["config.txt"]) == stored
    assert stored["names"] == str(dict(enumerate(NAMES)))
    assert (stored["stride"], stored["imgsz"], stored["task"], stored["batch"]) == ("32", "[64, 96]", "detect", "2")


def test_auxiliary_branches_are_not_exported(tmp_path: Path) -> None:
    dual = tiny_model(head=DUAL_HEAD)
    export_model(dual, "onnx", tmp_path / "dual.onnx", ExportOptions(imgsz=SIZE))
    got = load_exported(tmp_path / "dual.onnx").predict(images(1, *SIZE))
    torch.testing.assert_close(got.scores, dual.predict(images(1, *SIZE)).scores, rtol=0, atol=1e-4)
    assert got.boxes.shape == (1, 126, 4)
    assert len(dual.head.branch_weights) == 2  # the model itself is left alone


@pytest.mark.parametrize("shape", [(1, 64, 96), (3, 160, 32)])
def test_suppression_inside_equals_that_outside(model: Model, files: dict, shape: tuple[int, int, int]) -> None:
    exported, x = load_exported(files["onnx_end2end", True]), images(*shape)
    inside = non_max_suppression(exported.predict(x), NMS(conf=0.01, iou=1.0, max_det=1000))
    outside = non_max_suppression(model.predict(x), NMS(conf=0.4, iou=0.45, max_det=100))
    assert all(len(d.scores) > 3 for d in outside)
    for a, b in zip(inside, outside):
        assert torch.equal(a.classes, b.classes)
        torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=1e-4)
        torch.testing.assert_close(a.boxes, b.boxes, rtol=0, atol=1e-3)


def test_suppression_limits_and_empty_outputs() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60], [90, 90, 95, 95]]])
    scores = torch.tensor([[[0.9, 0.1], [0.8, 0.2], [0.1, 0.7], [0.2, 0.3]]])
    count, found, best, classes = Suppression(topk=3, iou=0.45, conf=0.25)(boxes, scores)
    assert count.tolist() == [[3]]
    assert classes.tolist() == [[0, 1, 1]]
    assert found[0].tolist() == boxes[0, [0, 2, 3]].tolist()
    torch.testing.assert_close(best, torch.tensor([[0.9, 0.7, 0.3]]))
    assert Suppression(topk=2, iou=0.45, conf=0.25)(boxes, scores)[0].tolist() == [[2]]
    count, found, best, _ = Suppression(topk=5, iou=0.45, conf=0.95)(boxes, scores)
    assert count.tolist() == [[0]]
    assert found.shape == (1, 5, 4)
    assert best.sum() == 0


def test_probe_threshold_lets_some_boxes_through() -> None:
    scores = torch.rand(2, 500, 3, generator=torch.Generator().manual_seed(0))
    above = (scores[0].amax(dim=1) > threshold_in_widest_gap(scores)).sum()
    assert 8 <= above <= 64
    assert threshold_in_widest_gap(torch.rand(1, 1, 3)) == 0.0


def test_detections_are_compared_whatever_their_order() -> None:
    boxes, scores = torch.rand(1, 6, 4) * 100, torch.rand(1, 6, 3).softmax(dim=2)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    same = Predictions(boxes[:, order], scores[:, order])
    assert matched_difference(Predictions(boxes, scores), same) == (0.0, 0.0)
    moved = boxes.clone()
    moved[0, 2, 1] += 0.5
    px, _ = matched_difference(Predictions(boxes, scores), Predictions(moved, scores))
    assert px == pytest.approx(0.5, abs=1e-4)
    fewer = scores.clone()
    fewer[0, 0] = 0
    assert matched_difference(Predictions(boxes, scores), Predictions(boxes, fewer))[0] == float("inf")


class Wrong:
    """A writer that writes another network than it was given."""

    def __init__(self, name: str, change: float) -> None:
        self.write, self.change = find_format(name).write, change

    def __call__(self, source: ExportSource, path: Path) -> None:
        network = copy.deepcopy(source.network)
        with torch.no_grad():
            for parameter in network.detector.head.parameters():
                parameter.mul_(self.change)
        self.write(replace(source, network=network), path)


@pytest.mark.parametrize("name", SUFFIX)
@pytest.mark.parametrize("change", [1.01, float("nan")])
def test_file_that_disagrees_is_refused_and_removed(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, change: float
) -> None:
    monkeypatch.setitem(registry.FORMATS, name, replace(find_format(name), write=Wrong(name, change)))
    path = tmp_path / f"best{SUFFIX[name]}"
    path.write_bytes(b"the previous export")
    with pytest.raises(UserError, match=r"not written, because the .* differs from torch"):
        export_model(model, name, path, ExportOptions(imgsz=SIZE))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"the previous export"


class RightAtOneSize(networks.ExportedNetwork):
    """Computes what it should at the height it is traced at, and nowhere else."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) + (images.shape[2] - SIZE[0]) * 1e-3


@pytest.mark.parametrize("name", PLAIN)
def test_dynamic_file_that_is_right_at_one_size_only_is_refused(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(networks, "ExportedNetwork", RightAtOneSize)
    path = tmp_path / f"best{SUFFIX[name]}"
    with pytest.raises(UserError, match="differs from torch"):
        export_model(model, name, path, ExportOptions(imgsz=SIZE, dynamic=True))
    assert not list(tmp_path.iterdir())
    export_model(model, name, path, ExportOptions(imgsz=SIZE))


class Counting(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.arange(x.shape[1], device=x.device)


def test_traced_tensors_follow_the_device(files: dict, tmp_path: Path) -> None:
    torch.jit.trace(torch.nn.Sequential(Counting(), Counting()), torch.rand(2, 3)).save(str(tmp_path / "counting.torchscript"))
    counting = torch.jit.load(str(tmp_path / "counting.torchscript"))
    move_constants(counting, torch.device("meta"))
    assert counting(torch.rand(2, 5, device="meta")).shape == (2, 5)  # fails with a tensor left on the CPU
    network = torch.jit.load(str(files["torchscript", True]))
    move_constants(network, torch.device("cuda:1"))
    parts = [part.code for part in network.modules() if part._c._has_method("forward")]
    assert any('device("cuda:1")' in code for code in parts)
    assert not any('device("cpu")' in code for code in parts)


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_float32")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_torchscript_runs_on_a_gpu(model: Model, files: dict) -> None:
    x = images(2, 96, 64)
    expected, got = model.predict(x), load_exported(files["torchscript", True], device="cuda").predict(x.cuda())
    torch.testing.assert_close(got.boxes.cpu(), expected.boxes, rtol=0, atol=0.1)
    torch.testing.assert_close(got.scores.cpu(), expected.scores, rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", PLAIN)
def test_wrong_input_is_named(files: dict, name: str) -> None:
    static, dynamic = load_exported(files[name, False]), load_exported(files[name, True])
    with pytest.raises(UserError, match=r"give --imgsz 64 96"):
        static.predict(images(2, 96, 96))
    with pytest.raises(UserError, match="multiples of 32"):
        dynamic.predict(images(1, 64, 70))
    with pytest.raises(UserError, match="3 channels, not 1"):
        dynamic.predict(images(1, 64, 64)[:, :1])


@pytest.mark.parametrize("suffix", [".onnx", ".torchscript"])
@pytest.mark.parametrize("content", [b"", b"not a model at all", b"PK\x03\x04 half a zip"])
def test_damaged_files_are_one_line(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_exported(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_foreign_files_are_one_line(tmp_path: Path) -> None:
    class Flat(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)

    traced = torch.jit.trace(Flat(), torch.rand(1, 3, 32, 32))
    traced.save(str(tmp_path / "nameless.torchscript"))
    traced.save(str(tmp_path / "named.torchscript"), _extra_files={"config.txt": '{"names": ["a", "b"], "stride": 32, "imgsz": [32, 32]}'})
    traced.save(str(tmp_path / "segments.torchscript"), _extra_files={"config.txt": '{"names": ["a"], "task": "semantic"}'})
    with pytest.raises(UserError, match="holds no class names"):
        load_exported(tmp_path / "nameless.torchscript")
    with pytest.raises(UserError, match="one output"):
        load_exported(tmp_path / "named.torchscript").predict(images(1, 32, 32))
    with pytest.raises(UserError, match="semantic"):
        load_exported(tmp_path / "segments.torchscript")
    with pytest.raises(UserError, match="no such file"):
        load_exported(tmp_path / "absent.onnx")


@pytest.mark.parametrize(
    ("metadata", "names", "imgsz"),
    [
        ({"names": "{0: 'person', 1: 'bus'}", "stride": "32", "imgsz": "[320, 640]"}, ("person", "bus"), (320, 640)),
        ({"names": {"1": "b", "0": "a"}, "imgsz": 320}, ("a", "b"), (320, 320)),
        ({"names": ["x"], "batch": 4}, ("x",), (640, 640)),
    ],
)
def test_metadata_of_other_programs_is_understood(metadata: dict, names: tuple[str, ...], imgsz: tuple[int, int]) -> None:
    facts = ExportFacts.from_metadata(metadata, source="a file")
    assert (facts.names, facts.imgsz, facts.stride) == (names, imgsz, 32)


def test_facts_round_trip_through_text() -> None:
    facts = ExportFacts(names=NAMES, stride=64, imgsz=(64, 128), batch=3, ch=4, dynamic=True, end2end=True, topk=7, iou=0.5, conf=0.125)
    assert ExportFacts.from_metadata(facts.to_metadata(), source="a file") == facts
    with pytest.raises(UserError, match="its stride is 'many', expected a whole number"):
        ExportFacts.from_metadata({"names": "{0: 'a'}", "stride": "many"}, source="a file")


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_formats_name_the_converter(name: str) -> None:
    with pytest.raises(UserError, match=rf"--include {name}: needs .*; export (onnx|torchscript) and convert"):
        find_format(name)


def test_unknown_format_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'torchscript'"):
        find_format("torchscrpt")


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (ExportOptions(imgsz=(64, 70)), "--imgsz 64 70: .* 64 96"),
        (ExportOptions(imgsz=SIZE, opset=9), "--opset 9"),
        (ExportOptions(imgsz=SIZE, batch_size=0), "--batch-size 0"),
        (ExportOptions(imgsz=SIZE, topk=0), "--topk-all 0"),
        (ExportOptions(imgsz=SIZE, iou=1.5), "--iou-thres 1.5"),
    ],
)
def test_options_out_of_range_name_the_flag(model: Model, tmp_path: Path, options: ExportOptions, flag: str) -> None:
    with pytest.raises(UserError, match=flag):
        export_model(model, "onnx", tmp_path / "x.onnx", options)


def test_simplify_needs_its_package(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxslim", None)
    monkeypatch.setitem(__import__("sys").modules, "onnxsim", None)
    with pytest.raises(UserError, match=r"--simplify: needs the package onnxslim"):
        export_model(model, "onnx", tmp_path / "x.onnx", ExportOptions(imgsz=SIZE, simplify=True))
    assert not list(tmp_path.iterdir())


class BrightSquare:
    """A stand-in for a network: finds the one bright rectangle in each image."""

    names, nc, ch, stride, task = ("bright",), 1, 3, 32, DETECT

    def predict(self, x: torch.Tensor, *, above: float = 0.0) -> Predictions:
        boxes = []
        for image in x:
            ys, xs = (image.amin(dim=0) > 0.8).nonzero().unbind(dim=1)
            boxes.append(torch.stack((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)).float()[None])
        return Predictions(torch.stack(boxes), torch.full((len(x), 1, 1), 0.9))


def test_time_augmentation_maps_boxes_back_to_the_image() -> None:
    image = torch.zeros(2, 3, 160, 224)
    image[0, :, 32:96, 16:112] = 1
    image[1, :, 64:128, 128:192] = 1
    boxes, scores = AugmentedModel(BrightSquare()).predict(image)
    assert boxes.shape == (2, 3, 4)
    assert scores.shape == (2, 3, 1)
    expected = torch.tensor([[16.0, 32, 112, 96], [128, 64, 192, 128]])[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(boxes, expected, rtol=0, atol=1.6)


@pytest.mark.parametrize(("cfg", "extra"), [("yolov8n-pose.yaml", "keypoints"), ("yolov8n-obb.yaml", "angle")])
def test_time_augmentation_refuses_results_that_it_cannot_turn_before_anything_runs(cfg: str, extra: str) -> None:
    from models import build_model

    with torch.device("meta"):
        model = build_model(cfg, nc=1)
    with pytest.raises(UserError, match=rf"turns boxes back only, and results of the task '\w+' also have {extra}; leave it out"):
        AugmentedModel(model)


def test_time_augmentation_refuses_fixed_size_files(files: dict) -> None:
    with pytest.raises(UserError, match=r"--augment: .* takes one size only"):
        AugmentedModel(load_exported(files["onnx", False]))
    assert isinstance(AugmentedModel(load_exported(files["onnx", True])).model, ExportedModel)


@pytest.mark.slow
@pytest.mark.parametrize("cfg", ["yolov9-t-FocalModulation", "yolov9-s", "yolov9-c-FocalModulationBlock", "yolov9-c-FocalModulation"])
@pytest.mark.parametrize("name", SUFFIX)
def test_published_networks_agree_when_dynamic(tmp_path: Path, cfg: str, name: str) -> None:
    from models import build_model
    from tests.golden import fill_

    network = build_model(f"{cfg}.yaml", nc=80)
    fill_(network, 1.35)
    assert export_model(network.eval(), name, tmp_path / f"x{SUFFIX[name]}", ExportOptions(imgsz=(256, 320), dynamic=True)).holds


ALLOWED = [  # differences in px and in score, torch's own rounding of both
    ((9e-4, 0.0), (0.0, 0.0), True),
    ((3e-3, 0.0), (1e-3, 0.0), True),
    ((3e-3, 0.0), (1e-4, 0.0), False),
    ((2.0, 0.0), (1.0, 1.0), False),
    ((0.0, 3e-4), (0.0, 1e-4), True),
    ((0.0, 3e-4), (1.0, 1e-5), False),
    ((3e-3, 3e-4), (1e-3, 1e-4), True),
    ((0.0, 2e-2), (1.0, 1.0), False),
]


@pytest.mark.parametrize(("difference", "rounding", "holds"), ALLOWED)
def test_parity_tolerance_is_bounded_by_float32_rounding(monkeypatch, difference, rounding, holds):
    """The task's tolerance, or four times torch's own rounding where that is more, never above ten times the tolerance."""
    monkeypatch.setattr(parity, "_compare_predictions", lambda *_: PredictionDifference(*difference))
    monkeypatch.setattr(parity, "_rounding", lambda *_: PredictionDifference(*rounding))
    network, facts = SimpleNamespace(task=DETECT), ExportFacts(names=("a",))
    found = parity.compare(network, Path("any.onnx"), facts=facts, export_format=find_format("onnx"))
    assert found.holds is holds
    assert ("rounding" in str(found)) == (found.allowed_px > 1e-3 or found.allowed_score > 1e-4)


def test_a_given_tolerance_holds(monkeypatch):
    monkeypatch.setattr(parity, "_compare_predictions", lambda *_: PredictionDifference(0.4, 0.04))
    network, facts = SimpleNamespace(task=DETECT), ExportFacts(names=("a",))
    for tolerance, holds in (((0.5, 0.05), True), ((0.5, 0.03), False), ((0.3, 0.05), False)):
        found = parity.compare(network, Path("any.onnx"), facts=facts, export_format=find_format("onnx"), tolerance=tolerance)
        assert found.holds is holds


@pytest.mark.parametrize("values", [(0.1,), (0.1, 0.0), (0.1, float("inf")), (float("nan"), 0.1), (1.0, 2.0, 3.0)])
def test_a_tolerance_is_two_numbers(values):
    with pytest.raises(UserError, match=r"^--tolerance .*: two numbers above 0 are needed"):
        ExportOptions(imgsz=SIZE, tolerance=values).validate(stride=32)


def registered(monkeypatch: pytest.MonkeyPatch, **changes: object) -> registry.ExportFormat:
    """A further format, like torchscript but for some fields, which is gone after the test."""
    monkeypatch.setattr(registry, "FORMATS", dict(registry.FORMATS))
    return registry.register_format(replace(find_format("torchscript"), **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "My Format", "suffix": ".mine"}, "'My Format': expected lower-case letters"),
        ({"name": "mine", "suffix": "mine"}, "suffix 'mine', expected one such as"),
        ({"name": "mine", "suffix": ".pt"}, "suffix '.pt'"),
        ({"name": "onnx", "suffix": ".mine"}, "'onnx' is registered already"),
        ({"name": "mine", "suffix": ".onnx"}, ".onnx files are opened by the format 'onnx'"),
        ({"name": "mine"}, "same file name as 'torchscript'; set stem, such as '-mine'"),
    ],
)
def test_format_with_a_taken_name_is_refused(monkeypatch: pytest.MonkeyPatch, changes: dict, message: str) -> None:
    before = dict(registry.FORMATS)
    with pytest.raises(UserError, match=re.escape(message)):
        registered(monkeypatch, **changes)
    assert before == registry.FORMATS


def test_formats_with_one_suffix_share_its_opener(monkeypatch: pytest.MonkeyPatch) -> None:
    assert registered(monkeypatch, name="mine", stem="-mine").path_beside(Path("runs/best.pt")) == Path("runs/best-mine.torchscript")


def test_missing_package_is_named_before_anything_is_written(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.FORMATS, "onnx", replace(find_format("onnx"), needs=("onnx", "no_such_package")))
    with pytest.raises(UserError, match="--include onnx: needs the package no_such_package"):
        export_model(model, "onnx", tmp_path / "x.onnx", ExportOptions(imgsz=SIZE))
    assert not list(tmp_path.iterdir())


def test_nms_flag_selects_end2end() -> None:
    assert [f.name for f in formats_to_write(("torchscript", "onnx", "onnx_end2end"), nms=True)] == ["torchscript", "onnx_end2end"]
    assert [f.name for f in formats_to_write(("onnx", "onnx"), nms=False)] == ["onnx"]


def test_help_and_page_list_every_format() -> None:
    page = (Path(__file__).parents[3] / "docs" / "export.md").read_text(encoding="utf-8")
    for export_format in BUILTIN:
        assert export_format.path_beside(Path("best.pt")).name in describe_formats()
        assert f"`{export_format.name}`" in page
        assert f"`{export_format.path_beside(Path('best.pt')).name}`" in page
    assert all(f"`{name}`" in page for name in REFUSED)


def test_listing_formats_imports_no_torch() -> None:
    code = "import sys; from models.export.formats import describe_formats; describe_formats(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=True)


def test_predictions_are_compared_by_largest_or_mean_difference() -> None:
    a = Predictions(torch.zeros(1, 2, 4), torch.zeros(1, 2, 3))
    moved = torch.zeros(1, 2, 4)
    moved[0, 1, 2] = 4.0
    assert prediction_difference(a, Predictions(moved, a.scores)) == (4.0, 0.0)
    assert prediction_difference(a, Predictions(moved, a.scores), mean_boxes=True) == (0.5, 0.0)
    assert prediction_difference(a, Predictions(moved * float("nan"), a.scores)) == (float("inf"), 0.0)
    assert prediction_difference(a, Predictions(a.boxes[:, :1], a.scores[:, :1])) == (float("inf"), float("inf"))
    empty = Predictions(torch.zeros(1, 0, 4), torch.zeros(1, 0, 3))
    assert prediction_difference(empty, empty) == (0.0, 0.0)
