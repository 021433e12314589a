"""What explain.py takes where a flag says nothing: the task's usual size and score, as detect.py does."""

from __future__ import annotations

from tasks import Task
from utils.cli.explain_arguments import ExplainConfig


def input_sides(config: ExplainConfig, task: Task) -> tuple[int, int]:
    """Height and width in px that images are fitted into."""
    height, width = config.imgsz or (task.defaults.imgsz, task.defaults.imgsz)
    return height, width


def lowest_score(config: ExplainConfig, task: Task) -> float:
    """That of a detection."""
    return task.defaults.conf if config.conf_thres is None else config.conf_thres
