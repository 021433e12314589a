"""Running exported files: ``load_exported(path).predict(images)`` answers like the Model that the file was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from models.export.formats import format_of_file
from models.export.registry import OpenedFile
from models.export.suppression import decode_detections
from tasks import TASKS, Task
from utils.errors import UserError, first_line
from utils.memory import is_out_of_memory
from utils.types import Predictions

SUPPRESSION_OUTPUTS = 4  # of a file with suppression inside; one of a one-to-one branch has fewer


def load_exported(path: str | Path, *, device: torch.device | str = "cpu", trust: bool = False) -> ExportedModel:
    """Opens a file of any registered format.

    Args:
        path: the file.
        device: where it runs.
        trust: for a file of the caller's own: code in it is run without having been read.

    Raises:
        UserError: no such file, a damaged or foreign one, one that does more than compute, or a package that is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    file_format = format_of_file(path)
    opener = file_format.open_trusted if trust and file_format.open_trusted else file_format.open
    return ExportedModel(opener(path, torch.device(device)), path)


def task_of_file(name: str, path: Path) -> Task:
    """The task that a file was made for.

    Raises:
        UserError: a task that is not supported.
    """
    if name not in TASKS:
        raise UserError(f"{path}: made for the task {name!r}; supported: {', '.join(TASKS)}")
    return TASKS[name]


class ExportedModel:
    """An exported network with the interface that scripts use of a Model.

    Attributes:
        task: what its predictions are.
        names: class names; ``class0`` … if the file has none.
        nc: number of classes.
        ch: channels of the input.
        stride: px; sides of images should be multiples of it.
        imgsz: height and width it was exported at, px.
        dynamic: whether it takes other sizes (multiples of ``stride``) than ``imgsz``.
        one_to_one: whether the file says that it holds the detections of a one-to-one branch.
    """

    def __init__(self, opened: OpenedFile, path: Path) -> None:
        self.run, self.path = opened.run, path
        self.facts = opened.facts.checked(source=str(path))
        self.task = task_of_file(self.facts.task, path).from_settings(self.facts.settings, source=str(path))
        self.one_to_one = self.facts.end2end and len(opened.output_shapes) < SUPPRESSION_OUTPUTS
        if not self.facts.names:
            classes = self.task.class_count(opened.output_shapes)
            if not classes:
                raise UserError(f"{path}: holds no class names, so it was not made by export.py; export the model with it")
            self.facts = replace(self.facts, names=tuple(f"class{i}" for i in range(classes)))

    @property
    def names(self) -> tuple[str, ...]:
        return self.facts.names

    @property
    def nc(self) -> int:
        return len(self.facts.names)

    @property
    def ch(self) -> int:
        return self.facts.ch

    @property
    def stride(self) -> int:
        return self.facts.stride

    @property
    def imgsz(self) -> tuple[int, int]:
        return self.facts.imgsz

    @property
    def dynamic(self) -> bool:
        return self.facts.dynamic

    @torch.no_grad()
    def predict(self, images: Tensor, *, above: float = 0.0) -> Predictions:
        """Boxes (B, N, 4) xyxy px and scores (B, N, nc) for images (B, ch, H, W) in 0-1, on the images' device.

        A file of fixed batch size is run as often as it takes, the last time with blank images beside the rest. A file with suppression
        inside gives its detections as predictions whose other scores are zero, so that suppressing them again changes nothing; one with
        the detections of a one-to-one branch gives those.

        Raises:
            UserError: the size is not one that the file takes, or its outputs are not those of its task.
        """
        self._check_size(images)
        parts = [self._run_batch(part) for part in (images.split(self.facts.batch) if not self.dynamic else (images,))]
        return self._decode([torch.cat(outputs) for outputs in zip(*parts)])

    def _check_size(self, images: Tensor) -> None:
        channels, height, width = images.shape[1:]
        if channels != self.ch:
            raise UserError(f"{self.path}: takes images of {self.ch} channels, not {channels}")
        if not self.dynamic and (height, width) != self.imgsz:
            only = f"--imgsz {self.imgsz[0]} {self.imgsz[1]}"
            raise UserError(f"{self.path}: made for one size, not for {height}x{width} px; give {only}, or export it with --dynamic")
        if height % self.stride or width % self.stride:
            raise UserError(f"{self.path}: {height}x{width} px: sides must be multiples of {self.stride}")

    def _run_batch(self, images: Tensor) -> list[Tensor]:
        """Outputs (B, ...) for at most as many images as the file takes at once."""
        count = len(images)
        missing = 0 if self.dynamic else self.facts.batch - count
        outputs = self.run(F.pad(images, (0, 0, 0, 0, 0, 0, 0, missing)))
        if not all(isinstance(o, Tensor) and o.ndim and len(o) == count + missing for o in outputs):
            shapes = ", ".join(str(tuple(o.shape)) if isinstance(o, Tensor) else type(o).__name__ for o in outputs)
            raise UserError(f"{self.path}: gives {shapes} for {count + missing} images; export the model with export.py")
        return [o.to(images.device)[:count] for o in outputs]

    def _decode(self, outputs: Sequence[Tensor]) -> Predictions:
        try:
            if self.facts.end2end and len(outputs) < SUPPRESSION_OUTPUTS:
                shared = dict(zip(self.task.shared_fields, (o.float() for o in outputs[1:]), strict=True))
                return self.task.from_rows(outputs[0], nc=self.nc).replace(shared=shared)
            decode = decode_detections if self.facts.end2end else self.task.from_export
            return decode(outputs, nc=self.nc)
        except (ValueError, IndexError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            shapes = ", ".join(str(tuple(o.shape)) for o in outputs)
            raise UserError(f"{self.path}: gives {shapes}; {first_line(error)}: export the model with export.py") from None
