"""Heads on their own: bias, deployment, precision, export and bad arguments."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from models.build import build_model
from models.heads.anchor_free import DDetect, Detect, DetectV9
from models.heads.multi_branch import DualDDetect, DualDetect, TripleDDetect, TripleDetect
from models.spec.channel_rules import RuleContext
from models.spec.channel_rules import head as head_rule
from tests import golden
from tests.tiny import tiny_cfg
from utils.errors import UserError

HEADS = (Detect, DetectV9, DDetect, DualDetect, DualDDetect, TripleDetect, TripleDDetect)
STRIDES = (8.0, 16.0, 32.0)


def filled(cls, nc: int = 3):
    head = cls(nc, [16, 24, 32] * len(cls.branch_weights))
    head.set_strides(STRIDES)
    return golden.fill_(head).eval()


def features(head, size: int = 64, batch: int = 1):
    shapes = [(batch, c, size // s, size // s) for c, s in zip((16, 24, 32), (8, 16, 32))] * len(head.branch_weights)
    return [golden.input_array(i, shape) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("cls", HEADS)
def test_initial_biases_follow_the_class_prior(cls):
    head = cls(7, [16, 24, 32] * len(cls.branch_weights))
    head.set_strides(STRIDES)
    box = 2.0 if cls is Detect else 1.0
    for branch in range(len(cls.branch_weights)):
        for level, stride in enumerate(STRIDES):
            assert (getattr(head, f"cv{2 * branch + 2}")[level][-1].bias == box).all()
            expected = math.log(5 / 7 / (640 / stride) ** 2)
            torch.testing.assert_close(getattr(head, f"cv{2 * branch + 3}")[level][-1].bias, torch.full((7,), expected))


@pytest.mark.parametrize("cls", HEADS)
@torch.no_grad()
def test_deploy_keeps_the_main_branch_and_nothing_else(cls):
    head = filled(cls)
    before = copy.deepcopy(head.state_dict())
    x = features(head)
    wanted = head.decode(head(x))
    lean = head.deploy()
    got = lean.head.decode(lean.head([x[i] for i in lean.inputs]))
    assert torch.equal(got.boxes, wanted.boxes)
    assert torch.equal(got.scores, wanted.scores)
    kept = "DDetect" if cls.box_groups == 4 else "Detect"
    assert lean.name == (kept if cls.single else None)  # None: the row's own
    assert list(lean.head.state_dict()) == list((DDetect if cls.box_groups == 4 else DetectV9)(3, [16, 24, 32]).state_dict())
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())


@pytest.mark.parametrize("cls", [Detect, DualDDetect])
@torch.no_grad()
def test_decoding_is_done_in_float32(cls):
    head = filled(cls)
    output = head(features(head))
    half = output._replace(branches=tuple(tuple(m.bfloat16() for m in maps) for maps in output.branches))
    exact = head.decode(output._replace(branches=tuple(tuple(m.float() for m in maps) for maps in half.branches)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = head.bfloat16().decode(half)
    assert got.boxes.dtype == got.scores.dtype == torch.float32
    assert torch.equal(got.boxes, exact.boxes)
    assert torch.equal(got.scores, exact.scores)


def test_the_dialect_chooses_the_form_of_detect():
    def built(dialect):
        context = RuleContext((16, 24, 32), 1, lambda c: c, 80, None, dialect, Detect)
        plan = head_rule([80], context)
        return plan.cls(*plan.args)

    assert built("v8").cv3[0][0].conv.out_channels == 80
    assert built("v5").cv3[0][0].conv.out_channels == 128


def test_bad_head_arguments_are_refused():
    with pytest.raises(UserError, match="at least one class"):
        DDetect(0, [16])
    with pytest.raises(UserError, match="2 group"):
        DualDDetect(3, [16, 24, 32])


@pytest.mark.parametrize(("head", "anchors", "complaint"), [
    ([[3, 4, 4, 3, 4, 7], 1, "DualDDetect", ["nc"]], 3,
     "row 8 [DualDDetect]: an auxiliary branch reads other strides than the main one: level 3 has stride 16 (row 4) beside 32 (row 7); "
     "list all levels of one branch, then of the next, auxiliary levels first"),
    ([[3, 3, 4, 4, 7, 7], 1, "DualDetect", ["nc"]], 3,
     "level 1 has stride 8 (row 3) beside 16 (row 4); level 2 has stride 8 (row 3) beside 32 (row 7); level 3 has stride 16 (row 4)"),
    ([[3, 4, 4, 3, 3, 4], 1, "TripleDDetect", ["nc"]], 3, "level 1 has stride 16 (row 4) beside 8 (row 3); level 2 has stride 8 (row 3)"),
    ([[3, 4, 5, 7], 1, "IAuxDetect", ["nc", "anchors"]], [[10, 13, 16, 30], [30, 61, 62, 45]],
     "level 1 has stride 32 (row 5) beside 8 (row 3); level 2 has stride 32 (row 7) beside 16 (row 4); list all levels of one branch, then "
     "of the next, main levels first"),
])  # fmt: skip
def test_branches_that_read_other_strides_are_refused_when_built(head, anchors, complaint):
    cfg = {**tiny_cfg(attention=("Silence", []), head=head), "yaml_file": "mine.yaml", "anchors": anchors}
    with pytest.raises(UserError, match=r"^mine\.yaml: row 8 ") as caught:
        build_model(cfg)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cls", [Detect, DualDDetect])
@torch.no_grad()
def test_onnx_follows_the_image_size(cls, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    head = filled(cls)

    class Decoded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, *x):
            return tuple(head.decode(self.head(x)))

    path = str(tmp_path / "head.onnx")
    names = [f"x{i}" for i in range(3 * len(cls.branch_weights))]
    axes = {n: {0: "b", 2: f"h{n}", 3: f"w{n}"} for n in names}
    args = tuple(features(head))
    torch.onnx.export(Decoded().eval(), args, path, input_names=names, dynamic_axes=axes, opset_version=17, dynamo=False)
    session = onnxruntime.InferenceSession(path)
    used = {i.name for i in session.get_inputs()}
    x = features(head, size=96, batch=2)
    boxes, scores = session.run(None, {n: v.numpy() for n, v in zip(names, x) if n in used})
    wanted = head.decode(head(x))
    golden.assert_close(boxes, wanted.boxes, 1e-5)
    golden.assert_close(scores, wanted.scores, 1e-5)
