"""What train.py takes for a task where nothing is given: a small published model, the embedded data set, a recipe of a few minutes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.spec.parser import load_spec
from models.spec.planning import plan_layers
from models.spec.registry import load_plugin
from utils.config import TrainConfig
from utils.errors import UserError

if TYPE_CHECKING:
    from models.checkpoints.checkpoint import Checkpoint

HYPS = Path(__file__).parents[1] / "data" / "hyps"
SMALL: dict[str, Any] = {
    "hyp": str(HYPS / "hyp.demo.yaml"), "imgsz": 128, "epochs": 9, "batch_size": 8, "optimizer": "AdamW", "workers": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TaskPreset:
    """Defaults of a task.

    Attributes:
        cfg: model, where none is given.
        data: embedded data set, where none is given.
        recipe: flags of a training of a few minutes, where neither model nor data set is given.
    """

    cfg: str
    data: str
    recipe: Mapping[str, Any] = field(default_factory=lambda: SMALL)

    @property
    def flags(self) -> dict[str, Any]:
        """All of it."""
        return {"cfg": self.cfg, "data": self.data, **self.recipe}


PRESETS = {
    "detect": TaskPreset("yolov9-t-FocalModulation.yaml", "shapes.yaml"),
    "segment": TaskPreset("yolov8n-seg.yaml", "shapes-seg.yaml"),
    "pose": TaskPreset("yolov8n-pose.yaml", "shapes-pose.yaml"),
    "obb": TaskPreset("yolov8n-obb.yaml", "shapes-obb.yaml"),
    "classify": TaskPreset("yolov8n-cls.yaml", "shapes-cls.yaml", {**SMALL, "hyp": str(HYPS / "hyp.demo-cls.yaml"), "imgsz": 64}),
}


def with_presets(config: TrainConfig) -> TrainConfig:
    """The config with the model, the data set and the recipe of the task that it names, detection if none, where it has none of them.

    Raises:
        UserError: --data is given alone: nothing says what to train.
    """
    if config.cfg or config.weights:
        return config
    preset = PRESETS[config.task or "detect"]
    if config.data and not config.task:
        raise UserError("give --cfg (such as yolov9-t-FocalModulation.yaml), --weights or --task: what should be trained on --data?")
    if config.data:
        print(f"Neither --cfg nor --weights: --task {config.task} takes {preset.cfg}")
        return config.replace(cfg=preset.cfg)
    defaults = TrainConfig()
    taken = {k: v for k, v in preset.flags.items() if getattr(config, k) == getattr(defaults, k) and v != getattr(defaults, k)}
    whose = f"the preset of --task {config.task}" if config.task else "the demo's preset"
    print(f"Neither --cfg nor --weights: {whose} ({', '.join(f'{k} {v}' for k, v in taken.items())})")
    return config.replace(**taken)


def with_embedded_data(config: TrainConfig, task: str) -> TrainConfig:
    """The config with the embedded data set of a task, where it names none."""
    if config.data:
        return config
    data = PRESETS[task if task in PRESETS else "detect"].data
    print(f"warning: no --data, so the embedded data set {data} is used", file=sys.stderr)
    return config.replace(data=data)


def task_of(config: TrainConfig, checkpoint: Checkpoint | None) -> str:
    """The task of the model that --cfg names, or the checkpoint holds; that of --task where neither says it.

    Raises:
        UserError: the model YAML is wrong, or its task is another than --task.
    """
    for path in config.plugins:
        load_plugin(path)
    cfg: str | Mapping[str, Any] = config.cfg or ({**checkpoint.cfg, "yaml_file": checkpoint.cfg_name} if checkpoint else {})
    if not cfg or (isinstance(cfg, dict) and len(cfg) == 1):  # bare weights
        return config.task or "detect"
    head: Any = plan_layers(load_spec(cfg))[-1].cls
    found = str(head.task.name) if hasattr(head, "task") else "detect"
    if config.task and config.task != found:
        source = config.cfg or config.weights
        other = PRESETS[config.task].cfg
        more = f"--cfg {other}" if config.cfg else f"--cfg {other} too, which takes over what fits of the weights"
        raise UserError(f"--task {config.task}: {source} is for the task {found!r}; give {more}, or leave --task out")
    return found
