"""Networks for pose estimation: by name, with a data set's keypoints, deployed, exported, transferred, and what is refused in a line."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from models import build_model
from models.export.facts import SETTINGS, ExportFacts
from models.export.networks import ExportedNetwork
from models.export.one_to_one import ROWS, OneToOneNetwork
from models.heads.base import HeadOutput
from models.heads.pose import EndToEndPose, LightPose, Pose, Pose26
from models.losses.keypoints import FIELD
from models.spec.parser import load_spec, read_spec
from models.transfer.transfer import Source, transfer
from tasks import DETECT
from tasks.keypoints import KEYS, Keypoints
from utils.config import Hyperparameters
from utils.errors import UserError
from utils.types import Batch, Letterbox, Targets

TINY = {
    "nc": 2, "kpt_shape": [3, 3], "scales": {"n": [1.0, 1.0, 64]}, "backbone": [[-1, 1, "Conv", [16, 3, 8]]],
    "head": [[[0], 1, "Pose", ["nc", "kpt_shape"]]],
}  # fmt: skip


def tiny(**changes) -> dict:
    return {**TINY, **changes}


@pytest.mark.parametrize(
    ("name", "head", "shape"),
    [
        ("yolov8n-pose", Pose, (17, 3)), ("yolov8x-pose-p6", Pose, (17, 3)), ("yolo11s-pose", LightPose, (17, 3)),
        ("yolo26n-pose.yaml", Pose26, (17, 3)), ("yolov8n-pose-BiFormer", Pose, (17, 3)),
        ("yolo11n-pose-FocalModulation", LightPose, (17, 3)),
    ],
)  # fmt: skip
def test_published_names_give_their_heads(name, head, shape):
    with torch.device("meta"):
        model = build_model(name)
    assert type(model.head) is head
    assert (model.task.name, model.task.keypoints.shape) == ("pose", shape)


def test_the_keypoints_of_the_data_take_the_place_of_the_files():
    own = Keypoints(5, 2, sigmas=(0.1,) * 5, skeleton=((0, 1),))
    model = build_model(tiny(), keypoints=own)
    assert model.task.keypoints == own
    again = build_model(model.spec.to_dict())
    assert again.task.keypoints == own
    assert again.state_dict().keys() == model.state_dict().keys()
    assert load_spec("yolov8n.yaml", keypoints=own).keypoints is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kpt_shape": None}, "needs keypoints, but the file has no kpt_shape"),
        ({"kpt_shape": [17, 4]}, r"kpt_shape: \[17, 4\]"),
        ({"kpt_oks_sigmas": [0.1]}, "kpt_oks_sigmas"),
        ({"skeleton": [[0, 3]]}, r"skeleton: .*0 to 2"),
    ],
)
def test_wrong_keypoints_of_a_model_file_are_one_line(change, message):
    with pytest.raises(UserError, match=message) as error:
        build_model(tiny(**change))
    assert "\n" not in str(error.value)


def test_end2end_gives_two_branches_with_keypoints_of_their_own():
    model = build_model(tiny(end2end=True, reg_max=1))
    assert type(model.head) is EndToEndPose
    output = model(torch.rand(1, 3, 64, 64))
    assert [tuple(fields[FIELD][0].shape) for fields in output.fields] == [(1, 9, 8, 8)] * 2
    images, lean = torch.ones(1, 3, 64, 64), model.deploy(fuse=False)
    torch.testing.assert_close(lean.predict(images).fields["keypoints"], model.eval().predict(images).fields["keypoints"])


@pytest.fixture(scope="module")
def end_to_end():
    torch.manual_seed(0)
    return build_model(tiny(end2end=True, reg_max=1, head=[[[0], 1, "Pose26", ["nc", "kpt_shape"]]]))


def test_training_parts_are_gone_from_a_deployed_head(end_to_end):
    assert any(name.startswith("model.1.flow_model") for name in end_to_end.state_dict())
    for lean in (end_to_end.deploy(), end_to_end.deploy(for_suppression=True)):
        assert not any("flow_model" in name or "sigma" in name for name in lean.state_dict())
        again = build_model(lean.spec.to_dict())
        again.load_state_dict(lean.state_dict())
        images = torch.rand(1, 3, 64, 64)
        torch.testing.assert_close(again.predict(images).fields["keypoints"], lean.predict(images).fields["keypoints"])


@pytest.mark.parametrize("targets", [0, 3])
def test_every_parameter_learns_and_no_target_is_no_error(end_to_end, targets):
    end_to_end.train().zero_grad()
    boxes = torch.tensor([0.5, 0.5, 0.4, 0.6]).repeat(targets, 1)
    keypoints = torch.cat((0.3 + 0.4 * torch.rand(targets, 3, 2), torch.tensor([[2.0], [0.0], [1.0]]).repeat(targets, 1, 1)), dim=2)
    objects = Targets(torch.arange(targets) % 2, torch.zeros(targets).long(), boxes, keypoints=keypoints)
    letterbox = Letterbox(torch.full((2, 2), 64), torch.ones(2, 2), torch.zeros(2, 2))
    batch = Batch(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), objects, ("a", "b"), letterbox, targets)
    parts = end_to_end.head.build_loss(Hyperparameters())(end_to_end(torch.rand(2, 3, 64, 64)), batch)
    assert set(parts) == {"box", "cls", "l1", "pose", "kobj", "rle"}
    assert all(torch.isfinite(part) for part in parts.values())
    sum(parts.values()).backward()
    without = [name for name, p in end_to_end.named_parameters() if p.grad is None]
    assert not without


def test_a_file_of_the_one_to_one_branch_holds_keypoints(end_to_end):
    lean = end_to_end.deploy()
    rows = OneToOneNetwork(lean)(torch.rand(1, 3, 64, 64))
    assert rows.shape == (1, ROWS, 6 + 9)
    found = lean.task.from_rows(rows, nc=2)
    assert found.fields["keypoints"].shape == (1, ROWS, 9)
    with pytest.raises(ValueError, match="is needed"):
        DETECT.from_rows(rows, nc=2)


def test_exported_tensors_come_back_with_what_the_file_says():
    model = build_model(tiny(kpt_shape=[4, 2])).deploy()
    tensors = ExportedNetwork(model, model.task)(torch.rand(1, 3, 64, 64))
    facts = ExportFacts(names=("a", "b"), task="pose", settings=model.task.settings)
    read = ExportFacts.from_metadata(facts.to_metadata(), source="file")
    assert read.settings == {"kpt_shape": [4, 2]}
    assert SETTINGS == KEYS
    task = model.task.from_settings(read.settings, source="file")
    assert task.from_export([tensors], nc=2).fields["keypoints"].shape == (1, 64, 8)
    assert task.class_count([tuple(tensors.shape)]) == 2
    with pytest.raises(UserError, match="kpt_shape"):
        model.task.from_settings({"kpt_shape": "many"}, source="file")


@pytest.mark.parametrize("reverse", [False, True])
def test_detection_and_pose_exchange_all_but_the_keypoint_layers(reverse):
    names = ("yolov8n.yaml", "yolov8n-pose.yaml")
    old, new = (build_model(name, nc=3, names=("a", "b", "c")) for name in (names[::-1] if reverse else names))
    report = transfer(new, Source(old.state_dict(), old.spec.to_dict(), names=old.names))
    state, before = new.state_dict(), old.state_dict()
    kept = [name for name in state if ".cv4." not in name]
    assert all(torch.equal(state[name], before[name]) for name in kept if state[name].is_floating_point())
    assert not any(".cv4." in name for name in report.filled)


def test_keypoint_layers_are_transferred_where_there_are_as_many_keypoints():
    old, same, other = (build_model(tiny(kpt_shape=[k, 3])) for k in (3, 3, 4))
    for new in (same, other):
        transfer(new, Source(old.state_dict(), old.spec.to_dict()))
    last = "model.1.cv4.0.2.weight"
    assert torch.equal(same.state_dict()[last], old.state_dict()[last])
    assert other.state_dict()[last].shape != old.state_dict()[last].shape


def test_a_spec_with_keypoints_reads_back_equal():
    spec = read_spec(tiny(skeleton=[[0, 1]], kpt_oks_sigmas=[0.1, 0.2, 0.3]), origin="tiny")
    assert dataclasses.replace(read_spec(spec.to_dict(), origin="tiny"), rows=spec.rows) == spec
    assert isinstance(build_model(tiny())(torch.rand(1, 3, 64, 64)), HeadOutput)
