"""What a model returns for images: boxes in px of each, which can be drawn, shown, saved, cropped and put into tables.

``results = model("a.jpg")`` is of one image: ``results.boxes``, ``results.plot()``. Of several images it is a sequence of such results.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from engine.inference.predictor import STAGES
from engine.inference.task_fields import STANDARD, corners, result_fields
from tasks import DETECT, Task
from tasks.base import DrawStyle
from utils.boxes import normalised, xyxy_to_cxcywh
from utils.errors import UserError, nearest
from utils.run_folders import new_run_dir
from utils.text_table import counted
from utils.types import Detections
from utils.visual.savers import ResultWriter, SaveOptions, crop_of, cut_out

COLUMNS = {"xyxy": ("xmin", "ymin", "xmax", "ymax"), "xywh": ("xcenter", "ycenter", "width", "height")}
FOLDER = "runs/hub"
NOTEBOOK_IMAGES, NOTEBOOK_PX = 12, 640  # how many images a notebook shows of a result, and their longest side


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

    What is of one image (``boxes``, ``scores``, ``classes``, ``plot`` and the fields of its task) is refused for several, with a message
    that says to take one: ``results[0].boxes``, or ``for result in results``.

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

    def __getitem__(self, index: int | slice) -> Results:
        """The results of one image, or of those that a slice selects."""
        if not isinstance(index, slice):
            if not -len(self) <= index < len(self):
                raise IndexError(f"results of {len(self)} images have no number {index}")  # it ends loops over a sequence
            number = index % len(self)
            index = slice(number, number + 1)
        return Results(self.ims[index], self.found[index], self.names, self.files[index], self.times_ms, self.task)

    def __iter__(self) -> Iterator[Results]:
        return (self[i] for i in range(len(self)))

    @property
    def boxes(self) -> Tensor:
        """Of one image (n, 4) xyxy in px, best score first; of oriented boxes the axis-aligned boxes about them."""
        return self._about(self._only("boxes"))

    @property
    def scores(self) -> Tensor:
        """Of one image (n,)."""
        return self._only("scores").scores

    @property
    def classes(self) -> Tensor:
        """Of one image (n,) int64; ``results.names[c]`` is what class c is called."""
        return self._only("classes").classes

    @property
    def class_names(self) -> list[str]:
        """Of one image the name of each detection's class."""
        return [self.names[c] for c in self._only("class_names").classes.tolist()]

    @property
    def image(self) -> np.ndarray:
        """The image itself, (H, W, 3) uint8 RGB."""
        self._only("image")
        return self.ims[0]

    @property
    def fields(self) -> Mapping[str, Any]:
        """Of one image everything that its task adds to boxes, by name."""
        found, hw = self._only("fields"), _hw(self.ims[0])
        return {name: of(found, hw) for name, of in result_fields(self.task, found).items()}

    def __getattr__(self, name: str) -> Any:
        """What the task adds: ``masks`` (with ``data``), ``keypoints`` (n, K, 3), ``obb`` (n, 5), ``probs``; None where it adds none."""
        if name.startswith("_") or name in self.__dataclass_fields__:  # asked for by copy and pickle before there is anything
            raise AttributeError(name)
        views = {key: view for found in self.found[:1] for key, view in result_fields(self.task, found).items()}
        if name in views or name in STANDARD:
            found = self._only(name)
            return views[name](found, _hw(self.ims[0])) if name in views else None
        known = [*views, *STANDARD, *(n for n in dir(type(self)) if not n.startswith("_"))]
        raise AttributeError(f"results have no {name!r}; {nearest(name, known) or 'see dir(results)'}")

    @property
    def xyxy(self) -> list[Tensor]:
        """Of each image (n, 6): x1, y1, x2, y2 in px, score, class."""
        return [_with_scores(self._about(d), d) for d in self.found]

    @property
    def xywh(self) -> list[Tensor]:
        """Of each image (n, 6): centre, width and height in px, score, class."""
        return [_with_scores(xyxy_to_cxcywh(self._about(d)), d) for d in self.found]

    @property
    def xyxyn(self) -> list[Tensor]:
        """``xyxy`` as fractions of the image."""
        return [_with_scores(normalised(self._about(d), _hw(im)), d) for im, d in zip(self.ims, self.found)]

    @property
    def xywhn(self) -> list[Tensor]:
        """``xywh`` as fractions of the image."""
        return [_with_scores(normalised(xyxy_to_cxcywh(self._about(d)), _hw(im)), d) for im, d in zip(self.ims, self.found)]

    def __str__(self) -> str:
        """A line an image, and the speed."""
        lines = [f"image {number}/{len(self)} {self._line(number - 1)}" for number in range(1, len(self) + 1)]
        lines.append("Speed per image: " + ", ".join(f"{stage} {ms:.1f} ms" for stage, ms in zip(STAGES, self.times_ms)))
        return "\n".join(lines)

    def __repr__(self) -> str:
        """The lines of at most three images."""
        lines = [self._line(i) for i in range(min(len(self), 3))]
        more = [f"… and {len(self) - 3} more"] if len(self) > 3 else []
        return f"<Results of {counted(len(self), 'image')}{': ' * bool(lines)}{'; '.join(lines + more)}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: the first images with what was found on them, and a line for each."""
        shown = []
        for i in range(min(len(self), NOTEBOOK_IMAGES)):
            data, text = _as_png(self[i].plot()), html.escape(self._line(i))
            image = f'<img src="data:image/png;base64,{data}" alt="{text}" style="max-width:100%">'
            shown.append(f'<figure style="display:inline-block;margin:4px">{image}<figcaption>{text}</figcaption></figure>')
        if len(self) > NOTEBOOK_IMAGES:
            shown.append(f"<p>… and {len(self) - NOTEBOOK_IMAGES} more images</p>")
        return f"<div>{''.join(shown) or 'no image'}</div>"

    def print(self) -> None:
        """Prints what was found."""
        print(self)

    def plot(self, *, labels: bool = True) -> np.ndarray:
        """The image of a result with its detections, (H, W, 3) uint8 RGB."""
        self._only("plot()")
        return self.render(labels=labels)[0]

    def render(self, *, labels: bool = True) -> list[np.ndarray]:
        """All images with their detections."""
        style = DrawStyle(hide_labels=not labels)
        return [self.task.draw(im, found, self.names, style) for im, found in zip(self.ims, self.found)]

    def show(self, *, labels: bool = True) -> None:
        """Opens every image with its detections in the system's viewer."""
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
            for im, found in zip(self.ims, [cut_out(self.task, found) for found in self.found])
            for box, score, label in zip(found.boxes, found.scores, found.classes)
        ]

    def to_dataframe(self) -> Any:
        """One table (pandas) with a row for each detection of all images: image, class, name, confidence, xmin, ymin, xmax, ymax in px.

        Raises:
            UserError: pandas is not installed.
        """
        pandas = _pandas("to_dataframe()")
        rows = [
            [file, int(row[5]), self.names[int(row[5])], row[4], *row[:4]]
            for file, table in zip(self.files, self.xyxy)
            for row in table.tolist()
        ]
        return pandas.DataFrame(rows, columns=["image", "class", "name", "confidence", *COLUMNS["xyxy"]])

    def to_supervision(self) -> Any:
        """The detections of one image as ``supervision.Detections``: boxes, scores, classes, names, and masks or oriented boxes.

        Raises:
            UserError: supervision is not installed.
        """
        try:
            import supervision
        except ImportError:
            raise UserError("to_supervision(): needs the package supervision: pip install supervision") from None
        found = self._only("to_supervision()").cpu()
        data: dict[str, Any] = {"class_name": np.array(self.class_names, dtype=str)}
        if self.obb is not None:
            data["xyxyxyxy"] = corners(self.obb.cpu()).numpy()
        if self.keypoints is not None:
            data["keypoints"] = self.keypoints.cpu().numpy()
        return supervision.Detections(
            xyxy=self._about(found).float().numpy(), confidence=found.scores.float().numpy(), class_id=found.classes.numpy(),
            mask=None if self.masks is None or not len(found) else self.masks.data.numpy(), data=data,
        )  # fmt: skip

    def pandas(self) -> Tables:
        """The four forms as tables. Raises UserError where pandas is not installed."""
        pandas = _pandas("pandas()")

        def tables(form: str) -> list[Any]:
            columns = [*COLUMNS[form.removesuffix("n")], "confidence", "class", "name"]
            rows = [[[*r[:5], int(r[5]), self.names[int(r[5])]] for r in t.tolist()] for t in getattr(self, form)]
            return [pandas.DataFrame(r, columns=columns) for r in rows]

        return Tables(*(tables(form) for form in Tables._fields))

    def _only(self, what: str) -> Detections:
        if len(self) != 1:
            raise UserError(f"{what} is of one image and these are {len(self)}: take results[0], or loop: for result in results")
        return self.found[0]

    def _about(self, found: Detections) -> Tensor:
        """(n, 4) xyxy px: the axis-aligned boxes about what detections cover."""
        return self.task.shapes(found).extents

    def _line(self, index: int) -> str:
        height, width = _hw(self.ims[index])
        what = self.task.summary(self.found[index], self.names) or "nothing found"
        return f"{self.files[index]}: {height}x{width} {what}"

    def _write(self, save_dir: str | Path | None, options: SaveOptions, drawn: Sequence[np.ndarray], *, exist_ok: bool) -> Path:
        where = Path(save_dir) if save_dir else Path(FOLDER) / "exp"
        folder = new_run_dir(where.parent, where.name, exist_ok=exist_ok)
        with ResultWriter(folder, self.names, options, self.task) as writer:
            for file, image, found, shown in zip(self.files, self.ims, self.found, drawn):
                writer.write(file, image, found, drawn=shown)
        return folder


