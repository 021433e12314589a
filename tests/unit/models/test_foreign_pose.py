"""Checkpoints of ultralytics for pose estimation: all tensors placed, their keypoints, and both branches of YOLO26's."""

from __future__ import annotations

import pytest
import torch

from models import build_model, load_model
from models.checkpoints.checkpoint import load_checkpoint, model_from_checkpoint
from tests.foreign_models import convert_model, foreign_model, layout, randomize_, raw_yaml, save_stripped
from tests.golden import REFERENCE, find

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
TAKEN = {"one2one": ("cv2", "cv3", "cv4", "cv4_kpts"), "one2many": ("one2one_cv2", "one2one_cv3", "one2one_cv4", "one2one_cv4_kpts")}


@pytest.mark.parametrize("name", ["yolov8n-pose", "yolo11n-pose", "yolo26n-pose"])
def test_every_tensor_is_placed(tmp_path, name):
    with layout("ultralytics") as classes:
        expected = save_stripped(foreign_model(f"{name}.yaml", classes, nc=1, names={0: "person"}), tmp_path / "theirs.pt")
    if REFERENCE.is_dir():
        assert list(expected) == [key for key, _ in find("models", f"ultralytics-{name}").meta["keys"]]
    checkpoint = load_checkpoint(tmp_path / "theirs.pt")
    model = model_from_checkpoint(checkpoint, source="theirs.pt")
    placed = model.state_dict()
    assert list(placed) == list(checkpoint.weights) == list(expected)
    assert all(torch.equal(placed[key], value) for key, value in expected.items())
    assert (model.task.name, model.task.keypoints.shape, checkpoint.names) == ("pose", (17, 3), ("person",))


def test_keypoints_of_a_training_on_other_data_are_read_from_the_head(tmp_path):
    with layout("ultralytics") as classes:
        own = randomize_(build_model({**raw_yaml("yolov8n-pose.yaml", 2), "kpt_shape": [5, 2]}))
        torch.save({"model": convert_model(own, classes, names=["a", "b"], raw=raw_yaml("yolov8n-pose.yaml", 2))}, tmp_path / "theirs.pt")
    model = load_model(tmp_path / "theirs.pt").eval()
    assert model.task.keypoints.shape == (5, 2)
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(model.predict(images).fields["keypoints"], own.eval().predict(images).fields["keypoints"])


@pytest.mark.parametrize("left", TAKEN)
def test_a_fused_file_has_the_branch_that_is_left_and_no_flow(tmp_path, left):
    own = randomize_(build_model("yolo26n-pose.yaml", nc=1))
    with layout("ultralytics") as classes:
        model = convert_model(own.fuse(), classes, names=["person"], raw=raw_yaml("yolo26n-pose.yaml", 1))
        for gone in (*TAKEN[left], "flow_model", "cv4_sigma", "one2one_cv4_sigma"):
            model.model[-1]._modules[gone] = None
        torch.save({"model": model}, tmp_path / "fused.pt")
    loaded, images = load_model(tmp_path / "fused.pt"), torch.rand(1, 3, 64, 96)
    wanted = own.deploy(for_suppression=left == "one2many")
    assert set(loaded.state_dict()) == set(wanted.state_dict())
    found, expected = loaded.predict(images), wanted.predict(images)
    assert found.unique is (left == "one2one")
    torch.testing.assert_close(found.fields["keypoints"], expected.fields["keypoints"], atol=1e-3, rtol=1e-5)
