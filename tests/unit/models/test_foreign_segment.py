"""Checkpoints of segmentation networks of YOLOv5, YOLOv9 and ultralytics: all tensors placed, outputs equal."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch

from models import build_model, load_model
from models.checkpoints import recognition
from models.checkpoints.checkpoint import load_checkpoint, model_from_checkpoint
from tests.foreign_models import convert_model, foreign_model, layout, randomize_, raw_yaml, save_stripped
from utils.boxes import cxcywh_to_xyxy

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
FILES = [("yolov5", "yolov5n-seg"), ("yolov9", "gelan-c-seg"), ("yolov9", "yolov9-c-dseg"), ("ultralytics", "yolov8n-seg")]
FILES += [("ultralytics", "yolo11n-seg"), ("ultralytics", "yolo26n-seg")]
LARGE = ("gelan-c-seg", "yolov9-c-dseg")
PUBLISHED = ("yolov8n-seg", "yolo11n-seg", "yolo26n-seg", "yolov9c-seg")


@pytest.mark.parametrize(("program", "name"), [pytest.param(*f, marks=[pytest.mark.slow] if f[1] in LARGE else []) for f in FILES])
def test_every_tensor_of_a_segmentation_file_is_placed(tmp_path, program, name):
    with layout(program) as classes:
        expected = save_stripped(foreign_model(f"{name}.yaml", classes, nc=2), tmp_path / "theirs.pt", ema=True)
    checkpoint = load_checkpoint(tmp_path / "theirs.pt")
    placed = model_from_checkpoint(checkpoint, source="theirs.pt")
    assert placed.task.name == "segment"
    assert all(torch.equal(placed.state_dict()[key], value) for key, value in expected.items())
    assert (checkpoint.nc, checkpoint.names[1], checkpoint.cfg_name) == (2, "thing 1", f"{name}.yaml")


def test_a_file_with_one_branch_left_by_fusing_predicts_with_that_branch(tmp_path):
    own = randomize_(build_model("yolo26n-seg.yaml", nc=2))
    with layout("ultralytics") as classes:
        model = convert_model(own.deploy(for_suppression=True), classes, names={0: "a", 1: "b"}, raw=raw_yaml("yolo26n-seg.yaml", 2))
        torch.save({"model": model}, tmp_path / "fused.pt")
    loaded, images = load_model(tmp_path / "fused.pt"), torch.rand(1, 3, 64, 96)
    assert not loaded.predict(images).unique
    wanted = own.deploy(for_suppression=True).predict(images)
    assert torch.equal(loaded.predict(images).fields["coefficients"], wanted.fields["coefficients"])


@pytest.mark.parametrize("name", ["yolov5s-seg", "yolov8m-seg", "yolo26n-seg"])
def test_bare_weights_of_segmentation_networks_are_recognised(tmp_path, name):
    with torch.device("meta"):
        weights = build_model(f"{name}.yaml", nc=2).state_dict()
    cfg, found = recognition.recognised(tmp_path / f"{name}.pt", {key: tuple(value.shape) for key, value in weights.items()})
    assert (found, cfg["nc"]) == (f"{name}.yaml", 2)


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
        if key.endswith("2.bias"):
            p.data.normal_(-1 if "cv3" in key else 2.5, 1)
    yolo.save(f"{name}.pt")
    model = YOLO(f"{name}.pt").model.float().eval()
    x = torch.rand(1, 3, 96, 128)
    with torch.no_grad():
        out = model(x)[0]
    proto = (out[1][0] if isinstance(out[1], tuple) else out[1]).clone()
    found = {"x": x, "keys": list(model.state_dict()), "out": out[0].clone(), "proto": proto}
    torch.save(found, f"{name}-expected.pt")
"""


@pytest.mark.skipif(not os.environ.get("YOLO_PEER_PYTHON"), reason="YOLO_PEER_PYTHON names no Python that has ultralytics")
def test_files_of_the_ultralytics_package_give_its_outputs(tmp_path):
    environment = {**os.environ, "YOLO_OFFLINE": "1", "YOLO_CONFIG_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [os.environ["YOLO_PEER_PYTHON"], "-c", PEER, *PUBLISHED]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-1500:]
    for name in PUBLISHED:
        expected = torch.load(tmp_path / f"{name}-expected.pt", weights_only=True)
        model = load_model(tmp_path / f"{name}.pt")
        assert set(model.state_dict()) == set(expected["keys"])
        found, out = model.deploy(for_suppression=True).predict(expected["x"]), expected["out"].transpose(1, 2)
        nc = found.scores.shape[2]
        assert float((found.boxes - cxcywh_to_xyxy(out[..., :4])).abs().max()) < 1e-3
        assert float((found.scores - out[..., 4 : 4 + nc]).abs().max()) < 1e-4
        assert torch.allclose(found.fields["coefficients"], out[..., 4 + nc :], rtol=1e-4, atol=1e-4)
        assert torch.allclose(found.shared["prototypes"], expected["proto"], rtol=1e-4, atol=1e-4)