class Tables(NamedTuple):
    """Tables (pandas) of each image in the four forms."""

    xyxy: list[Any]
    xyxyn: list[Any]
    xywh: list[Any]
    xywhn: list[Any]


def _pandas(what: str) -> Any:
    try:
        import pandas
    except ImportError:
        raise UserError(f"{what}: needs the package pandas: pip install pandas; .xyxy holds the same as tensors") from None
    return pandas


def _as_png(image_rgb: np.ndarray) -> str:
    """An image, made smaller if it is large, as the base64 text of a PNG."""
    scale = min(NOTEBOOK_PX / max(image_rgb.shape[:2]), 1.0)
    width, height = (max(round(side * scale), 1) for side in image_rgb.shape[1::-1])
    small = cv2.resize(image_rgb, (width, height), interpolation=cv2.INTER_AREA) if scale < 1 else image_rgb
    return base64.b64encode(cv2.imencode(".png", cv2.cvtColor(small, cv2.COLOR_RGB2BGR))[1].tobytes()).decode()


def _with_scores(boxes: Tensor, found: Detections) -> Tensor:
    return torch.cat((boxes.float(), found.scores.float()[:, None], found.classes.float()[:, None]), dim=1)


def _hw(image: np.ndarray) -> tuple[int, int]:
    return image.shape[0], image.shape[1]
