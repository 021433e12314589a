"""Checkpoints of YOLOv10, YOLO11, YOLO12 and YOLO26: all tensors placed, both branches of their heads, and what fusing leaves of them."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch

from models import build_model, load_model
from models.checkpoints import recognition
from models.checkpoints.checkpoint import load_checkpoint, model_from_checkpoint
from models.model import Model
from models.transfer.transfer import Source, transfer
from tests.foreign_models import convert_model, foreign_model, layout, randomize_, raw_yaml, save_stripped
from tests.golden import REFERENCE, find

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
NEWER = ("yolov10n", "yolo11n", "yolo12n", "yolo26n")
TWO_BRANCHES = ("yolov10n", "yolo26n")
TAKEN = {"one2one": ("cv2", "cv3"), "one2many": ("one2one_cv2", "one2one_cv3")}  # what is left -> what fusing takes away


def images() -> torch.Tensor:
    return torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("program", "name"), [("yolov10", "yolov10n"), *(("ultralytics", name) for name in NEWER)])
def test_every_tensor_of_the_newer_families_is_placed(tmp_path, program, name):
    with layout(program) as classes:
        expected = save_stripped(foreign_model(f"{name}.yaml", classes), tmp_path / "theirs.pt", ema=True)
    if REFERENCE.is_dir():
        assert list(expected) == [key for key, _ in find("models", f"ultralytics-{name}").meta["keys"]]
    checkpoint = load_checkpoint(tmp_path / "theirs.pt")
    assert list(checkpoint.weights) == list(expected)
    placed = model_from_checkpoint(checkpoint, source="theirs.pt").state_dict()
    assert all(torch.equal(placed[key], value) for key, value in expected.items())
    assert (checkpoint.nc, checkpoint.names[7], checkpoint.cfg_name) == (80, "thing 7", f"{name}.yaml")


@pytest.mark.parametrize("name", ["yolo11n", "yolo26n"])
def test_inserted_attention_keeps_all_of_a_foreign_file(tmp_path, name):
    """``--weights yolo11n.pt --attention EMA@detect --attention-init identity``: nothing is lost and nothing changes at first."""
    with layout("ultralytics") as classes:
        save_stripped(foreign_model(f"{name}.yaml", classes, nc=2), tmp_path / "theirs.pt")
    checkpoint = load_checkpoint(tmp_path / "theirs.pt")
    model = build_model(checkpoint.cfg, attention=["EMA@detect"], attention_init="identity").eval()
    report = transfer(model, Source(checkpoint.weights, checkpoint.cfg, checkpoint.names))
    assert report.of_source == 1
    assert sum(plan.name == "EMA" for plan in model.plans) == 3
    before = load_model(tmp_path / "theirs.pt").predict(images())
    assert torch.allclose(model.predict(images()).boxes, before.boxes, atol=1e-4)
    assert torch.allclose(model.predict(images()).scores, before.scores, atol=1e-6)


@pytest.mark.parametrize("left", TAKEN)
@pytest.mark.parametrize("name", TWO_BRANCHES)
def test_a_file_with_one_branch_left_by_fusing_predicts_with_that_branch(tmp_path, name, left):
    own = randomize_(build_model(f"{name}.yaml", nc=2))
    with layout("ultralytics") as classes:
        model = convert_model(own.fuse(), classes, names={0: "a", 1: "b"}, raw=raw_yaml(f"{name}.yaml", 2))
        for gone in TAKEN[left]:
            model.model[-1]._modules[gone] = None
        torch.save({"model": model}, tmp_path / "fused.pt")
    loaded = load_model(tmp_path / "fused.pt")
    wanted = own.deploy(for_suppression=left == "one2many")
    assert loaded.predict(images()).unique is (left == "one2one")
    assert set(loaded.state_dict()) == set(wanted.state_dict())
    for found, reference in zip(loaded.predict(images())[:2], wanted.predict(images())[:2]):
        assert torch.equal(found, reference)


def test_a_yaml_that_asks_for_two_branches_counts_less_than_the_head(tmp_path):
    """YOLO26's YAML says ``end2end``; a file whose head has the one-to-many branch alone is a network with suppression."""
    raw = raw_yaml("yolo26n.yaml", 2)
    own = randomize_(build_model({**raw, "end2end": False}, nc=2))
    with layout("ultralytics") as classes:
        torch.save({"model": convert_model(own, classes, names={0: "a", 1: "b"}, raw=raw)}, tmp_path / "one.pt")
    loaded = load_model(tmp_path / "one.pt")
    assert not loaded.predict(images()).unique
    assert torch.equal(loaded.predict(images()).boxes, own.eval().predict(images()).boxes)


