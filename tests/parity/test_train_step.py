"""One forward and backward of whole networks in training mode: raw maps, loss, every parameter's gradient, running statistics."""

from __future__ import annotations

import pytest
import torch

from models import build_model
from tests import golden
from utils.config import Hyperparameters
from utils.types import Batch, Letterbox, Targets

CASES = golden.all_names("models", "train_")
# Networks whose batch statistics over a few pixels magnify rounding: float32 and float64 differ by more than the usual tolerances, and an
# input disturbed by 1e-6 moves maps of yolov9-t by 1.5e-3 and the first gradient of yolov7-tiny by 3e-2. How much wider they are compared.
FIELDS = ("keypoints",)  # of targets
ROUNDING = {"train_gelan-t": 5, "train_yolov9-t": 5, "train_yolov7-tiny": 20}


@pytest.mark.parametrize("name", golden.cases("models", CASES))
def test_one_training_step(name):
    case = golden.find("models", name)
    args, wider = case.meta["args"], ROUNDING.get(name, 1)
    model = build_model(f"{name.removeprefix('train_').removeprefix('ultralytics-')}.yaml", nc=args["nc"])
    golden.fill_(model, case.meta.get("fill_g", 1.35)).train()
    if getattr(model.head, "reg_max", 0) == 1:
        raise_boxes_(model)
    size, (h, w) = args["batch"], args["imgsz"]
    output = model(torch.cat([golden.image_array(i, (1, 3, h, w)) for i in range(size)]))
    for i, raw in enumerate(raw for maps in output.branches for raw in maps if "raw_0" in case.arrays):
        golden.assert_close(as_map(raw), as_map(case.tensor(f"raw_{i}")), 1e-4 * wider, f"raw map {i}")
    for i, layer in enumerate(case.meta["bn_checked"]):
        for statistic in ("running_mean", "running_var"):
            value = getattr(model.get_submodule(layer), statistic)
            golden.assert_close(value, case.tensor(f"bn_{i}_{statistic}"), 1e-4 * wider, f"{layer}.{statistic}")

    targets, fields = case.tensor("targets"), {name: case.tensor(name) for name in FIELDS if name in case.arrays}
    letterbox = Letterbox(torch.tensor([[h, w]] * size), torch.ones(size, 2), torch.zeros(size, 2))
    most = int(targets[:, 0].long().bincount().max())
    batch = Batch(torch.zeros(size, 3, h, w), Targets.of_rows(targets).replace(**fields), ("",) * size, letterbox, most)
    loss = model.head.build_loss(hyperparameters(case))
    if "updates" in args:  # of heads with two branches; their items are reported for one branch, the vector has both
        loss.begin_epoch(args["updates"], args["epochs"])
    parts = loss(output, batch)
    items = case.tensor("loss_vector") / size if "loss_vector" in case.arrays else case.tensor("loss_items")[: len(parts)]
    published = [name.removesuffix("_loss") for name in case.meta.get("loss_names", parts)]
    items = items[[published.index(name) for name in parts]]
    golden.assert_close(torch.stack(list(parts.values())), items, 1e-4 * wider, "loss items")
    total = sum(parts.values()) * size
    golden.assert_close(total, case.tensor("loss_total").reshape(()), 1e-4 * wider, "loss")

    total.backward()
    parameters = dict(model.named_parameters())
    golden.assert_close(next(iter(parameters.values())).grad, case.tensor("grad_first_param"), 1e-3 * wider, "first gradient")
    norms = case.meta["param_grad_norms"]
    negligible = 1e-7 * max(filter(None, norms.values()))  # of the largest: below 1e-4 of it a norm is compared with that
    for key, norm in norms.items():
        gradient = parameters[key].grad
        assert (gradient is None) == (norm is None), key
        assert norm is None or float(gradient.norm()) == pytest.approx(norm, rel=2e-3 * wider, abs=2 * negligible), key


@torch.no_grad()
def raise_boxes_(model: torch.nn.Module) -> None:
    """Adds 2 to the last biases of the box convolutions, as the vectors of networks with plain distances have it."""
    for key, value in model.head.named_parameters():
        if key.split(".")[0].endswith("cv2") and key.endswith(".2.bias"):
            value += 2.0


def as_map(raw: torch.Tensor) -> torch.Tensor:
    """Maps of anchor-based heads are stored as (B, anchors, H, W, outputs)."""
    return raw.permute(0, 1, 4, 2, 3).flatten(1, 2) if raw.dim() == 5 else raw


def hyperparameters(case: golden.Golden) -> Hyperparameters:
    """The gains of the cases under losses/; the objectness gain without the scaling by area that those do not have."""
    h, w = case.meta["args"]["imgsz"]
    unscaled = 640**2 / (h * w)
    gains = {
        "ultralytics/yolov5": {"box": 0.05, "cls": 0.5, "obj": 1.0 * unscaled, "anchor_t": 4.0},
        "WongKinYiu/yolov7": {"box": 0.05, "cls": 0.3, "obj": 0.7 * unscaled, "anchor_t": 4.0},
    }.get(case.meta["source"], {"box": 7.5, "cls": 0.5, "dfl": 1.5})
    return Hyperparameters(**gains)
