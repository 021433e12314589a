"""Suppression of several images in one call keeps what one call per image keeps."""

from __future__ import annotations

import pytest
import torch

from utils import nms
from utils.nms import Suppression, non_max_suppression, suppress_joined
from utils.types import Detections, Predictions


def candidates(count: int, *, seed: int, classes: int = 3) -> Detections:
    """Crowded boxes, best score first, with a field that says which is which."""
    g = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=g) * 120
    boxes = torch.cat((low, low + 5 + torch.rand(count, 2, generator=g) * 60), dim=1)
    scores = torch.rand(count, generator=g).sort(descending=True).values
    labels = torch.randint(0, classes, (count,), generator=g)
    return Detections(boxes, scores, labels, {"number": torch.arange(count)[:, None]})


@pytest.mark.parametrize("agnostic", [True, False])
@pytest.mark.parametrize("max_det", [3, 40, 1000])
@pytest.mark.parametrize("limit", [1, 150, 1 << 15])
def test_joined_images_keep_what_single_ones_keep(monkeypatch: pytest.MonkeyPatch, agnostic: bool, max_det: int, limit: int) -> None:
    monkeypatch.setattr(nms, "JOINED_CANDIDATES", limit)
    suppression = Suppression(iou=0.4, max_det=max_det, agnostic=agnostic)
    images = [candidates(count, seed=count) for count in (90, 0, 1, 400, 37)]
    for joined, image in zip(suppress_joined(images, suppression), images, strict=True):
        alone = nms._suppress(image, suppression)
        assert joined.fields["number"].tolist() == alone.fields["number"].tolist()
        assert torch.equal(joined.boxes, alone.boxes)
        assert torch.equal(joined.scores, alone.scores)
        assert torch.equal(joined.classes, alone.classes)


def test_images_without_candidates_join_to_nothing() -> None:
    found = suppress_joined([candidates(0, seed=0), candidates(0, seed=1)], Suppression())
    assert [tuple(d.boxes.shape) for d in found] == [(0, 4), (0, 4)]
    assert suppress_joined([], Suppression()) == []


def test_an_image_whose_prefix_is_one_object_is_suppressed_whole() -> None:
    crowd = candidates(2000, seed=2, classes=1)
    crowd.boxes[:1900] = torch.tensor([10.0, 10.0, 60.0, 60.0])
    suppression = Suppression(iou=0.5, max_det=20)
    joined = suppress_joined([crowd, candidates(50, seed=3)], suppression)
    assert joined[0].fields["number"].tolist() == nms._suppress(crowd, suppression).fields["number"].tolist()
    assert len(joined[0]) == 20


def test_padding_of_predictions_never_becomes_a_detection() -> None:
    predictions = Predictions(torch.tensor([[[0.0, 0.0, 9.0, 9.0]]]), torch.tensor([[[0.9, 0.1]]]), {"mask": torch.ones(1, 1, 4)})
    padded = predictions.padded(5)
    assert tuple(padded.scores.shape) == (1, 5, 2)
    assert tuple(padded.fields["mask"].shape) == (1, 5, 4)
    assert [len(d) for d in non_max_suppression(padded, Suppression(conf=0.001, multi_label=True))] == [2]
