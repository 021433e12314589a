"""Instance segmentation: objects with a box and a mask.

A mask travels in one of three forms. Targets hold it at 1 / ``mask_ratio`` of the image, eight pixels in a byte, as the loss reads it.
Detections hold it at the size of the image that their boxes are in, packed as well; until ``to_original`` they hold coefficients and the
image's prototypes, so that a mask is drawn once, at its final size. The metric holds run-length codes, and so do detections where those
of several images or windows are kept (``compact``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tasks.base import DrawStyle, ExportOutput, TaskDefaults, View, register_task
from tasks.detect import DETECT, SAME_OBJECT_IOU, DetectTask, map_boxes
from tasks.rows import COLUMNS, NO_AREA, InvalidRow, LabelRow
from utils.boxes import box_iou, cxcywh_to_xyxy, denormalised, ltwh_to_xyxy, to_batch, to_original, xyxy_to_cxcywh
from utils.errors import UserError
from utils.instances import Instances
from utils.masks.outlines import cut_bridges, joined, rings_of_packed
from utils.masks.packed import pack, packed_width
from utils.masks.rasterise import index_map, polygon_masks
from utils.masks.render import Placement, check_memory, masks_at, prototype_masks_at
from utils.masks.rle import (
    FIELD,
    areas,
    areas_of,
    codes_to_rows,
    decode_packed,
    encode_packed,
    encode_polygons,
    joined_rows,
    mask_overlap,
    rows_to_codes,
    united,
)  # fmt: skip
from utils.metrics.coco_eval import as_json
from utils.metrics.metrics import GroundTruth
from utils.metrics.paired import PairedAccumulator, PairedMetrics, paired_columns
from utils.nms import Suppression, non_max_suppression
from utils.types import Batch, Detections, Letterbox, Predictions, Targets, detections_on_host

COEFFICIENTS, PROTOTYPES = "coefficients", "prototypes"
PROTOTYPE_PX = 4  # px of the network's input for each cell of the prototypes, in all published heads
FEWEST_POINTS = 3
LINE = 1e-9  # twice the area, in 0-1, of a triangle of points that lie on a line


class MaskHyp(Protocol):
    """The hyper-parameters that mask targets read."""

    @property
    def mask_ratio(self) -> int: ...
    @property
    def overlap_mask(self) -> int: ...


@dataclass(frozen=True)
class SegmentTask(DetectTask):
    """Boxes with masks. A label row of only a box is taken too: its mask is the box.

    Attributes:
        mask_ratio: px of the image for each cell of a target's mask.
        overlap_mask: whether a pixel belongs to one object only, the smallest of those that cover it; else to all of them.
    """

    mask_ratio: int = 4
    overlap_mask: bool = True

    name = "segment"
    expected_row = "class x1 y1 x2 y2 x3 y3 … (an outline of three points or more), or class cx cy w h"
    coco_type = "segm"
    candidate_field = COEFFICIENTS
    defaults = TaskDefaults(metric="metrics/mAP_0.5:0.95(M)")
    shared_fields = (PROTOTYPES,)
    outputs = (
        ExportOutput("output0", {0: "batch", 2: "boxes"}, {"boxes": 1e-3, "scores": 1e-4, COEFFICIENTS: 1e-3}),
        ExportOutput("output1", {0: "batch", 2: "height", 3: "width"}, {PROTOTYPES: 1e-3}),
    )

    @property
    def columns(self) -> tuple[str, ...]:
        """Those of detection for boxes (B), then for masks (M)."""
        return paired_columns("M")

    def configured(self, hyp: MaskHyp) -> SegmentTask:
        """The task with the targets that a recipe asks for."""
        return dataclasses.replace(self, mask_ratio=int(hyp.mask_ratio), overlap_mask=bool(hyp.overlap_mask))

    # Rows and targets

    def parse_row(self, values: Sequence[str]) -> LabelRow | InvalidRow:
        """Class and outline (7 columns or more, an odd number), or class and box (5), whose mask is the box."""
        if len(values) != 5 and (len(values) < 1 + 2 * FEWEST_POINTS or len(values) % 2 == 0):
            return InvalidRow(f"{len(values)} columns, expected: {self.expected_row}", COLUMNS)
        row = super().parse_row(values)
        if isinstance(row, InvalidRow):
            if row.kind == NO_AREA and len(values) > 5:
                points = len({tuple(values[i : i + 2]) for i in range(1, len(values), 2)})
                return row._replace(message=f"an outline of {points} different points without area, dropped")
            return row._replace(message=row.message.replace(DETECT.expected_row, self.expected_row))
        if len(row.polygon) and is_line(row.polygon):
            return InvalidRow("an outline whose points lie on a line, dropped", NO_AREA, False)
        rings = cut_bridges(row.polygon)
        return row if len(rings) == 1 else row._replace(polygon=np.concatenate(rings), rings=tuple(map(len, rings)))

    def targets(self, instances: Instances, hw: tuple[int, int]) -> Mapping[str, Any]:
        """Classes (n,), boxes (n, 4) cxcywh in 0-1, masks (n, h, ceil(w / 8)) packed, and w; ``overlap_mask`` is heeded."""
        masks = polygon_masks(outlines_of(instances), hw, ratio=self.mask_ratio)
        if self.overlap_mask and len(masks) > 1:
            indices, order = index_map(masks)
            masks = np.empty_like(masks)
            masks[order] = indices[None] == np.arange(1, len(order) + 1)[:, None, None]
        return {**super().targets(instances, hw), "masks": pack(masks), "mask_width": masks.shape[2]}

    def ground_truth(self, batch: Batch) -> GroundTruth:
        """The objects of a batch in px of the original images, from their outlines where the loader kept those, else from targets."""
        if batch.truth is not None:
            return batch.truth
        hw = (batch.images.shape[-2], batch.images.shape[-1])
        known = self.to_original_compact(self.detections_of_targets(batch.targets.cpu(), hw, count=len(batch.images)), batch.letterbox)
        return with_codes(super().ground_truth(batch), [codes_of(d) for d in known])

    def exact_truth(self, images: Sequence[tuple[Instances, tuple[int, int]]]) -> GroundTruth:
        """The objects of images in px of the originals, each with its height and width: from their outlines, as COCO fills them."""
        truth = self.truth_of_originals([i for i, _ in images], [i.boxes_xyxy for i, _ in images])
        return with_codes(truth, [[encode_polygons([joined(r).ravel()], hw) for r in outlines_of(i)] for i, hw in images])

    # Predictions and detections

    def join(self, parts: Sequence[Predictions]) -> Predictions:
        """Candidates of several networks: each keeps its own prototypes, with coefficients 0 for those of the others."""
        widths = [part.shared[PROTOTYPES].shape[1] for part in parts]
        if len({part.shared[PROTOTYPES].shape[2:] for part in parts}) > 1:
            raise UserError("segmentation: prototypes of several sizes cannot be joined; give models of one stride")
        before = [sum(widths[:place]) for place in range(len(parts))]
        padded = [
            part.replace(fields={COEFFICIENTS: functional.pad(part.fields[COEFFICIENTS], (start, sum(widths) - start - width))})
            for part, start, width in zip(parts, before, widths)
        ]
        return super().join(padded).replace(shared={PROTOTYPES: torch.cat([part.shared[PROTOTYPES] for part in parts], dim=1)})

    def from_view(self, predictions: Predictions, view: View) -> Predictions:
        """Boxes and prototypes turned back; the latter are sampled at the cells of the images."""
        maps = predictions.shared[PROTOTYPES]
        at = [
            (torch.arange(-(-side // PROTOTYPE_PX), device=maps.device) + 0.5) * PROTOTYPE_PX for side in view.hw
        ]  # px of the images at the centres of their cells, rows and columns
        y, x = at[0] * view.scale_xy[1], (view.hw[1] - at[1] if view.mirrored else at[1]) * view.scale_xy[0]
        h, w = (2 * place / (PROTOTYPE_PX * cells) - 1 for place, cells in ((y, maps.shape[2]), (x, maps.shape[3])))
        grid = torch.stack((w[None, :].expand(len(h), -1), h[:, None].expand(-1, len(w))), dim=-1)
        grid = grid.to(maps.dtype).expand(len(maps), -1, -1, -1)
        turned = functional.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return predictions.replace(boxes=view.boxes_back(predictions.boxes), shared={PROTOTYPES: turned})

    def unite(self, detections: Detections, owner: Tensor, pieces: Tensor) -> Detections:
        """The masks of pieces become part of their owner's."""
        if detections.codes is not None:
            return detections.replace(codes=_united(detections.codes, owner.numpy(), pieces.numpy()))
        masks = detections.fields[FIELD].numpy().copy()
        np.bitwise_or.at(masks, owner.numpy(), masks[pieces.numpy()])
        return detections.replace(fields={FIELD: torch.from_numpy(masks)})

    def postprocess(self, predictions: Predictions, suppression: Suppression) -> list[Detections]:
        """Detections with the coefficients of their masks (n, K), and the prototypes (K, h, w) of their image."""
        found = non_max_suppression(predictions, suppression)
        maps = predictions.shared.get(PROTOTYPES)
        return found if maps is None else [d.replace(shared={PROTOTYPES: maps[image]}) for image, d in enumerate(found)]

    def to_original(self, detections: Sequence[Detections], letterbox: Letterbox) -> list[Detections]:
        """Boxes and masks (n, H, ceil(W / 8)) in px of the original images; what becomes of a mask outside its box is nothing."""
        boxes = map_boxes(detections_on_host([without_masks(d) for d in detections]), partial(to_original, letterbox=letterbox))
        return [self._with_masks(d, plain, placement_in_batch(letterbox, image)) for image, (d, plain) in enumerate(zip(detections, boxes))]

    def to_original_compact(self, detections: Sequence[Detections], letterbox: Letterbox) -> list[Detections]:
        """The same with run-length codes, masks of one image at a time; those of a window are never drawn at the size of the whole."""
        boxes = map_boxes(detections_on_host([without_masks(d) for d in detections]), partial(to_original, letterbox=letterbox))
        return [self._with_codes(d, plain, placement_in_batch(letterbox, image)) for image, (d, plain) in enumerate(zip(detections, boxes))]

    def compact(self, detections: Detections) -> Detections:
        """With run-length codes."""
        if detections.codes is not None:
            return detections
        return detections.replace(fields={}, image_hw=hw_of(detections), codes=codes_of(detections))

    def expanded(self, detections: Detections) -> Detections:
        """With packed masks (n, H, ceil(W / 8)). Raises UserError where they would need more than ``MAX_MASK_BYTES``."""
        if detections.codes is None:
            return detections
        hw = detections.image_hw
        assert hw is not None
        check_memory(len(detections), hw)
        return detections.replace(fields={FIELD: torch.from_numpy(decode_packed(detections.codes, hw))}, codes=None)

    def to_batch(self, detections: Sequence[Detections], letterbox: Letterbox) -> list[Detections]:
        boxes = map_boxes([without_masks(d) for d in detections], partial(to_batch, letterbox=letterbox))
        places = [placement_in_batch(letterbox, image).inverse(batch_hw(letterbox, image)) for image in range(len(boxes))]
        return [self._with_masks(d, plain, place) for d, plain, place in zip(detections, boxes, places)]

    def _with_masks(self, detections: Detections, plain: Detections, placement: Placement) -> Detections:
        """``plain`` with the masks of ``detections``, in its coordinates."""
        if FIELD in detections.fields:
            masks = masks_at(detections.fields[FIELD], plain.boxes, placement)
        elif COEFFICIENTS in detections.fields and PROTOTYPES in detections.shared:
            coefficients, prototypes = detections.fields[COEFFICIENTS], detections.shared[PROTOTYPES]
            masks = prototype_masks_at(coefficients, prototypes, plain.boxes, placement, cell_px=PROTOTYPE_PX)
        else:
            raise ValueError(f"detections of the task {self.name!r} need masks, or coefficients and prototypes")
        return plain.replace(fields={FIELD: masks}, image_hw=placement.hw)

    def _with_codes(self, detections: Detections, plain: Detections, placement: Placement) -> Detections:
        """``plain`` with the codes of the masks of ``detections``, in its coordinates."""
        if FIELD not in detections.fields or (corner := window_corner(placement, hw_of(detections))) is None:
            return self.compact(self._with_masks(detections, plain, placement))
        hw = hw_of(detections)
        boxes = plain.boxes.double() - torch.tensor([*corner, *corner])  # exact: masks end at the boxes that are in px of the image
        masks = masks_at(detections.fields[FIELD], boxes, Placement(hw, (1.0, 1.0), (0.0, 0.0))).numpy()
        codes = encode_packed(masks, hw[1], within=placement.hw, at_xy=corner)
        return plain.replace(image_hw=placement.hw, codes=codes)

    def detections_of_targets(self, targets: Targets, hw: tuple[int, int], *, count: int) -> list[Detections]:
        """The targets as detections of score 1 in px of the batch, their masks at its size."""
        boxes = cxcywh_to_xyxy(denormalised(targets.boxes, (float(hw[0]), float(hw[1]))))
        plain, found = Detections(boxes, torch.ones(len(targets)), targets.classes), []
        cell = 1 if targets.masks is None else _cell_px(hw, (targets.masks.shape[1], targets.mask_width))
        for image in range(count):
            rows = targets.image == image
            own, known = plain[rows], None if targets.masks is None else targets.masks[rows]
            masks = torch.zeros(0, hw[0], packed_width(hw[1]), dtype=torch.uint8) if known is None else known
            place = Placement(hw, (1 / cell, 1 / cell), (0.0, 0.0))
            found.append(own.replace(fields={FIELD: masks_at(masks, own.boxes, place)}, image_hw=hw))
        return found

    def add_truth(self, detections: Detections, truth: GroundTruth, *, image: int) -> Detections:
        rows = truth.image == image
        classes, boxes = truth.classes[rows], ltwh_to_xyxy(truth.boxes_ltwh[rows]).to(detections.boxes)
        same = (box_iou(detections.boxes, boxes) > SAME_OBJECT_IOU) & (detections.classes[:, None] == classes)  # (n, m)
        hw = hw_of(detections)
        masks = torch.from_numpy(decode_packed(rows_to_codes(truth.fields[FIELD][rows].numpy()), hw))
        objects = Detections(boxes, torch.ones(len(classes)).to(detections.scores), classes, {FIELD: masks}, image_hw=hw)
        return Detections.cat([objects, detections[~same.any(dim=1)]])

    # Metric, drawings, files

    def metric(self, names: Sequence[str], *, rule: str = "coco") -> SegmentAccumulator:  # type: ignore[override]
        return SegmentAccumulator(names, rule=rule)

    def plot(self, result: PairedMetrics, folder: Path) -> None:  # type: ignore[override]
        """Precision, recall and F1 curves of boxes and of masks, and the confusion matrix of boxes."""
        from utils.visual.plots import plot_confusion, plot_curves

        plot_curves(result.box, folder, prefix="Box")
        plot_curves(result.own, folder, prefix="Mask")
        plot_confusion(result.box.confusion, result.box.names, folder / "confusion_matrix.png")

    def draw(self, image_rgb: NDArray[np.uint8], detections: Detections, names: Sequence[str], style: DrawStyle) -> NDArray[np.uint8]:
        """Masks with outlines, below thin boxes and labels."""
        from utils.visual.masks import draw_instances

        return draw_instances(
            image_rgb, detections, names, line_thickness=style.line_thickness, hide_labels=style.hide_labels, hide_conf=style.hide_conf
        )

    def label_rows(self, detections: Detections, hw: tuple[int, int], *, with_confidence: bool = False) -> list[str]:
        """``class x1 y1 x2 y2 …`` in 0-1, and the score if asked for; pieces and holes are joined by bridges that enclose no area.

        A detection whose mask is empty has the row of its box, as an object without an outline has.
        """
        plain = super().label_rows(detections, hw, with_confidence=with_confidence)
        rings = rings_of_packed(detections.fields[FIELD].cpu().numpy())
        rows = []
        for box_row, found, score, label in zip(plain, rings, detections.scores.tolist(), detections.classes.tolist()):
            values = (joined(found) / np.array((hw[1], hw[0]))).clip(0, 1).ravel().tolist() + [score] * with_confidence
            rows.append(" ".join([str(label), *(f"{value:.6g}" for value in values)]) if found else box_row)
        return rows

    def json_entries(self, detections: Detections) -> list[dict[str, Any]]:
        """Box and mask, as run-length code at the size of the image."""
        return [{**entry, "segmentation": as_json(code)} for entry, code in zip(super().json_entries(detections), codes_of(detections))]

    # Export

    def to_export(self, predictions: Predictions) -> tuple[Tensor, ...]:
        """(B, 4 + nc + K, N): centre, width and height in px, scores, coefficients; and prototypes (B, K, h, w)."""
        parts = (xyxy_to_cxcywh(predictions.boxes), predictions.scores, predictions.fields[COEFFICIENTS])
        return torch.cat(parts, dim=2).transpose(1, 2), predictions.shared[PROTOTYPES]

    def from_export(self, tensors: Sequence[Tensor], *, nc: int) -> Predictions:
        ranks = [t.ndim for t in tensors]
        if ranks != [3, 4] or tensors[0].shape[1] != 4 + nc + tensors[1].shape[1]:
            raise ValueError(
                f"two outputs are needed for {nc} classes: (batch, {4 + nc} + K, boxes) and prototypes (batch, K, height, width)"
            )
        prototypes = tensors[1].float()
        boxes, scores, coefficients = tensors[0].float().transpose(1, 2).split((4, nc, prototypes.shape[1]), dim=2)
        return Predictions(cxcywh_to_xyxy(boxes), scores, {COEFFICIENTS: coefficients}, {PROTOTYPES: prototypes})

    def class_count(self, output_shapes: Sequence[Sequence[int | None]]) -> int:
        if [len(shape) for shape in output_shapes] != [3, 4]:
            return 0
        rows, prototypes = output_shapes[0][1], output_shapes[1][1]
        return max(rows - 4 - prototypes, 0) if rows is not None and prototypes is not None else 0


