"""``--task`` of train.py: model, data set and recipe of a task where they are not given, and one line where they do not agree."""

from __future__ import annotations

import pytest

from engine.task_presets import PRESETS, task_of, with_embedded_data, with_presets
from engine.training.setup.config import resolve_config
from models.spec.parser import load_spec
from models.spec.planning import plan_layers
from tasks import TASKS
from utils.config import TASK_NAMES, TrainConfig
from utils.errors import UserError


@pytest.mark.parametrize("name", TASK_NAMES)
def test_every_task_has_a_model_of_its_own_and_a_data_set(name):
    assert name in TASKS
    preset = PRESETS[name]
    assert plan_layers(load_spec(preset.cfg))[-1].cls.task.name == name
    config = with_presets(TrainConfig(task=name))
    assert (config.cfg, config.data, config.epochs) == (preset.cfg, preset.data, preset.recipe["epochs"])
    assert task_of(config, None) == name


def test_what_is_given_stays():
    given = TrainConfig(task="segment", imgsz=96, epochs=3, data="mine.yaml")
    config = with_presets(given)
    assert (config.cfg, config.data, config.imgsz, config.epochs, config.hyp) == ("yolov8n-seg.yaml", "mine.yaml", 96, 3, "")
    named = TrainConfig(task="segment", cfg="yolo11n-seg.yaml")
    assert with_presets(named) == named
    assert with_embedded_data(given, "segment") == given


def test_the_embedded_set_is_that_of_the_models_task(capsys):
    config, _ = resolve_config(TrainConfig(cfg="yolov8n-seg.yaml"))
    assert config.data == "shapes-seg.yaml"
    assert "no --data, so the embedded data set shapes-seg.yaml" in capsys.readouterr().err
    config, _ = resolve_config(TrainConfig(cfg="yolov8n.yaml"))
    assert config.data == "shapes.yaml"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (TrainConfig(task="segment", cfg="yolov8n.yaml"), "--task segment: yolov8n.yaml is for the task 'detect'; give --cfg yolov8n-seg"),
        (TrainConfig(data="mine.yaml"), "give --cfg .* --weights or --task"),
    ],
)  # fmt: skip
def test_what_does_not_agree_is_one_line(config, says):
    with pytest.raises(UserError, match=says):
        resolve_config(config)
