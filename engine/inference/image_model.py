"""A network that takes images of any kind: ``results = load_model("best.pt")("a.jpg")``, with detect.py's pre- and post-processing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.inference.augmented import GREY, AugmentedModel
from engine.inference.inputs import ImageSource, as_array, file_name, single_images
from engine.inference.networks import LoadOptions, load_network
from engine.inference.predictor import PRE_PROCESS, STAGES, Network, Predictor, collate
from engine.inference.results import Results
from utils.cli.sizes import height_and_width
from utils.distributed import select_device
from utils.errors import UserError, nearest
from utils.nms import Suppression
from utils.sizes import round_up_to_stride
from utils.types import Letterbox, Predictions, to_unit_range
from utils.visual.draw import viewable

SETTINGS = ("conf", "iou", "classes", "max_det", "agnostic", "multi_label")
OTHER_NAMES = {"agnostic_nms": "agnostic", "conf_thres": "conf", "iou_thres": "iou"}
ELSEWHERE = {  # options of other programs' calls -> what does it here
    "stream": "for result in model.stream(source)", "save": "results.save()", "show": "results.show()", "verbose": "results.print()",
    "save_crop": "results.crop()", "device": "load_model(path, device=...)", "half": "detect.py --half",
}  # fmt: skip


def load_model(path: str | Path, *, device: str = "", plugins: Sequence[str | Path] = (), download: bool = False) -> ImageModel:
    """A checkpoint, deployed, or an exported file, as a function of images.

    Args:
        path: of the weights: this project's or another's ``.pt``, safetensors, or what export.py wrote.
        device: ``cpu``, ``0`` …; a GPU where there is one if empty.
        plugins: Python files with modules that the model uses.
        download: fetch published weights that are not on disk.

    Raises:
        UserError: the file is not there, is damaged, or cannot be built.
    """
    chosen = select_device(device)
    network = load_network(Path(path), device=chosen, options=LoadOptions(plugins=[str(p) for p in plugins], download=download))
    return ImageModel(network, device=chosen)


class ImageModel(nn.Module):
    """A network that takes paths, folders, arrays, PIL images, tensors and lists of these, and returns :class:`Results`.

    Attributes:
        model: the network itself: tensors in, raw maps or predictions out.
        conf: least score; the task's usual one at first (0.25, 0 to classify).
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

    def __init__(self, network: Network, *, device: torch.device | None = None) -> None:
        """
        Args:
            network: a Model as ``deploy()`` gives it, or an exported file.
            device: where an exported file runs; a Model's own is used.
        """
        super().__init__()
        self.model: Any = network.eval() if isinstance(network, nn.Module) else network
        self.names, self.stride = network.names, network.stride
        self.conf = network.task.defaults.conf
        self._device = device or torch.device("cpu")

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), self._device)

    def forward(
        self, source: ImageSource | Sequence[ImageSource], size: int | Sequence[int] | None = None, augment: bool = False, **settings: Any
    ) -> Results:
        """Finds objects; the results of all images, which are kept in memory (``stream`` gives one after another).

        Args:
            source: a path, folder, glob, .txt list or http(s) URL, an array (H, W, C) or (H, W) uint8 or uint16, in RGB order where C is
                3, a PIL image, a tensor (C, H, W) or (B, C, H, W) in 0-1 or uint8, or a list of these. Tensors go into the network as
                they are, padded to the stride; everything else is letterboxed.
            size: side, or height and width, of the letterboxed image in px, the task's usual one (640, 224 to classify) if
                None; ``imgsz`` means the same.
            augment: look also at smaller and mirrored versions.
            settings: ``conf``, ``iou``, ``classes``, ``max_det``, ``agnostic``, ``multi_label`` of this call, instead of the attributes.

        Raises:
            UserError: an image that cannot be read, or is of another kind or shape, or an unknown setting.
        """
        each = list(self.stream(source, size, augment, **settings))
        if not each:
            return Results([], [], self.names, [], (0.0,) * len(STAGES), self.model.task)
        times = tuple(sum(stage) / len(each) for stage in zip(*(one.times_ms for one in each)))
        images, found = [one.ims[0] for one in each], [one.found[0] for one in each]
        return Results(images, found, self.names, [one.files[0] for one in each], times, self.model.task)

    def stream(
        self, source: ImageSource | Sequence[ImageSource], size: int | Sequence[int] | None = None, augment: bool = False, **settings: Any
    ) -> Iterator[Results]:
        """The results of one image after another, as ``forward`` takes them: of a large folder only one image is in memory."""
        size = settings.pop("imgsz", size)
        size = self.model.task.defaults.imgsz if size is None else size
        predictor = self._predictor(augment=augment, settings=settings)
        sides = height_and_width(size if isinstance(size, int) else tuple(size))
        hw = predictor.imgsz or tuple(round_up_to_stride(side, self.stride) for side in sides)
        for index, item in enumerate(single_images(source, predictor.ch)):
            before = dict(predictor.stopwatch.seconds)
            with predictor.stopwatch.stage(PRE_PROCESS):
                image, batch, placement = self._prepared(item, hw, predictor)
            found = predictor.predict_batch(batch, placement)
            times = tuple(1000 * (predictor.stopwatch.seconds[stage] - before.get(stage, 0.0)) for stage in STAGES)
            yield Results([image], found, self.names, [file_name(item, index)], times, predictor.task)

    def predict(self, images: Tensor, *, above: float = 0.0) -> Predictions:
        """Boxes (B, N, 4) xyxy px and scores (B, N, nc), before suppression, for a batch (B, C, H, W) in 0-1 of the network's size.

        Raises:
            UserError: not a tensor; files, arrays and PIL images are what the model itself takes: ``model("a.jpg")``.
        """
        if not isinstance(images, Tensor):
            raise UserError(f"predict() takes a tensor (B, {self.model.ch}, H, W) in 0-1; {_called_with(images)} goes to the model itself: "
                            "results = model(...)")  # fmt: skip
        return self.model.predict(images.to(self.device), above=above)

    def _predictor(self, *, augment: bool, settings: dict[str, Any]) -> Predictor:
        given = {OTHER_NAMES.get(name, name): value for name, value in settings.items()}
        for name in given.keys() - set(SETTINGS):
            known = (*SETTINGS, "size", "imgsz", "augment")
            hint = f"write {ELSEWHERE[name]}" if name in ELSEWHERE else nearest(name, known) or f"known are {', '.join(known)}"
            raise UserError(f"model(...): no setting {name!r}; {hint}")
        values = {name: given.get(name, getattr(self, name)) for name in SETTINGS}
        for name in ("conf", "iou"):
            if not 0 <= values[name] <= 1:
                raise UserError(f"model(...): {name} should be from 0 to 1, got {values[name]}")
        network = AugmentedModel(self.model) if augment else self.model
        return Predictor(network, Suppression(**values), device=self.device)

    def _prepared(self, item: ImageSource, hw: tuple[int, ...], predictor: Predictor) -> tuple[np.ndarray, Tensor, Letterbox]:
        """The image to show (H, W, 3) RGB, as a batch of one for the network, and how the two belong together."""
        if isinstance(item, Tensor):
            return self._padded(item, predictor.imgsz)
        image = as_array(item, predictor.ch)
        boxed = predictor.fitted(image, (hw[0], hw[1]))
        return viewable(image), *collate([boxed], [image.shape[:2]], self.device)

    def _padded(self, item: Tensor, fixed: tuple[int, int] | None) -> tuple[np.ndarray, Tensor, Letterbox]:
        height, width = item.shape[1:]
        batch = to_unit_range(item[None].to(self.device), torch.float32)
        batch = F.pad(batch, (0, -width % self.stride, 0, -height % self.stride), value=GREY)
        if fixed is not None and tuple(batch.shape[2:]) != tuple(fixed):
            raise UserError(f"a tensor should be {fixed[0]}x{fixed[1]} px for this exported file, not {height}x{width}; arrays are resized")
        image = (to_unit_range(item.cpu(), torch.float32).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
        identity = Letterbox(torch.tensor([[height, width]]), torch.ones(1, 2), torch.zeros(1, 2))
        return viewable(image.numpy()), batch, identity


def _called_with(images: object) -> str:
    return f"{images!r:.60}" if isinstance(images, (str, Path)) else f"a {type(images).__name__}"
