"""The recipes of YOLOv10, YOLO11, YOLO12 and YOLO26: found by family and size, with the published values."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.training.recipes import family_hyp, find_hyp
from engine.training.setup.config import resolve_optimizer
from utils.config import TrainConfig
from utils.hyperparameters import Hyperparameters

HYPS = Path(__file__).parents[3] / "data" / "hyps"
# scale, mixup, copy_paste of YOLO12 and of YOLO26's training from scratch
AUGMENTATION = {"n": (0.5, 0.0, 0.1), "s": (0.9, 0.05, 0.15), "m": (0.9, 0.15, 0.4), "l": (0.9, 0.15, 0.5), "x": (0.9, 0.2, 0.6)}
# lr0, lrf, momentum, box, cls, dfl, mixup, copy_paste, scale of YOLO26's second stage
FINETUNE = {
    "n": (0.0054, 0.0495, 0.947, 5.63, 0.56, 9.04, 0.012, 0.075, 0.562),
    "s": (0.00038, 0.882, 0.948, 9.83, 0.65, 0.96, 0.05, 0.404, 0.9),
    "m": (0.00038, 0.882, 0.948, 9.83, 0.65, 0.96, 0.427, 0.304, 0.95),
    "l": (0.00038, 0.882, 0.948, 9.83, 0.65, 0.96, 0.427, 0.404, 0.95),
    "x": (0.00038, 0.882, 0.948, 9.83, 0.65, 0.96, 0.427, 0.404, 0.95),
}


def recipe(name: str) -> Hyperparameters:
    return Hyperparameters.from_yaml(HYPS / f"hyp.{name}.yaml")


@pytest.mark.parametrize(
    ("name", "scale", "found"),
    [
        ("yolov10.yaml", "s", "v8"),
        ("yolo11.yaml", "n", "v8"),
        ("yolo12.yaml", "l", "v12l"),
        ("yolov13.yaml", "x", "v12x"),
        ("yolov12.yaml", "x", "v12x"),
        ("yolo26.yaml", "n", "v26n"),
        ("yolo26-EMA.yaml", "m", "v26m"),
        ("yolo26.yaml", "", "v26n"),
        ("yolo26.yaml", "b", "v26n"),
        ("model.yaml (yolo12.yaml)", "s", "v12s"),
    ],
)
def test_a_family_and_its_size_have_a_recipe(name, scale, found):
    file = family_hyp(name, "v8", False, scale=scale)
    assert file == f"hyp.{found}.yaml"
    assert find_hyp(file, HYPS).is_file()


@pytest.mark.parametrize("size", AUGMENTATION)
def test_recipes_from_scratch_have_the_published_values(size):
    for family in ("v12", "v26"):
        hyp = recipe(f"{family}{size}")
        assert (hyp.scale, hyp.mixup, hyp.copy_paste) == AUGMENTATION[size]
        assert (hyp.lr0, hyp.lrf, hyp.momentum, hyp.weight_decay, hyp.box, hyp.cls, hyp.mosaic) == (0.01, 0.01, 0.937, 5e-4, 7.5, 0.5, 1.0)
    assert (hyp.dfl, hyp.close_mosaic, hyp.warmup_epochs) == (6.0, 8, 2.0 if size == "x" else 1.0)
    older = recipe(f"v12{size}")
    assert (older.dfl, older.close_mosaic, older.warmup_epochs) == (1.5, 10, 3.0)


@pytest.mark.parametrize("size", FINETUNE)
def test_recipes_for_pretrained_weights_have_the_published_values(size):
    hyp = recipe(f"v26{size}-finetune")
    values = (hyp.lr0, hyp.lrf, hyp.momentum, hyp.box, hyp.cls, hyp.dfl, hyp.mixup, hyp.copy_paste, hyp.scale)
    assert values == FINETUNE[size]
    assert hyp.close_mosaic == 10


def test_only_yolo26_is_trained_with_musgd():
    of_recipes = {path.name: Hyperparameters.from_yaml(path).optimizer for path in HYPS.glob("hyp.*.yaml")}
    assert {name for name, optimizer in of_recipes.items() if optimizer == "MuSGD"} == {n for n in of_recipes if n.startswith("hyp.v26")}
    assert {of_recipes[name] for name in of_recipes if not name.startswith(("hyp.v26", "hyp.rtdetr"))} == {"SGD"}


def test_without_a_flag_the_recipes_optimizer_is_used_and_named(capsys):
    config, hyp = resolve_optimizer(TrainConfig(cfg="yolo26n.yaml"), recipe("v26n"))
    assert (config.optimizer, hyp.optimizer) == ("MuSGD", "MuSGD")
    assert capsys.readouterr().out == "No --optimizer: MuSGD, the recipe's\n"
    config, hyp = resolve_optimizer(TrainConfig(cfg="yolo11n.yaml"), recipe("v8"))
    assert (config.optimizer, hyp.optimizer, capsys.readouterr().out) == ("SGD", "SGD", "")


def test_the_flag_takes_precedence_over_the_recipe(capsys):
    config, hyp = resolve_optimizer(TrainConfig(cfg="yolo26n.yaml", optimizer="SGD"), recipe("v26n"))
    assert (config.optimizer, hyp.optimizer, capsys.readouterr().out) == ("SGD", "SGD", "")
