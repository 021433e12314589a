"""Decoding only the candidates that pass a threshold gives suppression what decoding everything gives it."""

from __future__ import annotations

import pytest
import torch

from models.heads.anchor_free import DDetect, Detect
from models.heads.base import HeadOutput
from models.heads.multi_branch import DualDDetect
from utils.nms import Suppression, non_max_suppression
from utils.types import Predictions

NC = 5


def output(head: Detect, *, batch: int, layout: torch.memory_format, dtype: torch.dtype = torch.float32) -> HeadOutput:
    """Maps of 64 x 96 px whose class logits pass low and high thresholds in some cells."""
    head.strides = (8.0, 16.0, 32.0)
    g = torch.Generator().manual_seed(batch)
    maps = [torch.randn(batch, 64 + NC, 64 // s, 96 // s, generator=g) * 2 for s in (8, 16, 32)]
    for level in maps:
        level[:, 64:] -= 4
    return HeadOutput((tuple(level.to(dtype).contiguous(memory_format=layout) for level in maps),))


@pytest.mark.parametrize("cls", [Detect, DDetect, DualDDetect])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("batch", "conf"), [(1, 0.25), (3, 0.25), (3, 0.001), (3, 0.9), (2, 0.9999), (2, 0.0)])
def test_suppression_keeps_the_same_of_what_passes(cls: type[Detect], layout: torch.memory_format, batch: int, conf: float) -> None:
    head = cls(NC, [64] * 3 * len(cls.branch_weights))
    maps = output(head, batch=batch, layout=layout)
    suppression = Suppression(conf=conf, iou=0.6, multi_label=True)
    wanted, got = (non_max_suppression(p, suppression) for p in (head.decode(maps), head.decode_above(maps, conf)))
    for one, other in zip(wanted, got, strict=True):
        assert one.classes.tolist() == other.classes.tolist()
        torch.testing.assert_close(other.boxes, one.boxes, rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(other.scores, one.scores, rtol=1e-6, atol=1e-7)


def test_only_cells_that_can_pass_are_decoded() -> None:
    head = Detect(NC, [64] * 3)
    maps = output(head, batch=2, layout=torch.channels_last)
    everything, few = head.decode(maps), head.decode_above(maps, 0.25)
    passing = (everything.scores.amax(2) > 0.25).sum(1)
    assert 0 < int(passing.max()) <= few.scores.shape[1] < everything.scores.shape[1] / 2


def test_no_cell_passes() -> None:
    head = Detect(NC, [64] * 3)
    maps = output(head, batch=2, layout=torch.channels_last)
    nothing = head.decode_above(HeadOutput((tuple(level - 50 for level in maps.main),)), 0.25)
    assert tuple(nothing.boxes.shape) == (2, 0, 4)
    assert [len(d) for d in non_max_suppression(nothing, Suppression())] == [0, 0]


def test_nan_of_one_class_does_not_hide_the_others() -> None:
    head = Detect(NC, [64] * 3)
    maps = output(head, batch=1, layout=torch.channels_last)
    maps.main[0][0, 64, 2, 3], maps.main[0][0, 65, 2, 3] = float("nan"), 5.0
    suppression = Suppression(conf=0.25, iou=0.6, multi_label=True)
    wanted, got = (non_max_suppression(p, suppression)[0] for p in (head.decode(maps), head.decode_above(maps, 0.25)))
    torch.testing.assert_close(got.scores, wanted.scores)
    assert wanted.scores[0] > 0.99


def test_scores_in_half_precision_are_those_of_a_full_decode() -> None:
    head = Detect(NC, [64] * 3)
    maps = output(head, batch=2, layout=torch.channels_last, dtype=torch.bfloat16)
    suppression = Suppression(conf=0.25, iou=0.6, multi_label=True)
    for one, other in zip(*(non_max_suppression(p, suppression) for p in (head.decode(maps), head.decode_above(maps, 0.25)))):
        torch.testing.assert_close(other.scores, one.scores, rtol=1e-6, atol=1e-7)  # equal scores have no order


def test_a_head_with_its_own_decode_keeps_it() -> None:
    class Marked(Detect):
        def decode(self, output: HeadOutput) -> Predictions:
            return super().decode(output).replace(fields={"mark": torch.ones(1, 126, 1)})

    head = Marked(NC, [64] * 3)
    found = head.decode_above(output(head, batch=1, layout=torch.channels_last), 0.25)
    assert "mark" in found.fields
