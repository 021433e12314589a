"""Assigner and loss as one compiled graph: equal to eager, without graph breaks, one graph for each bucket of boxes."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from engine.training.compiling import compile_loss
from models.assigners.targets import bucket
from models.heads.anchor_based import AnchorDetect
from models.heads.anchor_free import Detect
from models.heads.base import HeadOutput
from models.heads.multi_branch import DualDDetect
from utils.config import Hyperparameters
from utils.types import Batch, Letterbox, Targets

CUDA, ANCHORS = torch.device("cuda"), [[10, 13, 16, 30]] * 3


def head_of(cls):
    channels = [16] * 3 * len(cls.branch_weights)
    head = cls(3, ANCHORS, channels) if cls.anchor_based else cls(3, channels)
    head.set_strides((8, 16, 32))
    return head


def case(branches: int, n: int) -> tuple[HeadOutput, Batch]:
    g = torch.Generator().manual_seed(n)
    maps = [tuple(torch.randn(2, 67, 64 // s, 64 // s, generator=g).requires_grad_() for s in (8, 16, 32)) for _ in range(branches)]
    boxes = torch.cat((0.3 + 0.4 * torch.rand(2 * n, 2, generator=g), 0.1 + 0.5 * torch.rand(2 * n, 2, generator=g)), dim=1)
    targets = Targets(torch.arange(2).repeat_interleave(n), torch.randint(3, (2 * n,), generator=g), boxes)
    letterbox = Letterbox(torch.zeros(2, 2), torch.ones(2, 2), torch.zeros(2, 2))
    return HeadOutput(tuple(maps)), Batch(torch.zeros(2, 3, 64, 64), targets, ("",) * 2, letterbox, n)


def parts_and_gradients(loss, output: HeadOutput, batch: Batch) -> list[torch.Tensor]:
    maps = [m for branch in output.branches for m in branch]
    parts = loss(output, batch)
    return [*parts.values(), *torch.autograd.grad(sum(parts.values()), maps)]


@pytest.mark.parametrize("cls", [Detect, pytest.param(DualDDetect, marks=pytest.mark.slow)])
def test_a_compiled_loss_equals_the_eager_one_in_one_graph(cls):
    torch._dynamo.reset()
    counters.clear()
    hyp = Hyperparameters()
    plain, compiled = (head_of(cls).build_loss(hyp) for _ in range(2))
    assert compiled.compile(backend="aot_eager") == ""
    for n in (3, 12, 0, 7):  # all in the bucket of 16
        inputs = case(len(cls.branch_weights), n)
        for got, wanted in zip(parts_and_gradients(compiled, *inputs), parts_and_gradients(plain, *inputs), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)
    with torch.no_grad():  # as in validation
        compiled(*case(len(cls.branch_weights), 20))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(("boxes", "length"), [(0, 16), (1, 16), (16, 16), (17, 32), (64, 64), (65, 128)])
def test_buckets_are_few(boxes, length):
    assert bucket(boxes) == length


@pytest.mark.parametrize(
    ("cls", "changes", "device", "sizes_vary", "said"),
    [
        (Detect, {}, CUDA, False, ""),
        (Detect, {}, torch.device("cpu"), False, "on a CPU"),
        (Detect, {}, CUDA, True, "--multi-scale and --rect"),
        (Detect, {"iou_loss": "WIoU"}, CUDA, False, "iou_loss WIoU"),
        (AnchorDetect, {}, CUDA, False, "heads with anchors"),
    ],
)
def test_what_is_not_compiled_is_said_in_a_line(cls, changes, device, sizes_vary, said, capsys):
    loss = head_of(cls).build_loss(Hyperparameters(anchor_t=4.0, obj=1.0, **changes))
    compile_loss(loss, device, sizes_vary=sizes_vary)
    out = capsys.readouterr().out
    assert said in out
    assert out.count("\n") == bool(said)
    assert (getattr(loss, "_compiled", None) is None) == bool(said)
