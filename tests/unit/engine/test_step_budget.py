"""How many operations a whole training step costs, each a kernel on a GPU: numbers that may fall but not grow."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.memory_format import channels_last
from engine.micro_batches import TrainingMicroBatches
from engine.training.ema import ModelEMA
from engine.training.nonfinite_guard import NonFiniteGuard
from engine.training.optim import build_optimizer, optimizer_step
from models import build_model
from models.assigners import task_aligned as assigner
from models.losses import task_aligned as loss_module
from utils.config import Hyperparameters
from utils.types import Batch, Letterbox, Targets, to_unit_range

NOT_KERNELS = {torch.ops.aten.view, torch.ops.aten._unsafe_view, torch.ops.aten.detach}
BOXES = 6
PARTS = ("network", "loss", "backward", "guard and optimizer", "EMA", "back-up of the buffers")
BUDGET = {  # measured, and a few percent
    "yolov8n.yaml": (330, 340, 330, 36, 6, 4),
    "yolov9-t.yaml": (1600, 325, 1150, 36, 6, 4),
}


class Operations(TorchDispatchMode):
    """Counts the operations that are no views; those over lists of tensors count once, as on a GPU they are a few kernels."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and func.overloadpacket not in NOT_KERNELS
        return func(*args, **(kwargs or {}))


def operations(cfg: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Operations of each part of one step, on the way that a GPU takes."""
    for module in (assigner, loss_module):
        monkeypatch.setattr(module, "can_count_without_wait", lambda _: False)
    torch.manual_seed(0)
    hyp = Hyperparameters()
    model = channels_last(build_model(cfg, nc=3)).train()
    loss, ema = model.head.build_loss(hyp), ModelEMA(model)
    optimizer = build_optimizer(model, hyp, batch_size=2, accumulate=1)
    guard = NonFiniteGuard(model, loss.names, patience=1, folder=tmp_path)
    micro_batches = TrainingMicroBatches(model, loss, guard, torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    image = torch.arange(2).repeat_interleave(BOXES)
    targets = Targets(image, torch.ones_like(image), 0.2 + 0.4 * torch.rand(2 * BOXES, 4))
    letterbox = Letterbox(torch.full((2, 2), 64), torch.ones(2, 2), torch.zeros(2, 2))
    batch = Batch(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), targets, ("a", "b"), letterbox, BOXES, host_boxes=targets.boxes)

    def step() -> dict[str, int]:
        counts = []
        with Operations() as seen:
            micro_batches._detach_gradients()
            counts.append(seen.count)
            output = model(to_unit_range(batch.images))
            counts.append(seen.count)
            parts = loss(output, batch)
            total = guard.total_loss(parts, epoch=0, iteration=0, paths=batch.paths)
            counts.append(seen.count)
            total.backward()
            counts.append(seen.count)
            non_finite = guard.has_non_finite_loss()
            applied = optimizer_step(optimizer, scaler, clip_norm=10.0, non_finite=non_finite)
            guard.after_step(applied, non_finite)
            counts.append(seen.count)
            ema._blend_where(applied, ema._theirs, 0.1)  # what a GPU does
            counts.append(seen.count)
        backup, *others = (now - before for before, now in zip((0, *counts), counts))
        return dict(zip(PARTS, (*others, backup)))

    step()  # makes grids, momenta and gradients
    return step()


@pytest.mark.parametrize("cfg", BUDGET)
def test_operations_of_a_step_do_not_grow(cfg, tmp_path, monkeypatch):
    got, budget = operations(cfg, tmp_path, monkeypatch), dict(zip(PARTS, BUDGET[cfg], strict=True))
    assert not {part: (count, budget[part]) for part, count in got.items() if count > budget[part]}, got
    assert sum(got.values()) > 0.8 * sum(budget.values()), f"it fell far, so should the budget: {got}"
