"""The network that an exported file holds: a deployed Model whose predictions leave as plain tensors, with suppression behind it or not."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from models.export import one_to_one, suppression
from models.export.facts import ExportFacts
from models.export.registry import ExportFormat
from models.export.source import ExportOptions, ExportSource
from models.model import Model
from tasks import Task
from utils.errors import UserError


class ExportedNetwork(nn.Module):
    """A deployed Model whose predictions are laid out as the task's outputs.

    Args:
        detector: already deployed.
        task: how its predictions are laid out.
    """

    def __init__(self, detector: Model, task: Task) -> None:
        super().__init__()
        self.detector, self.task = detector, task

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(B, ch, H, W) in 0-1 to ``task.outputs``: one tensor, or a tuple of several."""
        outputs = self.task.to_export(self.detector.head.decode(self.detector(images)))
        return outputs[0] if len(outputs) == 1 else outputs


class End2EndNetwork(nn.Module):
    """A deployed Model followed by suppression.

    Args:
        detector: already deployed.
        layer: the suppression.
    """

    def __init__(self, detector: Model, layer: suppression.Suppression) -> None:
        super().__init__()
        self.detector, self.suppression = detector, layer

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, ch, H, W) in 0-1 to ``suppression.OUTPUTS``: detections, then the candidates they were selected from."""
        predictions = self.detector.head.decode(self.detector(images))
        if extra := [*predictions.fields, *predictions.shared]:
            task = self.detector.task.name
            raise UserError(f"--nms: a file with suppression keeps boxes only, but the task {task!r} has also {', '.join(extra)}")
        return (*self.suppression(predictions.boxes, predictions.scores), predictions.boxes, predictions.scores)


def prepare_source(deployed: Model, export_format: ExportFormat, options: ExportOptions) -> ExportSource:
    """What the writer of a format receives for a deployed Model."""
    facts = ExportFacts(
        names=deployed.names,
        task=deployed.task.name,
        settings=deployed.task.settings,
        stride=deployed.stride,
        imgsz=options.imgsz,
        batch=options.batch_size,
        ch=deployed.ch,
        dynamic=options.dynamic,
    )
    shape = (options.batch_size, deployed.ch, *options.imgsz)
    example = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    if export_format.has_suppression:
        if deployed.task.whole_image:
            raise UserError(f"--nms: the task {deployed.task.name!r} has one result an image and nothing to suppress; leave --nms out")
        if deployed.head.one_to_one:
            why = deployed.head.never_suppressed or "the weights are deployed, with a one-to-one branch only, which needs no suppression"
            raise UserError(f"--nms: {why}; leave --nms out")
        facts = replace(facts, end2end=True, topk=options.topk, iou=options.iou, conf=options.conf)
        layer = suppression.Suppression(topk=options.topk, iou=options.iou, conf=options.conf)
        network = End2EndNetwork(deployed, layer).eval()
        return ExportSource(network, example, suppression.OUTPUTS, facts, options, candidates=suppression.CANDIDATES)
    if deployed.head.one_to_one:
        facts = replace(facts, end2end=True, topk=one_to_one.ROWS)
        return ExportSource(one_to_one.OneToOneNetwork(deployed).eval(), example, one_to_one.outputs_of(deployed.task), facts, options)
    task = deployed.task
    outputs = {output.name: output.axes for output in task.outputs}
    return ExportSource(ExportedNetwork(deployed, task).eval(), example, outputs, facts, options)
