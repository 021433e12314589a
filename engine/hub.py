"""The model that torch.hub gives: pictures of any kind in, boxes out, with detect.py's pre- and post-processing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F

from data.augment import letterbox
from data.images import read_image
from data.sources import Frame
from engine.hub_results import Results
from engine.inference import as_batch, in_original_px
from models.augmented import GREY, AugmentedModel
from models.checkpoints import load_model
from models.detector import Detector
from models.published import provide
from utils.distributed import select_device
from utils.errors import UserError
from utils.nms import non_max_suppression
from utils.shared_flags import height_and_width
from utils.types import Letterbox, to_unit_range

Picture: TypeAlias = "str | Path | np.ndarray | Tensor | Any"  # Any: a PIL image


def load_hub_model(path: str | Path, *, device: str = "", plugins: Sequence[str | Path] = (), download: bool = False) -> HubModel:
    """The model of a checkpoint, deployed. Raises UserError as ``load_model`` does."""
    provide(path, download=download)
    return HubModel(load_model(path, plugins=plugins).deploy()).to(select_device(device))


class HubModel(nn.Module):
    """A detector that takes paths, arrays, PIL images, tensors and lists of these, and returns :class:`Results`.

    Attributes:
        conf: least score.
        iou: overlap above which the weaker of two boxes is dropped.
        classes: keep only these; None keeps all.
        max_det: most detections of a picture.
        agnostic: boxes of different classes suppress one another too.
        multi_label: a box counts for every class above ``conf``.
        names: class names.
    """

    conf: float = 0.25
    iou: float = 0.45
    classes: Sequence[int] | None = None
    max_det: int = 1000
    agnostic: bool = False
    multi_label: bool = False

    def __init__(self, model: Detector) -> None:
        """
        Args:
            model: as ``deploy()`` gives it.

        Raises:
            UserError: it takes pictures of other than three channels.
        """
        super().__init__()
        if model.ch != 3:
            raise UserError(f"the model takes pictures of {model.ch} channels; torch.hub's takes those of 3")
        self.model, self.names, self.stride = model.eval(), model.names, model.stride

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def forward(self, source: Picture | Sequence[Picture], size: int | Sequence[int] = 640, augment: bool = False) -> Results:
        """Finds objects.

        Args:
            source: a path, an array (H, W, 3) or (H, W) uint8 in RGB order, a PIL image, a tensor (3, H, W) or (B, 3, H, W) in 0-1 or
                uint8, or a list of these. Tensors go into the network as they are, padded to the stride; everything else is letterboxed.
            size: side, or height and width, of the letterboxed picture in px.
            augment: look also at smaller and mirrored versions.

        Raises:
            UserError: a picture that cannot be read, or is of another kind or shape.
        """
        looker = AugmentedModel(self.model) if augment else self.model
        pictures = list(source) if isinstance(source, (list, tuple)) else [source]
        pictures = [p for picture in pictures for p in _one_by_one(picture)]
        sides = height_and_width(size if isinstance(size, int) else tuple(size))
        hw = tuple(-(-side // self.stride) * self.stride for side in sides)
        images, found, files, seconds = [], [], [], [0.0, 0.0, 0.0]
        for index, picture in enumerate(pictures):
            start = time.perf_counter()
            image, batch, box = self._prepared(picture, hw)
            ready = time.perf_counter()
            predictions = looker.predict(batch)
            seen = time.perf_counter()
            kept = non_max_suppression(
                predictions, conf=self.conf, iou=self.iou, max_det=self.max_det, classes=self.classes, agnostic=self.agnostic,
                multi_label=self.multi_label,
            )[0]  # fmt: skip
            found.append(in_original_px(kept, box))
            images.append(image)
            files.append(_file_name(picture, index))
            for stage, (a, b) in enumerate(((start, ready), (ready, seen), (seen, time.perf_counter()))):
                seconds[stage] += b - a
        return Results(images, found, self.names, files, tuple(1000 * s / max(len(pictures), 1) for s in seconds))

    def _prepared(self, picture: Picture, hw: tuple[int, ...]) -> tuple[np.ndarray, Tensor, Letterbox]:
        """The picture as (H, W, 3) RGB, as a batch of one for the network, and how the two belong together."""
        if isinstance(picture, Tensor):
            return self._as_it_is(picture)
        image = _as_array(picture)
        frame = Frame("", image, letterbox(image, (hw[0], hw[1]), auto=True, stride=self.stride), 0, 1, None)
        return image, *as_batch(frame, self.device)

    def _as_it_is(self, picture: Tensor) -> tuple[np.ndarray, Tensor, Letterbox]:
        height, width = picture.shape[1:]
        batch = to_unit_range(picture[None].to(self.device), torch.float32)
        batch = F.pad(batch, (0, -width % self.stride, 0, -height % self.stride), value=GREY)
        image = (to_unit_range(picture.cpu(), torch.float32).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
        unmoved = Letterbox(torch.tensor([[height, width]]), torch.ones(1, 2), torch.zeros(1, 2))
        return np.ascontiguousarray(image.numpy()), batch, unmoved


def _one_by_one(picture: Picture) -> list[Picture]:
    """A batch of tensors as its pictures; anything else alone. Raises UserError for a tensor of another shape."""
    if not isinstance(picture, Tensor):
        return [picture]
    if picture.dim() == 3:
        picture = picture[None]
    if picture.dim() != 4 or picture.shape[1] != 3 or min(picture.shape[2:], default=0) < 1:
        raise UserError(f"a tensor should be (3, H, W) or (B, 3, H, W), not {tuple(picture.shape)}; arrays are (H, W, 3)")
    if picture.dtype != torch.uint8 and not picture.is_floating_point():
        raise UserError(f"a tensor should hold floats in 0-1 or uint8, not {picture.dtype}")
    return list(picture)


def _as_array(picture: Picture) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a path, an array or a PIL image."""
    if isinstance(picture, (str, Path)):
        if "://" in str(picture):
            raise UserError(f"{picture}: URLs are not fetched; save the picture and give its path")
        return read_image(picture)
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8:
            raise UserError(f"an array should be uint8, not {picture.dtype}")
        grey = picture if picture.ndim == 2 else picture[:, :, 0] if picture.ndim == 3 and picture.shape[2] == 1 else None
        picture = picture if grey is None else np.repeat(grey[:, :, None], 3, axis=2)
        if picture.ndim != 3 or picture.shape[2] not in (3, 4) or not picture.size:
            raise UserError(f"an array should be (H, W, 3) in RGB order, not {picture.shape}")
        return np.ascontiguousarray(picture[:, :, :3])
    if isinstance(picture, Image.Image):
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    raise UserError(f"a picture should be a path, an array, a PIL image or a tensor, not {type(picture).__name__}")


def _file_name(picture: Picture, index: int) -> str:
    given = picture if isinstance(picture, (str, Path)) else getattr(picture, "filename", "")
    return str(given) if isinstance(given, (str, Path)) and str(given) else f"image{index}.jpg"
