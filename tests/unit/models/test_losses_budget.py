"""How many operations a loss costs on a GPU, forward and backward: a number that may fall but not grow."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models import build_model
from models.assigners import task_aligned as assigner
from models.heads.base import HeadOutput
from models.losses import task_aligned as loss_module
from utils.config import Hyperparameters
from utils.types import Batch, Letterbox, Targets

NOT_KERNELS = {torch.ops.aten.view, torch.ops.aten._unsafe_view, torch.ops.aten.detach}
BOXES = 6


class Operations(TorchDispatchMode):
    """Counts the operations that are no views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and func.overloadpacket not in NOT_KERNELS
        return func(*args, **(kwargs or {}))


def operations(cfg: str, monkeypatch: pytest.MonkeyPatch, *, px: int = 64, boxes: int = BOXES, listed: bool = True) -> int:
    """Operations of one call on the way that a GPU takes, and of its backward pass; without a bound of the candidates unless ``listed``."""
    for module in (assigner, loss_module):
        monkeypatch.setattr(module, "can_count_without_wait", lambda _: False)
    torch.manual_seed(0)
    model = build_model(cfg, nc=3).train()
    images = torch.rand(2, 3, px, px)
    with torch.no_grad():
        branches = model(images).branches
    output = HeadOutput(tuple(tuple(m.detach().requires_grad_() for m in maps) for maps in branches))
    image, ones = torch.arange(2).repeat_interleave(boxes), torch.ones(2 * boxes, dtype=torch.long)
    targets = Targets(image, ones, 0.2 + 0.4 * torch.rand(2 * boxes, 4))
    letterbox = Letterbox(torch.full((2, 2), px), torch.ones(2, 2), torch.zeros(2, 2))
    batch = Batch(images, targets, ("a", "b"), letterbox, boxes, host_boxes=targets.boxes if listed else None)
    loss = model.head.build_loss(Hyperparameters())
    loss(output, batch)  # makes the grid, once for each size
    with Operations() as seen:
        sum(loss(output, batch).values()).backward()
    return seen.count


@pytest.mark.parametrize(("cfg", "budget"), [("yolov8n.yaml", 440), ("yolov9-t.yaml", 440)])
def test_operations_of_the_loss_do_not_grow(cfg, budget, monkeypatch):
    assert 0.8 * budget < operations(cfg, monkeypatch) <= budget  # where it falls far, the budget falls too


@pytest.mark.parametrize(("cfg", "branches"), [("yolov8n.yaml", 1), ("yolov9-t.yaml", 2)])
def test_operations_do_not_grow_with_the_parts_of_many_boxes(cfg, branches, monkeypatch):
    """Comparing all boxes with all cells takes three parts here, at 640 px four with 100 boxes in each of 32 images."""
    case = {"px": 128, "boxes": 12}
    one_part = operations(cfg, monkeypatch, **case)
    monkeypatch.setattr(assigner, "MAX_PAIRS", 5 * branches * 2 * 336)  # five boxes of each image
    assert operations(cfg, monkeypatch, **case) == one_part
    assert operations(cfg, monkeypatch, listed=False, **case) > one_part
