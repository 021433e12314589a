"""Losses of anchor-based heads on their own: no targets, gains, smoothing, precision, and independence of how the work is cut up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.assigners import anchor_ratio, places, simota
from models.assigners.targets import pad_targets
from models.heads.anchor_based import AnchorDetect, IAuxDetect, IDetect
from models.heads.base import HeadOutput
from models.losses.cells import places_and_plane
from tests.fake_cuda import DeviceRecord, fake_cuda
from utils.config import Hyperparameters
from utils.types import Batch, Letterbox, Targets

STRIDES = (8, 16, 32)
ANCHORS = [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]]
HYP = Hyperparameters(box=0.05, cls=0.5, obj=1.0, anchor_t=4.0)


def built(cls=AnchorDetect, nc: int = 4):
    head = cls(nc, ANCHORS, [8] * 3 * len(cls.branch_weights))
    head.set_strides(STRIDES)
    return head


def random_output(branches: int = 1, *, nc: int = 4, size: int = 128, batch: int = 2) -> HeadOutput:
    g = torch.Generator().manual_seed(0)
    shapes = [(batch, 3 * (5 + nc), size // s, size // s) for s in STRIDES]
    return HeadOutput(tuple(tuple(torch.randn(shape, generator=g).requires_grad_() for shape in shapes) for _ in range(branches)))


def batch_of(n: int, *, nc: int = 4, batch: int = 2, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    image = torch.arange(batch).repeat_interleave(n)[:, None].float()
    columns = (image, torch.randint(nc, (batch * n, 1), generator=g), *torch.rand(2, batch * n, 2, generator=g))
    none = Letterbox(torch.zeros(batch, 2).long(), torch.ones(batch, 2), torch.zeros(batch, 2))
    targets = torch.cat([c.float() for c in columns], dim=1)
    return Batch(torch.zeros(batch, 3, 128, 128, dtype=torch.uint8), Targets.of_rows(targets), ("",) * batch, none, n)


@pytest.mark.parametrize("cls", [AnchorDetect, IDetect, IAuxDetect])
def test_without_targets_only_the_objectness_counts(cls):
    output = random_output(len(cls.branch_weights))
    parts = built(cls).build_loss(HYP)(output, batch_of(0))
    assert parts["box"] == parts["cls"] == 0
    wanted = sum(
        weight * balance * F.softplus(m.unflatten(1, (3, 9))[:, :, 4]).mean()
        for weight, maps in zip(cls.branch_weights, output.branches)
        for balance, m in zip((4.0, 1.0, 0.4), maps)
    )
    torch.testing.assert_close(parts["obj"], wanted * (128 / 640) ** 2)
    sum(parts.values()).backward()
    for m in (m for maps in output.branches for m in maps):
        grad = m.grad.unflatten(1, (3, 9))
        assert (grad[:, :, 4] > 0).all()
        assert (grad[:, :, :4] == 0).all()
        assert (grad[:, :, 5:] == 0).all()


@pytest.mark.parametrize("cls", [AnchorDetect, IDetect, IAuxDetect])
def test_losses_on_the_fake_cuda_device_are_equal_and_never_sync(cls, monkeypatch):
    """There the work takes another way, whose sizes are known beforehand.

    Few boxes: where two want one place, equal costs may fall either way.
    """
    here, there = (random_output(len(cls.branch_weights)) for _ in range(2))
    expected = built(cls).build_loss(HYP)(here, batch_of(3))
    sum(expected.values()).backward()
    with fake_cuda(monkeypatch) as seen:
        head, far = built(cls).to("cuda"), [m.detach().to("cuda").requires_grad_() for maps in there.branches for m in maps]
        parts = head.build_loss(HYP)(HeadOutput(tuple(tuple(far[i : i + 3]) for i in range(0, len(far), 3))), batch_of(3).to("cuda"))
        sum(parts.values()).backward()
    assert seen == DeviceRecord()
    for name, part in parts.items():
        torch.testing.assert_close(part.host, expected[name], msg=name)
    for mine, other in zip(far, (m for maps in here.branches for m in maps)):
        torch.testing.assert_close(mine.grad.host, other.grad, rtol=1e-4, atol=1e-7)


def test_gains_follow_levels_classes_and_area():
    output, batch = random_output(), batch_of(5)
    parts = built().build_loss(HYP)(output, batch)
    double = built().build_loss(HYP.replace(box=0.1, obj=2.0, cls=1.0))(output, batch)
    for name in parts:
        torch.testing.assert_close(double[name], 2 * parts[name])
    loss = built().build_loss(HYP)
    assert loss.gains[:3] == pytest.approx((0.05, 1.0, 0.5 * 4 / 80))


def test_one_class_has_no_class_loss():
    parts = built(nc=1).build_loss(HYP)(random_output(nc=1), batch_of(5, nc=1))
    assert parts["cls"] == 0
    assert parts["box"] > 0


def test_label_smoothing_moves_targets():
    loss = built().build_loss(HYP.replace(label_smoothing=0.1))
    assert loss._class_targets(torch.tensor([[2]]))[0, :, 0].tolist() == pytest.approx([0.05, 0.05, 0.95, 0.05])


@pytest.mark.parametrize("cls", [AnchorDetect, IDetect, IAuxDetect])
@pytest.mark.parametrize("n", [1, 30])
def test_loss_does_not_depend_on_chunk_sizes(monkeypatch, cls, n):
    output, batch = random_output(len(cls.branch_weights)), batch_of(n)
    wanted = built(cls).build_loss(HYP)(output, batch)
    assert all(v > 0 for v in wanted.values())
    monkeypatch.setattr(simota, "CACHED_PAIRS", 50)
    monkeypatch.setattr(simota, "MAX_LOGITS", 100)
    monkeypatch.setattr(places, "MAX_VALUES", 100)
    monkeypatch.setattr(anchor_ratio, "can_count_without_wait", lambda _: False)  # what a GPU does
    for name, part in built(cls).build_loss(HYP)(output, batch).items():
        # A place that is listed for two boxes costs a third one the same twice, which leaves topk a choice.
        torch.testing.assert_close(part, wanted[name], rtol=1e-3 if cls is IAuxDetect else 1e-5, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation's result had."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() >= tensor.numel():  # no expanded view
                self.most = max(self.most, tensor.numel())
        return result


def test_no_tensor_of_ota_grows_with_the_square_of_the_boxes(monkeypatch):
    monkeypatch.setattr(simota, "CACHED_PAIRS", 1 << 10)
    loss, output, largest = built(IAuxDetect).build_loss(HYP), random_output(2), {}
    for n in (50, 200):
        batch = batch_of(n)
        grid = anchor_ratio.anchor_grid(output.main, loss.anchors(), STRIDES)
        targets = pad_targets(batch.targets, n, batch_size=2, hw_px=(128, 128))
        scene = anchor_ratio.Scene(output.main, grid, loss.anchors(), STRIDES, targets, True)
        with LargestTensor() as seen:
            matches = loss.assign(scene)
        largest[n] = seen.most
        assert seen.most < 40 * matches.place.numel()  # the pairs would be n a place
    assert largest[200] < 5 * largest[50]


PEAK = """
import resource, sys, torch
from models.heads.anchor_based import IAuxDetect
from models.assigners.anchor_ratio import Scene, anchor_grid
from models.assigners.targets import pad_targets
from utils.config import Hyperparameters
from utils.types import Targets

