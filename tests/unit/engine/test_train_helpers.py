"""The small parts of a training: early stop, running means, sizes, precision, recipes, random state."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from engine.logging.progress import LossMeter
from engine.memory_format import channels_last
from engine.task_presets import HYPS
from engine.training.early_stop import EarlyStop
from engine.training.multi_scale import rescale
from engine.training.recipes import family_hyp, find_hyp, gains_warning
from models import build_model
from utils.config import Hyperparameters
from utils.distributed import process_group, select_device
from utils.errors import UserError
from utils.precision import autocast, gradient_scaler, precision_of
from utils.random_state import random_state, set_random_state


def test_early_stop_waits_for_its_patience():
    stop = EarlyStop(patience=2)
    assert [stop.update(e, f) for e, f in enumerate([0.1, 0.3, 0.3, 0.2, 0.2])] == [True, True, True, False, False]
    assert (stop.best_epoch, stop.is_due(3), stop.is_due(4)) == (2, False, True)
    assert not EarlyStop(patience=0, best_epoch=0).is_due(10_000)


def test_loss_meter_averages():
    meter = LossMeter(("box", "cls"))
    assert all(np.isnan(v) for v in meter.means().values())
    meter.update({"cls": torch.tensor(4.0), "box": torch.tensor(1.0, requires_grad=True)})
    meter.update({"box": torch.tensor(3.0), "cls": torch.tensor(6.0)})
    assert meter.means() == {"box": 2.0, "cls": 5.0}


def test_loss_means_skip_nan_and_resume_from_a_saved_state():
    meter = LossMeter(("box",), finite_only=True)
    for value in (1.0, float("nan"), float("inf"), 4.0):
        meter.update({"box": torch.tensor(value)})
    assert meter.means() == {"box": 2.5}
    other = LossMeter(("box",), finite_only=True)
    other.load_state_dict(meter.state_dict(), device="cpu")
    other.update({"box": torch.tensor(1.0)})
    assert other.means() == {"box": 2.0}
    other.load_state_dict({}, device="cpu")
    assert np.isnan(other.means()["box"])


def test_multi_scale_sides_depend_on_seed_epoch_and_step_only():
    images = torch.rand(2, 3, 320, 256)
    sides = [rescale(images, base_px=320, stride=32, key=(0, 1, i)).shape[2:] for i in range(40)]
    assert sides == [rescale(images, base_px=320, stride=32, key=(0, 1, i)).shape[2:] for i in range(40)]
    heights = {h for h, _ in sides}
    assert min(heights) >= 160
    assert max(heights) <= 480
    assert len(heights) > 5
    assert all(h % 32 == 0 and w % 32 == 0 and w <= h for h, w in sides)


def test_precision_on_a_cpu():
    cpu = torch.device("cpu")
    assert precision_of("auto", cpu) is None
    assert precision_of("off", torch.device("cuda")) is None
    assert precision_of("bf16", cpu) is torch.bfloat16
    with pytest.raises(UserError, match="fp16: needs a GPU"):
        precision_of("fp16", cpu)
    with autocast(cpu, torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
    assert not gradient_scaler(cpu, None).is_enabled()


@pytest.mark.parametrize(
    ("name", "dialect", "anchors", "recipe"),
    [
        ("yolov5s.yaml", "v5", True, "scratch-low"),
        ("yolov5nu.yaml", "v8", False, "v8"),
        ("yolov7.yaml", "v5", True, "scratch.p5"),
        ("yolov7-tiny.yaml", "v5", True, "scratch.tiny"),
        ("yolov7-e6e.yaml", "v5", True, "scratch.p6"),
        ("yolov7-af.yaml", "v5", False, "scratch-high"),
        ("yolov8.yaml", "v8", False, "v8"),
        ("gelan-c.yaml", "v5", False, "scratch-high"),
        ("YOLOv9-c-FocalModulation.yaml", "v5", False, "scratch-high"),
        ("mine.yaml", "v8", False, "v8"),
        ("mine.yaml", "v5", True, "scratch-low"),
        ("mine.yaml", "v5", False, "scratch-high"),
    ],
)
def test_a_family_has_its_recipe(name, dialect, anchors, recipe):  # the sizes of newer families: test_recipes.py
    assert family_hyp(name, dialect, anchors) == f"hyp.{recipe}.yaml"


# gains, and what else the families' published files differ in
PUBLISHED = {
    "scratch-low": {"box": 0.05, "cls": 0.5, "obj": 1.0, "lrf": 0.01, "warmup_min_iters": 100, "scale": 0.5, "mixup": 0.0},
    "scratch-med": {"box": 0.05, "cls": 0.3, "obj": 0.7, "lrf": 0.1, "warmup_min_iters": 100, "scale": 0.9, "mixup": 0.1},
    "scratch.p5": {"box": 0.05, "cls": 0.3, "obj": 0.7, "lrf": 0.1, "warmup_min_iters": 1000, "translate": 0.2, "mixup": 0.15},
    "scratch.p6": {"box": 0.05, "cls": 0.3, "obj": 0.7, "lrf": 0.2, "warmup_min_iters": 1000, "translate": 0.2, "mixup": 0.15},
    "scratch.tiny": {"box": 0.05, "cls": 0.5, "obj": 1.0, "lrf": 0.01, "warmup_min_iters": 1000, "translate": 0.1, "mixup": 0.05},
    "v8": {"box": 7.5, "cls": 0.5, "dfl": 1.5, "lrf": 0.01, "warmup_min_iters": 0, "scale": 0.5, "close_mosaic": 10},
    "scratch-high": {"box": 7.5, "cls": 0.5, "dfl": 1.5, "lrf": 0.01, "warmup_min_iters": 100, "scale": 0.9, "copy_paste": 0.3},
}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_recipes_have_the_published_values(recipe):
    hyp = Hyperparameters.from_yaml(HYPS / f"hyp.{recipe}.yaml")
    shared = {"lr0": 0.01, "momentum": 0.937, "weight_decay": 0.0005, "warmup_epochs": 3, "warmup_bias_lr": 0.1, "nbs": 64, "hsv_s": 0.7}
    assert {k: getattr(hyp, k) for k in PUBLISHED[recipe] | shared} == PUBLISHED[recipe] | shared
    anchors = hyp.box < 1
    assert hyp.anchor_t == (4 if anchors else 5)
    assert gains_warning(hyp.box, anchors) == ""
    assert f"box gain {hyp.box:g}" in gains_warning(hyp.box, not anchors)


BY_SIZE = {recipe.format(size) for recipe in ("v12{}", "v26{}", "v26{}-finetune") for size in "nsmlx"}  # test_recipes.py


OF_TASKS = ("cls", "demo-cls", "rtdetr")  # found by the task or the head


def test_every_hyp_file_is_a_family_recipe_or_for_small_sets():
    assert {p.stem.removeprefix("hyp.") for p in HYPS.glob("*.yaml")} == {*PUBLISHED, "demo", "small", "small-anchors", *BY_SIZE, *OF_TASKS}


def test_a_recipe_is_found_by_its_last_part(tmp_path):
    (tmp_path / "hyp.a.yaml").write_text("")
    assert find_hyp("data/hyp.a.yaml", tmp_path) == tmp_path / "hyp.a.yaml"
    with pytest.raises(UserError, match=r"hyp\.b\.yaml: no such file, here or in .*; did you mean 'hyp\.a\.yaml'\?"):
        find_hyp("hyp.b.yaml", tmp_path)
    (tmp_path / "hyp.long.yaml").write_text("")
    with pytest.raises(UserError, match=r"did you mean 'hyp\.long\.yaml'\?"):
        find_hyp("hyp.long", tmp_path)


def test_random_state_is_restored():
    state = random_state()
    draw = [random.random(), np.random.rand(), torch.rand(1).item()]  # noqa: NPY002
    set_random_state(state)
    assert [random.random(), np.random.rand(), torch.rand(1).item()] == draw  # noqa: NPY002


def test_missing_devices_are_refused(monkeypatch):
    assert select_device("CPU") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("") == torch.device("cpu")
    with pytest.raises(UserError, match="--device 0: no CUDA"):
        select_device("0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert select_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="torchrun --nproc_per_node 2"):
        select_device("0,1")
    with pytest.raises(UserError, match="GPU numbers below 2"):
        select_device("5")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert select_device("0,1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="no more processes than GPUs"):
        select_device("0")


def test_the_chosen_gpu_is_the_current_one_in_a_single_process_too(monkeypatch):
    """Peak memory and name of the device are asked without naming it."""
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for device in (torch.device("cuda", 1), torch.device("cpu")):
        with process_group(device):
            assert current == [torch.device("cuda", 1)]


def test_five_dimensional_tables_keep_their_layout_and_the_rest_is_channels_last():
    model = channels_last(build_model("yolov8n-BoT3.yaml", nc=3))
    dims = {p.dim() for p in model.parameters()}
    assert 5 in dims  # MHSA's tables, which Module.to(memory_format=channels_last) refuses
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.dim() == 4)
    model.eval()(torch.rand(1, 3, 64, 96))
