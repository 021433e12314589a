"""What torch.hub's model returns: boxes in px of each image, which can be drawn, saved, cropped and put into tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.inference.predictor import STAGES
from tasks import DETECT, Task
from tasks.base import DrawStyle
from utils.boxes import normalised, xyxy_to_cxcywh
from utils.errors import UserError
from utils.masks.outlines import joined, rings_of_packed
from utils.masks.packed import unpack_tensor
from utils.run_folders import new_run_dir
from utils.types import Detections
from utils.visual.savers import ResultWriter, SaveOptions, crop_of

MASKS = "masks"  # field of detections
COLUMNS = {"xyxy": ("xmin", "ymin", "xmax", "ymax"), "xywh": ("xcenter", "ycenter", "width", "height")}
FOLDER = "runs/hub"


class Crop(NamedTuple):
    """One object cut out of its image."""

    box: Tensor  # (4,) xyxy px
    conf: float
    cls: int
    label: str
    im: np.ndarray  # (h, w, 3) RGB


@dataclass(frozen=True)
class Results:
    """Detections of some images.

    Attributes:
        ims: the images, (H, W, 3) uint8 RGB.
        found: boxes xyxy px, scores and classes of each.
        names: class names.
        files: a path, or ``image0.jpg`` … for images that came from memory.
        times_ms: an image's mean pre-processing, inference and suppression.
        task: what the detections are.
    """

    ims: Sequence[np.ndarray]
    found: Sequence[Detections]
    names: Sequence[str]
    files: Sequence[str]
    times_ms: tuple[float, ...]
    task: Task = DETECT

    def __len__(self) -> int:
        """Number of images."""
        return len(self.ims)

    def __getitem__(self, index: int) -> Results:
        """The results of one image."""
        return Results([self.ims[index]], [self.found[index]], self.names, [self.files[index]], self.times_ms, self.task)

    def __iter__(self) -> Iterator[Results]:
        return (self[i] for i in range(len(self)))

    @property
    def xyxy(self) -> list[Tensor]:
        """Of each image (n, 6): x1, y1, x2, y2 in px, score, class."""
        return [_with_scores(d.boxes, d) for d in self.found]

    @property
    def xywh(self) -> list[Tensor]:
        """Of each image (n, 6): centre, width and height in px, score, class."""
        return [_with_scores(xyxy_to_cxcywh(d.boxes), d) for d in self.found]

    @property
    def xyxyn(self) -> list[Tensor]:
        """``xyxy`` as fractions of the image."""
        return [_with_scores(normalised(d.boxes, _hw(im)), d) for im, d in zip(self.ims, self.found)]

    @property
    def xywhn(self) -> list[Tensor]:
        """``xywh`` as fractions of the image."""
        return [_with_scores(normalised(xyxy_to_cxcywh(d.boxes), _hw(im)), d) for im, d in zip(self.ims, self.found)]

    @property
    def masks(self) -> Any:
        """The masks of an image (of several images, a list), in the order of the boxes; None for other tasks."""
        if not all(MASKS in d.fields for d in self.found):
            return None
        found = [Masks(d.fields[MASKS], _hw(im)) for im, d in zip(self.ims, self.found)]
        return found[0] if len(found) == 1 else found

    @property
    def probs(self) -> Any:
        """The best classes of a classifier's image (of several images, a list); None for other tasks, and where no score is above
        ``conf``."""
        if not self.task.whole_image:
            return None
        found = [Probs(d.classes.tolist(), d.scores, self.names) if len(d) else None for d in self.found]
        return found[0] if len(found) == 1 else found

    def __str__(self) -> str:
        """A line an image, and the speed."""
        lines = []
        for number, (file, image, found) in enumerate(zip(self.files, self.ims, self.found), 1):
            height, width = _hw(image)
            what = self.task.summary(found, self.names) or "nothing found"
            lines.append(f"image {number}/{len(self)} {file}: {height}x{width} {what}")
        lines.append("Speed per image: " + ", ".join(f"{stage} {ms:.1f} ms" for stage, ms in zip(STAGES, self.times_ms)))
        return "\n".join(lines)

    def print(self) -> None:
        """Prints what was found."""
        print(self)

    def render(self, *, labels: bool = True) -> list[np.ndarray]:
        """The images with boxes on them."""
        style = DrawStyle(hide_labels=not labels)
        return [self.task.draw(im, found, self.names, style) for im, found in zip(self.ims, self.found)]

    def show(self, *, labels: bool = True) -> None:
        """Opens every image with boxes on it in the system's viewer."""
        from PIL import Image

        for image in self.render(labels=labels):
            Image.fromarray(image).show()

    def save(self, save_dir: str | Path | None = None, *, labels: bool = True, exist_ok: bool = False) -> Path:
        """Writes the images with boxes on them into ``save_dir``, or a new folder ``runs/hub/exp…``; returns it."""
        return self._write(save_dir, SaveOptions(), self.render(labels=labels), exist_ok=exist_ok)

    def crop(self, *, save: bool = True, save_dir: str | Path | None = None, exist_ok: bool = False) -> list[Crop]:
        """Every object cut out with a margin, also as ``crops/<class>/*.jpg`` if ``save``."""
        if save:
            self._write(save_dir, SaveOptions(images=False, crops=True), self.ims, exist_ok=exist_ok)
        return [
            Crop(box, float(score), int(label), self.names[int(label)], crop_of(im, box.tolist()))
            for im, found in zip(self.ims, self.found)
            for box, score, label in zip(found.boxes, found.scores, found.classes)
        ]

    def pandas(self) -> Tables:
        """The four forms as tables. Raises UserError where pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise UserError("pandas(): needs the package pandas: pip install pandas; .xyxy holds the same as tensors") from None

        def tables(form: str) -> list[Any]:
            columns = [*COLUMNS[form.removesuffix("n")], "confidence", "class", "name"]
            rows = [[[*r[:5], int(r[5]), self.names[int(r[5])]] for r in t.tolist()] for t in getattr(self, form)]
            return [pandas.DataFrame(r, columns=columns) for r in rows]

        return Tables(*(tables(form) for form in Tables._fields))

    def _write(self, save_dir: str | Path | None, options: SaveOptions, drawn: Sequence[np.ndarray], *, exist_ok: bool) -> Path:
        where = Path(save_dir) if save_dir else Path(FOLDER) / "exp"
        folder = new_run_dir(where.parent, where.name, exist_ok=exist_ok)
        with ResultWriter(folder, self.names, options, self.task.result_rows) as writer:
            for file, image, found, shown in zip(self.files, self.ims, self.found, drawn):
                writer.write(file, image, found, drawn=shown)
        return folder


@dataclass(frozen=True)
class Masks:
    """The masks of one image.

    Attributes:
        packed: (n, H, ceil(W / 8)) uint8, eight pixels in a byte.
        hw: height and width of the image in px.
    """

    packed: Tensor
    hw: tuple[int, int]

    def __len__(self) -> int:
        """Number of masks."""
        return len(self.packed)

    @property
    def data(self) -> Tensor:
        """(n, H, W) bool."""
        return unpack_tensor(self.packed, self.hw[1]).bool()

    @property
    def xy(self) -> list[np.ndarray]:
        """The outline of each, (k, 2) px; pieces and holes are joined by bridges that enclose no area. Empty for an empty mask."""
        return [joined(rings) for rings in rings_of_packed(self.packed.numpy())]

    @property
    def xyn(self) -> list[np.ndarray]:
        """``xy`` as fractions of the image."""
        return [outline / np.array(self.hw[::-1], np.float32) for outline in self.xy]


class Probs(NamedTuple):
    """The best classes of an image, up to five."""

    top5: list[int]  # class numbers, best first
    top5conf: Tensor  # (n,) their scores
    names: Sequence[str]

    @property
    def top1(self) -> int:
        """The best class."""
        return self.top5[0]

    @property
    def top1conf(self) -> Tensor:
        """Its score."""
        return self.top5conf[0]

    def __str__(self) -> str:
        return ", ".join(f"{self.names[label]} {score:.2f}" for label, score in zip(self.top5, self.top5conf.tolist()))


class Tables(NamedTuple):
    """Tables (pandas) of each image in the four forms."""

    xyxy: list[Any]
    xyxyn: list[Any]
    xywh: list[Any]
    xywhn: list[Any]


def _with_scores(boxes: Tensor, found: Detections) -> Tensor:
    return torch.cat((boxes.float(), found.scores.float()[:, None], found.classes.float()[:, None]), dim=1)


def _hw(image: np.ndarray) -> tuple[int, int]:
    return image.shape[0], image.shape[1]