def is_line(points: NDArray) -> bool:
    """Whether points (n, 2) in 0-1 all lie on one line, as far as float32 can tell."""
    offsets = points - points[0]
    along = offsets[np.abs(offsets).sum(axis=1).argmax()]
    return bool(np.abs(offsets[:, 0] * along[1] - offsets[:, 1] * along[0]).max() <= LINE)


class SegmentAccumulator(PairedAccumulator):
    """Box and mask AP; masks are kept as run-length codes, some hundred bytes each."""

    def __init__(self, names: Sequence[str] | Mapping[int, str], *, rule: str = "coco") -> None:
        super().__init__(names, mark="M", noun="mask", rule=rule, similarity=mask_overlap, fields={FIELD: rows_to_codes}, area=areas)

    @property
    def coco_kinds(self) -> Mapping[str, Mapping[str, Any]]:
        return {"bbox": {}, "segm": {}}

    def update(self, detections: Sequence[Detections], truth: GroundTruth, *, images: Sequence[int | str]) -> None:
        """Adds a batch; detections hold packed masks or codes, the ground truth codes as rows of bytes."""
        coded = [codes_to_rows(codes_of(d)) for d in detections]
        fields = [{FIELD: torch.from_numpy(rows.copy())} for rows in coded]
        super().update([d.replace(fields=f, codes=None) for d, f in zip(detections, fields)], truth, images=images)