torch.set_num_threads(1)
head = IAuxDetect(80, {anchors}, [8] * 6)
head.set_strides((8, 16, 32))
loss, g = head.build_loss(Hyperparameters(anchor_t=4.0)), torch.Generator().manual_seed(0)
maps = [torch.empty(16, 255, 640 // s, 640 // s).normal_(generator=g) for s in (8, 16, 32)]
grid = anchor_grid(maps, head.anchors, head.strides)

def peak_mib(boxes):
    image = torch.arange(16).repeat_interleave(boxes)[:, None]
    label = torch.randint(80, (16 * boxes, 1), generator=g)
    centre, size = torch.rand(2, 16 * boxes, 2, generator=g)
    rows = torch.cat((image, label, centre, 0.01 + 0.4 * size**2), 1)
    targets = pad_targets(Targets.of_rows(rows), boxes, batch_size=16, hw_px=(640, 640))
    assert int(loss.assign(Scene(maps, grid, head.anchors, head.strides, targets, {auxiliary})).mask.sum()) > 2 * boxes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before = peak_mib(1)
print(peak_mib(500) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is Linux's")
@pytest.mark.parametrize("auxiliary", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ota_takes_little_memory_for_500_boxes_an_image(auxiliary):
    """Batch 16, 640 px, 80 classes: over 40 million pairs, and 69 million with the wide candidates of an auxiliary branch."""
    code = PEAK.format(anchors=ANCHORS, auxiliary=auxiliary)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True, timeout=900)
    assert float(done.stdout) < 256, done.stdout


@pytest.mark.parametrize("cls", [AnchorDetect, IDetect])
def test_half_maps_are_summed_in_float32(cls):
    output = HeadOutput((tuple(m.detach().bfloat16().requires_grad_() for m in random_output().main),))
    exact = HeadOutput((tuple(m.detach().float() for m in output.main),))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = built(cls).build_loss(HYP)(output, batch_of(4))
    for name, wanted in built(cls).build_loss(HYP)(exact, batch_of(4)).items():
        assert parts[name].dtype == torch.float32
        torch.testing.assert_close(parts[name], wanted)
    sum(parts.values()).backward()
    assert all(m.grad.isfinite().all() for m in output.main)


def test_saturated_predictions_stay_finite():
    output = HeadOutput((tuple(m.detach().mul(200).requires_grad_() for m in random_output().main),))
    parts = built(IDetect).build_loss(HYP)(output, batch_of(6))
    sum(parts.values()).backward()
    assert all(v.isfinite() for v in parts.values())
    assert all(m.grad.isfinite().all() for m in output.main)


def test_boxes_on_borders_and_full_image_boxes_give_finite_losses():
    batch = batch_of(5)
    on_borders = [[0, 0, 0, 0, 0.2, 0.2], [0, 1, 1, 1, 0.2, 0.2], [0, 2, 0, 1, 0.3, 0.1], [1, 3, 1, 0, 0.1, 0.4]]
    edges = torch.tensor([*on_borders, [1, 0, 0.5, 0.5, 1, 1]])
    parts = built(IDetect).build_loss(HYP)(random_output(), batch._replace(targets=Targets.of_rows(edges), max_boxes=3))
    assert all(v > 0 and v.isfinite() for v in parts.values())


def test_places_and_plane_has_the_right_gradient():
    g = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 2 * 4, h, h, generator=g, dtype=torch.float64).requires_grad_() for h in (3, 2)]
    place = torch.tensor([[0, 17, 18, 25], [9, 9, 20, 3]])
    assert torch.autograd.gradcheck(lambda *m: places_and_plane(m, place, outputs=4, channel=1), maps)
    picked, plane = places_and_plane(maps, place, outputs=4, channel=1)
    assert torch.equal(picked[1, :, 0], maps[0][1].view(2, 4, 9)[1, :, 0])  # place 9 is anchor 1, cell 0
    assert torch.equal(plane[:, 18:], maps[1].view(2, 2, 4, 4)[:, :, 1].flatten(1))