@pytest.mark.parametrize("name", ["yolov10s", "yolo11n", "yolo12n", "yolo26n", "yolo26n-p6", "yolov13n", "rtdetr-l", "rtdetr-x"])
def test_bare_weights_of_the_newer_families_are_recognised(tmp_path, name):
    with torch.device("meta"):
        weights = build_model(f"{name}.yaml", nc=2).state_dict()
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    cfg, found = recognition.recognised(tmp_path / "best.pt", shapes)
    assert (found, cfg["nc"]) == (f"{name}.yaml", 2)


def test_every_published_scale_is_among_the_recognised_names():
    names = recognition.published_names()
    assert {f"yolov10{s}.yaml" for s in "nsmblx"} | {f"yolo{v}{s}.yaml" for v in (11, 12, 26) for s in "nsmlx"} <= set(names)
    assert {"yolov8m.yaml", "yolov8x-p6.yaml", "yolo26x-p2.yaml", "rtdetr-l.yaml", "rtdetr-x.yaml"} <= set(names)
    assert {name for name in names if name.startswith("yolov13")} == {f"yolov13{s}.yaml" for s in "nslx"}
    assert len(names) == len(set(names))
    assert not {"yolov8.yaml", "yolo11.yaml", "yolo26-p6.yaml"} & set(names)


PEER = """
import sys, torch
from ultralytics import YOLO
for name in sys.argv[1:]:
    torch.manual_seed(0)
    yolo = YOLO(f"{name}.yaml")
    for m in yolo.model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1); m.running_var.uniform_(0.5, 1.5); m.weight.data.uniform_(0.8, 1.2)
    for key, p in yolo.model.model[-1].named_parameters():
        if "one2one" in key:
            p.data.add_(torch.randn_like(p) * 0.02)
        if key.endswith("2.bias"):
            p.data.normal_(-1 if "cv3" in key else 2.5, 1)
    yolo.save(f"{name}.pt")
    model = YOLO(f"{name}.pt").model.float().eval()
    x = torch.rand(1, 3, 96, 128)
    with torch.no_grad():
        expected = {"x": x, "keys": list(model.state_dict()), "many": model(x)[0].clone()}
        if hasattr(model.model[-1], "one2one_cv2"):
            model.model[-1].end2end = True
            expected["one"] = model(x)[0].clone()
    torch.save(expected, f"{name}-expected.pt")
"""


@pytest.mark.skipif(not os.environ.get("YOLO_PEER_PYTHON"), reason="YOLO_PEER_PYTHON names no Python that has ultralytics")
def test_files_of_the_ultralytics_package_give_its_outputs(tmp_path):
    environment = {**os.environ, "YOLO_OFFLINE": "1", "YOLO_CONFIG_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [os.environ["YOLO_PEER_PYTHON"], "-c", PEER, *NEWER]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=300)
    for name in NEWER:
        expected = torch.load(tmp_path / f"{name}-expected.pt", weights_only=True)
        model = load_model(tmp_path / f"{name}.pt")
        assert set(model.state_dict()) == set(expected["keys"])
        check_many(model.deploy(for_suppression=True), expected)
        if name in TWO_BRANCHES:
            check_best(model.deploy(), expected)


@torch.no_grad()
def check_many(model: Model, expected: dict[str, torch.Tensor]) -> None:
    """All cells of the branch for suppression: boxes to 1e-3 px, scores to 1e-4."""
    out = expected["many"].transpose(1, 2)  # (B, N, 4 + nc), cxcywh px
    corners = torch.cat((out[..., :2] - out[..., 2:4] / 2, out[..., :2] + out[..., 2:4] / 2), dim=2)
    found = model.predict(expected["x"])
    assert float((found.boxes - corners).abs().max()) < 1e-3
    assert float((found.scores - out[..., 4:]).abs().max()) < 1e-4


@torch.no_grad()
def check_best(model: Model, expected: dict[str, torch.Tensor]) -> None:
    """The best detections of the one-to-one branch, (B, K, 6) xyxy px, score, class."""
    found, wanted = model.predict(expected["x"]), expected["one"][0]
    best = found.scores[0].max(1).values.topk(len(wanted)).indices
    for box, score, label in zip(wanted[:20, :4], wanted[:20, 4], wanted[:20, 5].long()):
        same = (found.scores[0, best, label] - score).abs() < 1e-4
        assert float((found.boxes[0, best][same] - box).abs().amax(1).min()) < 1e-3
