"""What a kind of result is: one file a task, everything of it that is neither network nor pixels of the input pipeline.

``get_task("detect")`` gives a task by name; a head says which it has (``head.task``), and scripts ask the head.
"""

from __future__ import annotations

from tasks.base import TASKS, Task, get_task, register_task
from tasks.detect import DETECT
from tasks.pose import POSE
from tasks.segment import SEGMENT

__all__ = ["DETECT", "POSE", "SEGMENT", "TASKS", "Task", "get_task", "register_task"]
