"""The forms with a level of stride 4: found by name, deployed to the single-branch form key for key, and trained."""

from __future__ import annotations

import pytest
import torch

from models import build_model
from tests.golden import image_array
from utils.config import Hyperparameters
from utils.types import Batch, Letterbox, Targets


def also_slow(quick: tuple[str, ...], slow: tuple[str, ...]) -> list:
    return [*quick, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


@pytest.mark.parametrize("name", also_slow(("yolov9-t-p2", "yolov9-c-p2"), tuple(f"{f}-p2" for f in ("yolov9-s", "yolov9-m", "gelan-c"))))
def test_p2_configs_have_four_levels(name):
    with torch.device("meta"):
        model = build_model(name, nc=3)
    assert model.strides == (4, 8, 16, 32)
    assert len(model.plans[-1].sources) == 4 * len(model.head.branch_weights)
    read = {s for plan in model.plans for s in plan.sources}
    assert read >= set(range(len(model.plans) - 1)), "a row is read by no other"


@pytest.mark.parametrize("scale", also_slow(("t",), ("s", "m", "c")))
@torch.no_grad()
def test_deploying_gives_the_form_without_auxiliary_branch(scale):
    model = build_model(f"yolov9-{scale}-p2", nc=3).eval()
    lean, gelan = model.deploy(fuse=False), build_model(f"gelan-{scale}-p2", nc=3)
    assert [(k, v.shape) for k, v in lean.state_dict().items()] == [(k, v.shape) for k, v in gelan.state_dict().items()]
    images = image_array(0, (1, 3, 64, 96))
    assert all(torch.equal(a, b) for a, b in zip(lean(images).main, model(images).main, strict=True))
    assert model.deploy().predict(images).boxes.shape == (1, sum(64 * 96 // s**2 for s in (4, 8, 16, 32)), 4)


@pytest.mark.parametrize("name", also_slow(("yolov9-t-p2",), ("gelan-t-p2", "yolov8n-p2", "yolov9-s-p2", "yolov9-c-p2")))
def test_one_training_step(name):
    """Two images with boxes of 6 to 40 px: every parameter that is trained gets a gradient, and nearly all move."""
    model = build_model(name, nc=3).train()
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.1, 0.1], [0, 2, 0.3, 0.6, 0.6, 0.4], [1, 0, 0.7, 0.4, 0.3, 0.5]])
    letterbox = Letterbox(torch.tensor([[64, 64]] * 2), torch.ones(2, 2), torch.zeros(2, 2))
    batch = Batch(torch.zeros(2, 3, 64, 64), Targets.of_rows(targets), ("",) * 2, letterbox, 2)
    images = torch.cat([image_array(i, (1, 3, 64, 64)) for i in range(2)])
    parts = model.head.build_loss(Hyperparameters())(model(images), batch)
    assert all(part > 0 for part in parts.values())
    sum(parts.values()).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    before = [p.detach().clone() for p in trained]
    torch.optim.SGD(trained, lr=0.01).step()
    moved = sum(not torch.equal(p, was) for p, was in zip(trained, before))
    assert moved > 0.8 * len(trained)  # a level that no box is assigned to learns its scores only