def outlines_of(instances: Instances) -> list[list[NDArray]]:
    """The rings of each object; the corners of its box where it has no outline."""
    corners = instances.boxes_xyxy[:, (0, 1, 2, 1, 2, 3, 0, 3)].reshape(-1, 4, 2)
    return [rings or [box] for rings, box in zip(instances.outlines(), corners)]


def with_codes(truth: GroundTruth, codes: Sequence[Sequence[Any] | NDArray[np.object_]]) -> GroundTruth:
    """Ground truth with the masks of its objects, codes by image, and their area."""
    rows = joined_rows([codes_to_rows(part) for part in codes])
    area = areas_of([code for part in codes for code in part])
    return truth.replace(area=torch.from_numpy(area), fields={FIELD: torch.from_numpy(rows)})


def _cell_px(hw: tuple[int, int], mask_hw: tuple[int, int | None]) -> int:
    """The ratio at which an image has masks of this size: the longer side leaves less choice, as a part of a cell is left out."""
    return max(min((side // cells for side, cells in zip(hw, mask_hw) if cells), default=1), 1)


def width_of(detections: Detections) -> int:
    """Width in px of the image that masks cover; to the next byte where it is not known."""
    return detections.image_hw[1] if detections.image_hw else 8 * detections.fields[FIELD].shape[2]


def codes_of(detections: Detections) -> NDArray[np.object_]:
    """The run-length codes (n,) of masks, packed or coded already."""
    return encode_packed(detections.fields[FIELD].cpu().numpy(), width_of(detections)) if detections.codes is None else detections.codes


def hw_of(detections: Detections) -> tuple[int, int]:
    """Height and width in px of the image that packed masks cover."""
    return detections.image_hw or (detections.fields[FIELD].shape[1], width_of(detections))


def window_corner(placement: Placement, hw: tuple[int, int]) -> tuple[int, int] | None:
    """Where (x, y px) a window of ``hw`` px lies in the image that a placement is of; None where it is scaled, or not within it."""
    (height, width), scale, pad = placement
    left, top = (-round(p) for p in pad)
    inside = 0 <= left <= width - hw[1] and 0 <= top <= height - hw[0]
    return (left, top) if inside and scale == (1.0, 1.0) and pad == (-left, -top) else None


def _united(codes: NDArray[np.object_], owner: NDArray, pieces: NDArray) -> NDArray[np.object_]:
    """Codes (n,), those of pieces (p,) also part of their owners' (p,)."""
    found = codes.copy()
    for row in np.unique(owner):
        found[row] = united([codes[row], *codes[pieces[owner == row]]])
    return found


def without_masks(detections: Detections) -> Detections:
    """Boxes, scores and classes."""
    return detections.replace(fields={}, shared={}, codes=None)


def placement_in_batch(letterbox: Letterbox, image: int) -> Placement:
    """Where the pixels of an original lie in the batch."""
    (height, width), scale, pad = (t[image].tolist() for t in letterbox)
    return Placement((int(height), int(width)), tuple(scale), tuple(pad))


def batch_hw(letterbox: Letterbox, image: int) -> tuple[int, int]:
    """Height and width of the batch that an image was letterboxed into: its border is as wide on both sides, or one px wider at the end."""
    (height, width), scale, pad = (t[image].tolist() for t in letterbox)
    (w, h) = (round(side * s) + 2 * max(round(p), 0) for side, s, p in zip((width, height), scale, pad))
    return h, w


SEGMENT = register_task(SegmentTask())
