"""A batch as one image file, with its ground truth or with what was found on it, drawn as its task draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from numpy.typing import NDArray

from data.augment.on_device import finished
from tasks.base import DrawStyle, Task
from utils.types import Batch, Detections, Letterbox
from utils.visual.plots import plot_batch


def save_batch_image(path: Path, batch: Batch, task: Task, names: Sequence[str], *, detections: Sequence[Detections] | None = None) -> None:
    """Writes the images of a batch side by side.

    Args:
        path: File to write.
        batch: Its images may be on any device.
        task: Draws.
        names: Of the classes.
        detections: In px of the batch's images; the batch's targets if None.
    """
    hw = (batch.images.shape[-2], batch.images.shape[-1])
    shown = task.detections_of_targets(batch.targets.cpu(), hw, count=len(batch.images)) if detections is None else detections

    def draw(tile: NDArray, image: int, scale: float) -> NDArray:
        style = DrawStyle(line_thickness=2 if max(tile.shape[:2]) < 600 else 3, hide_conf=detections is None)
        resize = Letterbox(torch.tensor([hw]), torch.full((1, 2), scale), torch.zeros(1, 2))
        return task.draw(tile, task.to_batch([shown[image]], resize)[0], names, style)

    plot_batch(finished(batch).images.cpu(), path, draw=draw, paths=batch.paths)
