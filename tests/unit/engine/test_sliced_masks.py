"""Sliced segmentation and evaluation keep run-length codes: masks as if each were drawn at the size of the image, without its memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.evaluation.evaluate import EvaluationOptions, evaluate
from engine.inference import sliced
from engine.inference.predictor import Predictor
from engine.inference.sliced import SlicedEvaluation, SlicedPredictor
from engine.inference.slicing import WindowDetections, merge_windows
from tasks import SEGMENT
from utils.errors import UserError
from utils.masks import render
from utils.nms import Suppression
from utils.types import Batch, Detections, Letterbox, Predictions, Targets

HW, SIDE, COUNT = (230, 301), 96, 12


class Blobs:
    """Random boxes with random masks, other ones for each image that it is given; many boxes end at a border."""

    names, nc, ch, stride, task, imgsz, dynamic = ("a", "b"), 2, 3, 32, SEGMENT, (SIDE, SIDE), True

    def __init__(self) -> None:
        self.random = torch.Generator().manual_seed(0)

    def predict(self, images: Tensor, *, above: float = 0.0) -> Predictions:
        count, (h, w) = len(images), images.shape[2:]
        corners = (torch.rand(count, COUNT, 2, 2, generator=self.random) * 1.4 - 0.2).clamp(0, 1).sort(dim=2).values
        corners[:, 0] = torch.tensor([[0.0, 0.2], [1.0, 0.6]])  # an object that all windows of a row have a piece of
        boxes = corners.flatten(2) * torch.tensor([w, h, w, h])
        scores = 0.5 + 0.4 * torch.rand(count, COUNT, 2, generator=self.random)
        scores[:, 1:, 1] = 0
        scores[:, 0, 0] = 0
        coefficients, prototypes = (torch.randn(count, *shape, generator=self.random) for shape in ((COUNT, 3), (3, h // 4, w // 4)))
        return Predictions(boxes, scores, {"coefficients": coefficients}, {"prototypes": prototypes})


def predictor() -> Predictor:
    return Predictor(Blobs(), Suppression(conf=0.3, iou=0.6, max_det=COUNT), device=torch.device("cpu"))


def look(max_det: int = COUNT) -> SlicedPredictor:
    one = predictor()
    one.suppression = Suppression(conf=0.3, iou=0.6, max_det=max_det)
    return SlicedPredictor(one, (SIDE, SIDE), 0.3, (SIDE, SIDE), batch=4)


IMAGE = np.zeros((*HW, 3), np.uint8)


def whole() -> Detections:
    return predictor().predict([IMAGE], hw=(SIDE, SIDE))[0]


def drawn_at_full_size(slices: SlicedPredictor, found: Detections) -> tuple[Detections, int]:
    """The same objects with every mask of every window at the size of the image, and the bytes of those masks."""
    windows, one = slices.windows(HW), slices.predictor
    parts = [WindowDetections(found, torch.tensor([[0.0, 0, HW[1], HW[0]]]).expand(len(found), -1), torch.zeros(len(found)).long())]
    for group in torch.arange(len(windows)).split(slices.batch):
        boxed = [one.fitted(IMAGE[y1:y2, x1:x2], slices.input_hw) for x1, y1, x2, y2 in windows[group].tolist()]
        seen = one.predict_letterboxed(boxed, [(SIDE, SIDE)] * len(group))
        for number, detections in zip(group.tolist(), seen):
            place = Letterbox(torch.tensor([HW]), torch.ones(1, 2), -windows[number, None, :2].float())
            (there,) = SEGMENT.to_original([detections], place)
            count = len(there)
            parts.append(WindowDetections(there, windows[number].float().expand(count, -1), torch.full((count,), 1 + number)))
    together = WindowDetections.cat(parts)
    merged = merge_windows(together, HW, iou=one.suppression.iou, max_det=one.suppression.max_det, task=SEGMENT)
    return merged, together.detections.fields["masks"].numel()


@pytest.mark.parametrize("max_det", [COUNT, 1000])
def test_masks_through_windows_are_those_drawn_at_full_size(max_det):
    found = whole()
    new, (old, _) = look(max_det)(IMAGE, found), drawn_at_full_size(look(max_det), found)
    assert len(new) == len(old) > 0
    for name in ("boxes", "scores", "classes"):
        assert torch.equal(getattr(new, name), getattr(old, name))
    assert torch.equal(new.fields["masks"], old.fields["masks"])
    assert new.image_hw == HW
    compact = look(max_det).compact(IMAGE, found)
    assert torch.equal(SEGMENT.expanded(compact).fields["masks"], old.fields["masks"])


def test_the_comparison_unites_pieces(monkeypatch):
    pieces, unite = [], type(SEGMENT).unite
    monkeypatch.setattr(type(SEGMENT), "unite", lambda task, found, owner, of: pieces.extend(of) or unite(task, found, owner, of))
    look()(IMAGE, whole())
    assert len(pieces) > 2


def test_windows_hold_a_fraction_of_the_bytes_until_the_merge(monkeypatch):
    held: list[Detections] = []

    def merge(found: WindowDetections, hw: tuple[int, int], **settings: Any) -> Detections:
        held.append(found.detections)
        return merge_windows(found, hw, **settings)

    monkeypatch.setattr(sliced, "merge_windows", merge)
    found = whole()
    look()(IMAGE, found)
    _, before = drawn_at_full_size(look(), found)
    assert held[0].codes is not None
    assert not held[0].fields
    assert sum(len(code["counts"]) for code in held[0].codes) < before / 10


def test_the_masks_that_remain_are_what_the_limit_is_about(monkeypatch):
    of_one = HW[0] * -(-HW[1] // 8)
    found = whole()[:1]
    monkeypatch.setattr(render, "MAX_MASK_BYTES", 20 * of_one)
    assert len(look(max_det=20)(IMAGE, found)) == 20  # of some hundred in all windows
    with pytest.raises(UserError, match=r"masks of 301x230 px need .* lower --max-det"):
        look(max_det=1000)(IMAGE, found)


@pytest.mark.parametrize("windows", [False, True])
def test_an_evaluation_holds_the_masks_of_one_image_at_a_time(monkeypatch, windows):
    alive, most, drawn = 0, 0, 0
    draw = render.prototype_masks_at

    class Counted(np.ndarray):
        def __del__(self):
            nonlocal alive
            alive -= 1

    def counted(*args: Any, **settings: Any) -> Tensor:
        nonlocal alive, most, drawn
        alive, drawn = alive + 1, drawn + 1
        most = max(most, alive)
        return torch.from_numpy(draw(*args, **settings).numpy().view(Counted))

    monkeypatch.setattr("tasks.segment.prototype_masks_at", counted)
    count = 5
    letterbox = Letterbox(torch.tensor([HW] * count), torch.full((count, 2), 0.25), torch.zeros(count, 2))
    batch = Batch(torch.zeros(count, 3, 64, 96, dtype=torch.uint8), Targets.empty(), tuple("abcde"), letterbox, 0)
    options = EvaluationOptions(
        Suppression(conf=0.3, max_det=COUNT), progress=False, sliced=SlicedEvaluation(look(), lambda _: IMAGE) if windows else None
    )
    seen = []

    class Looker:
        def on_batch(self, evaluated: Any) -> None:
            assert len(evaluated.found) == count
            for found in evaluated.detections:
                seen.append(tuple(found.fields["masks"].shape))

    evaluate(Blobs(), [batch], options, callbacks=[Looker()])
    assert drawn >= count
    assert most <= 1
    assert [shape[1:] for shape in seen] == [(HW[0], -(-HW[1] // 8))] * count
