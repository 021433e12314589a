"""The value types that cross package borders: batches and their targets, predictions, detections.

``Targets``, ``Predictions`` and ``Detections`` hold what every task has as attributes and what single tasks add (masks, keypoints, angles)
as optional attributes or named fields. Indexing, ``cat`` and ``to`` act on all of them alike, and what is absent stays absent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Self


class Letterbox(NamedTuple):
    """How each image of a batch came from its original: ``xy_batch = xy_original * scale_xy + pad_xy``."""

    original_hw: Tensor  # (B, 2) int64, height and width of the original image in px
    scale_xy: Tensor  # (B, 2) float32
    pad_xy: Tensor  # (B, 2) float32, px of border at the left and at the top

    def select(self, index: Any) -> Letterbox:
        """The letterbox of some images: an index, slice or mask over B."""
        return Letterbox(*(values[index] for values in self))


class Columns:
    """Base of the containers: dataclasses of tensors with a common first axis, of mappings of such tensors, of None and of flags."""

    def __getitem__(self, index: Any) -> Self:
        """The rows (objects, detections, images) that a mask, a slice or indices over the first axis select."""
        return self.map(lambda t: t[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same container with ``function`` of every tensor; what is absent stays absent."""
        changed = {}
        for name, value in self._present():
            changed[name] = {key: function(t) for key, t in value.items()} if isinstance(value, Mapping) else function(value)
        return replace(self, **changed)  # type: ignore[type-var]

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Self:
        """Every tensor on ``device``."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def cpu(self) -> Self:
        """Every tensor on the host; waits for the device."""
        return self.map(lambda t: t.cpu())

    def replace(self, **changes: Any) -> Self:
        """The same container with other values of some attributes."""
        return replace(self, **changes)  # type: ignore[type-var]

    @classmethod
    def cat(cls, parts: Sequence[Self], *, dim: int = 0) -> Self:
        """Containers with the same attributes and fields, joined along ``dim``."""
        first = parts[0]
        joined: dict[str, Any] = {}
        for name, value in first._present():
            values = [getattr(part, name) for part in parts]
            if isinstance(value, Mapping):
                joined[name] = {key: torch.cat([v[key] for v in values], dim=dim) for key in value}
            else:
                joined[name] = torch.cat(values, dim=dim)
        return replace(first, **joined)  # type: ignore[type-var]

    def _present(self) -> Iterator[tuple[str, Any]]:
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, (Tensor, Mapping)):
                yield f.name, value


@dataclass(frozen=True)
class Targets(Columns):
    """The objects of a batch, M in all, as the loss reads them."""

    image: Tensor  # (M,) int64, which image of the batch
    classes: Tensor  # (M,) int64
    boxes: Tensor  # (M, 4) float32 cxcywh, in 0-1 of the batch image
    masks: Tensor | None = None  # (M, h, ceil(w / 8)) uint8, eight pixels in a byte, at 1 / mask_ratio of the image; None: no such task
    keypoints: Tensor | None = None  # (M, K, 3) float32: x and y in 0-1, visibility 0, 1 or 2
    angle: Tensor | None = None  # (M,) float32 radians
    mask_width: int | None = None  # w of the masks; None: as many cells as the sides of the image give to their height

    def __len__(self) -> int:
        return len(self.image)

    def pin_memory(self) -> Targets:
        """In page-locked memory, from which copies to a GPU do not wait."""
        return self.map(lambda t: t.pin_memory())

    @staticmethod
    def of_rows(rows: Tensor) -> Targets:
        """From rows (M, 6) [image, class, cx, cy, w, h]."""
        return Targets(rows[:, 0].long(), rows[:, 1].long(), rows[:, 2:6].float())

    def rows(self) -> Tensor:
        """(M, 6) float32 [image, class, cx, cy, w, h]."""
        return torch.cat((self.image[:, None].float(), self.classes[:, None].float(), self.boxes), dim=1)

    @staticmethod
    def empty() -> Targets:
        """No object at all."""
        return Targets.of_rows(torch.zeros(0, 6))


@dataclass(frozen=True)
class Finish(Columns):
    """What the loader left to be done to the images of a batch on the device (data/augment/on_device.py)."""

    flips: Tensor  # (B, 2) bool: upside down, left to right; the targets are flipped already
    tables: Tensor | None = None  # (B, 3, 256) uint8 for each level of hue, saturation and value the one that it becomes

    def pin_memory(self) -> Finish:
        """In page-locked memory, from which copies to a GPU do not wait."""
        return self.map(lambda t: t.pin_memory())


class Batch(NamedTuple):
    """A collated batch, as the loader yields it and the training step takes it."""

    images: Tensor  # (B, C, H, W) uint8 or uint16, channels-last in memory, RGB order for three channels
    targets: Targets
    paths: tuple[str, ...]  # B file paths
    letterbox: Letterbox
    max_boxes: int  # the most boxes in one image, known on the host so that the loss never asks the device
    unreadable: tuple[tuple[str, str], ...] = ()  # path and reason of images that are replaced by grey
    step_images: int | None = None  # images of this step over all ranks, if more; 0: takes part, counts nowhere
    host_boxes: Tensor | None = None  # ``targets.boxes`` (or more) on the host, from which the loss bounds its lists of candidates
    finish: Finish | None = None  # what is left to do to the images
    truth: Any = None  # what the task's metric compares with, where the targets do not say it exactly; on the host

    @property
    def images_of_step(self) -> int:
        """Images of this step over all ranks; 0 where this batch counts nowhere."""
        return len(self.images) if self.step_images is None else self.step_images

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """The batch with images and targets on ``device``; what only reports need stays on the host, and so does a view of the boxes."""
        return self._replace(
            images=self.images.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
            host_boxes=self.targets.boxes if self.targets.boxes.device.type == "cpu" else self.host_boxes,
            finish=None if self.finish is None else self.finish.to(device, non_blocking=non_blocking),
        )


@dataclass(frozen=True)
class Predictions(Columns):
    """What a head decodes to, before suppression: N candidates for each of B images."""

    boxes: Tensor  # (B, N, 4) xyxy px of the network's input
    scores: Tensor  # (B, N, nc) in 0-1
    fields: Mapping[str, Tensor] = field(default_factory=dict)  # (B, N, ·) by name, such as mask coefficients
    shared: Mapping[str, Tensor] = field(default_factory=dict)  # (B, …) by name, of the whole image, such as prototypes
    unique: bool = False  # an object has one candidate (one-to-one branch): the best are kept as they are, without suppression

    def __iter__(self) -> Iterator[Tensor]:
        """``boxes, scores = model.predict(images)``; what a task adds is in ``fields`` and ``shared``."""
        return iter((self.boxes, self.scores))

    def padded(self, count: int) -> Predictions:
        """With candidates of score 0 after its own, ``count`` in all."""
        missing = count - self.scores.shape[1]
        if missing <= 0:
            return self
        filled = self.replace(shared={}).map(lambda t: torch.cat((t, t.new_zeros(len(t), missing, *t.shape[2:])), dim=1))
        return filled.replace(shared=self.shared)

    @classmethod
    def join_candidates(cls, parts: Sequence[Predictions]) -> Predictions:
        """Candidates of the same images from several networks or views, joined along N; shared maps are those of the first.

        Several of one object are among them, whatever the parts are.
        """
        joined = cls.cat([part.replace(shared={}) for part in parts], dim=1)
        return joined.replace(shared=parts[0].shared, unique=parts[0].unique and len(parts) == 1)


@dataclass(frozen=True)
class Detections(Columns):
    """What is left of one image after suppression, best score first."""

    boxes: Tensor  # (n, 4) xyxy px
    scores: Tensor  # (n,)
    classes: Tensor  # (n,) int64
    fields: Mapping[str, Tensor] = field(default_factory=dict)  # (n, ·) by name
    shared: Mapping[str, Tensor] = field(default_factory=dict)  # of the whole image, until a task has made fields of them
    image_hw: tuple[int, int] | None = None  # height and width of the image that the coordinates are in, where a field needs them
    codes: NDArray[np.object_] | None = None  # (n,) run-length codes, on the host: a compact form in the place of masks

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, index: Any) -> Detections:
        """The detections that a mask, a slice or indices select; what is of the whole image stays."""
        rows = super(Detections, self.replace(shared={})).__getitem__(index) if self.shared else super().__getitem__(index)
        if self.codes is not None:
            rows = rows.replace(codes=self.codes[index.numpy() if isinstance(index, Tensor) else index])
        return rows.replace(shared=self.shared) if self.shared else rows

    @classmethod
    def cat(cls, parts: Sequence[Detections], *, dim: int = 0) -> Detections:
        """Detections with the same fields, joined; without what is of one whole image."""
        joined = super().cat([part.replace(shared={}) if part.shared else part for part in parts], dim=dim)
        codes = [part.codes for part in parts if part.codes is not None]
        return joined.replace(codes=np.concatenate(codes)) if codes else joined

    @staticmethod
    def empty() -> Detections:
        """No detection."""
        return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))


def detections_on_host(detections: Sequence[Detections]) -> list[Detections]:
    """Detections of a batch on the CPU in float32, in one transfer."""
    if not detections or detections[0].boxes.device.type == "cpu":
        return [d.replace(boxes=d.boxes.float(), scores=d.scores.float()) for d in detections]
    counts = [len(d) for d in detections]
    together = Detections.cat(detections)
    widths = [t[0:1].flatten(1).shape[1] if t.ndim > 1 else 1 for t in _tensors(together)]
    flat = [t.float().reshape(sum(counts), width) for t, width in zip(_tensors(together), widths)]  # Σn may be 0
    rows = torch.cat(flat, dim=1).cpu()  # (Σn, ·), class numbers are exact
    columns = iter(rows.split(widths, dim=1))
    host = together.map(lambda t: next(columns).reshape(t.shape))
    host = host.replace(classes=host.classes.long())
    return split_detections(host, counts)


def split_detections(together: Detections, counts: Sequence[int]) -> list[Detections]:
    """Detections of several images, joined, as those of each: the inverse of ``Detections.cat``."""
    parts: list[Detections] = []
    start = 0
    for count in counts:
        parts.append(together[start : start + count])
        start += count
    return parts


def to_unit_range(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Integer images (uint8 or uint16) as floats in 0-1; float images are only cast. Batches come out channels-last in memory.

    This is the one place where pixel values become network input. Channels-last is the layout that convolutions run fastest in, on the
    CPU as on tensor cores; shapes stay (B, C, H, W).
    """
    layout = torch.channels_last if images.dim() == 4 else torch.preserve_format
    if images.dtype == torch.uint8:
        return images.to(dtype, memory_format=layout) / 255
    if images.dtype == torch.uint16:
        return (images.to(torch.float32, memory_format=layout) / 65535).to(dtype)
    if images.is_floating_point():
        return images.to(dtype, memory_format=layout)
    raise TypeError(f"images must be uint8, uint16 or float, not {images.dtype}")


def _tensors(columns: Columns) -> list[Tensor]:
    out: list[Tensor] = []
    for _, value in columns._present():
        out.extend(value.values() if isinstance(value, Mapping) else (value,))
    return out
