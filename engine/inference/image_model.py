"""The model that torch.hub gives: images of any kind in, boxes out, with detect.py's pre- and post-processing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F

from data.augment.letterbox import letterbox
from data.images.reading import read_image
from data.sources.urls import is_url, read_remote_image, redacted
from engine.inference.augmented import GREY, AugmentedModel
from engine.inference.predictor import PRE_PROCESS, STAGES, Predictor, collate
from engine.inference.results import Results
from engine.memory_format import ready_to_infer
from models.checkpoints.checkpoint import load_model
from models.checkpoints.published import ensure_weights
from models.model import Model
from utils.cli.sizes import height_and_width
from utils.distributed import select_device
from utils.errors import UserError
from utils.nms import Suppression
from utils.sizes import round_up_to_stride
from utils.types import Letterbox, to_unit_range
from utils.visual.draw import viewable

ImageSource: TypeAlias = "str | Path | np.ndarray | Tensor | Any"  # Any: a PIL image


def load_hub_model(path: str | Path, *, device: str = "", plugins: Sequence[str | Path] = (), download: bool = False) -> HubModel:
    """The model of a checkpoint, deployed. Raises UserError as ``load_model`` does."""
    ensure_weights(path, download=download)
    chosen = select_device(device)
    return HubModel(ready_to_infer(load_model(path, plugins=plugins).deploy(), chosen)).to(chosen)


class HubModel(nn.Module):
    """A detector that takes paths, arrays, PIL images, tensors and lists of these, and returns :class:`Results`.

    Attributes:
        conf: least score.
        iou: overlap above which the weaker of two boxes is dropped.
        classes: keep only these; None keeps all.
        max_det: most detections of an image.
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

    def __init__(self, model: Model) -> None:
        """
        Args:
            model: as ``deploy()`` gives it.
        """
        super().__init__()
        self.model, self.names, self.stride = model.eval(), model.names, model.stride

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def forward(self, source: ImageSource | Sequence[ImageSource], size: int | Sequence[int] = 640, augment: bool = False) -> Results:
        """Finds objects.

        Args:
            source: a path or http(s) URL, an array (H, W, C) or (H, W) uint8 or uint16, in RGB order where C is 3, a PIL image, a tensor
                (C, H, W) or (B, C, H, W) in 0-1 or uint8, or a list of these. Tensors go into the network as they are, padded to the
                stride; everything else is letterboxed.
            size: side, or height and width, of the letterboxed image in px.
            augment: look also at smaller and mirrored versions.

        Raises:
            UserError: an image that cannot be read, or is of another kind or shape.
        """
        predictor = self._predictor(augment=augment)
        inputs = list(source) if isinstance(source, (list, tuple)) else [source]
        inputs = [p for item in inputs for p in _one_by_one(item, self.model.ch)]
        sides = height_and_width(size if isinstance(size, int) else tuple(size))
        hw = tuple(round_up_to_stride(side, self.stride) for side in sides)
        images, found, files = [], [], []
        for index, item in enumerate(inputs):
            with predictor.stopwatch.stage(PRE_PROCESS):
                image, batch, placement = self._prepared(item, hw)
            found += predictor.predict_batch(batch, placement)
            images.append(image)
            files.append(_file_name(item, index))
        times = tuple(1000 * predictor.stopwatch.seconds[stage] / max(len(inputs), 1) for stage in STAGES)
        return Results(images, found, self.names, files, times, self.model.task)

    def _predictor(self, *, augment: bool) -> Predictor:
        suppression = Suppression(
            conf=self.conf, iou=self.iou, max_det=self.max_det, classes=self.classes, agnostic=self.agnostic, multi_label=self.multi_label
        )
        return Predictor(AugmentedModel(self.model) if augment else self.model, suppression, device=self.device)

    def _prepared(self, item: ImageSource, hw: tuple[int, ...]) -> tuple[np.ndarray, Tensor, Letterbox]:
        """The image to show (H, W, 3) RGB, as a batch of one for the network, and how the two belong together."""
        if isinstance(item, Tensor):
            return self._padded(item)
        image = _as_array(item, self.model.ch)
        boxed = letterbox(image, (hw[0], hw[1]), auto=True, stride=self.stride)
        return viewable(image), *collate([boxed], [image.shape[:2]], self.device)

    def _padded(self, item: Tensor) -> tuple[np.ndarray, Tensor, Letterbox]:
        height, width = item.shape[1:]
        batch = to_unit_range(item[None].to(self.device), torch.float32)
        batch = F.pad(batch, (0, -width % self.stride, 0, -height % self.stride), value=GREY)
        image = (to_unit_range(item.cpu(), torch.float32).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
        identity = Letterbox(torch.tensor([[height, width]]), torch.ones(1, 2), torch.zeros(1, 2))
        return viewable(image.numpy()), batch, identity


def _one_by_one(image: ImageSource, channels: int) -> list[ImageSource]:
    """A batch of tensors as its images; anything else alone. Raises UserError for a tensor of another shape."""
    if not isinstance(image, Tensor):
        return [image]
    if image.dim() == 3:
        image = image[None]
    if image.dim() != 4 or image.shape[1] != channels or min(image.shape[2:], default=0) < 1:
        raise UserError(
            f"a tensor should be ({channels}, H, W), or a batch of these, not {tuple(image.shape)}; arrays are (H, W, {channels})"
        )
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise UserError(f"a tensor should hold floats in 0-1 or uint8, not {image.dtype}")
    return list(image)


def _as_array(image: ImageSource, channels: int) -> np.ndarray:
    """(H, W, channels) uint8 or uint16 of a path, an array or a PIL image."""
    if isinstance(image, (str, Path)):
        if is_url(str(image)):
            return read_remote_image(str(image), channels=channels)
        return read_image(image, channels=channels, dtype=None)
    if isinstance(image, Image.Image):
        if channels not in (1, 3):
            raise UserError(f"a PIL image has no {channels} channels; give an array (H, W, {channels})")
        image = np.asarray(ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L"))
    if not isinstance(image, np.ndarray):
        raise UserError(f"an image should be a path, an array, a PIL image or a tensor, not {type(image).__name__}")
    if image.dtype not in (np.uint8, np.uint16):
        raise UserError(f"an array should be uint8 or uint16, not {image.dtype}")
    array = image[:, :, None] if image.ndim == 2 else image
    if array.ndim == 3 and channels == 3 and array.shape[2] in (1, 4):  # grey, or with transparency
        array = array[:, :, :3] if array.shape[2] == 4 else np.repeat(array, 3, axis=2)
    if array.ndim != 3 or array.shape[2] != channels or not array.size:
        raise UserError(f"an array should be (H, W, {channels}){' in RGB order' if channels == 3 else ''}, not {image.shape}")
    return np.ascontiguousarray(array)


def _file_name(image: ImageSource, index: int) -> str:
    given = image if isinstance(image, (str, Path)) else getattr(image, "filename", "")
    if not isinstance(given, (str, Path)) or not str(given):
        return f"image{index}.jpg"
    return redacted(str(given)) if is_url(str(given)) else str(given)
