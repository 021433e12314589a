"""The bootstrap over images: equal to evaluating the data sets that it stands for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from utils.metrics.metrics import GroundTruth, MetricAccumulator
from utils.metrics.resampling import draw_images, image_noise, resampled_ap
from utils.types import Detections

NAMES = ("a", "b", "c")


def make_images(count: int, seed: int = 0) -> list[tuple[Detections, GroundTruth]]:
    """Images with up to three objects of two classes, found with errors, and detections of nothing; some objects are crowds."""
    generator = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(count):
        m = int(torch.randint(0, 4, (1,), generator=generator))
        xy, wh = torch.rand(m, 2, generator=generator) * 300, torch.rand(m, 2, generator=generator) * 80 + 10
        classes = torch.randint(0, 2, (m,), generator=generator)
        truth = GroundTruth.of_boxes(torch.zeros(m, dtype=torch.long), classes, torch.cat((xy, wh), dim=1).double())
        crowd = torch.rand(m, generator=generator) < 0.1
        truth = GroundTruth(truth.image, truth.classes, truth.boxes_ltwh, truth.area, crowd)
        shifted = xy + torch.randn(m, 2, generator=generator) * 4
        boxes = torch.cat((torch.cat((shifted, shifted + wh), dim=1), torch.rand(3, 4, generator=generator).cumsum(dim=1) * 100))
        scores, labels = torch.rand(m + 3, generator=generator), torch.cat((classes, torch.randint(0, 3, (3,), generator=generator)))
        images.append((Detections(boxes, scores, labels), truth))
    return images


def collect(images: list[tuple[Detections, GroundTruth]], rule: str = "coco") -> MetricAccumulator:
    metric = MetricAccumulator(NAMES, rule=rule)
    for number, (detections, truth) in enumerate(images):
        metric.update([detections], truth, images=[number])
    return metric


def test_every_resample_equals_the_evaluation_of_its_images():
    images = make_images(30)
    counts = draw_images(30, 8, seed=1)
    ap = resampled_ap(collect(images), counts)
    for row, drawn in zip(ap, counts):
        repeated = [image for image, times in zip(images, drawn) for _ in range(times)]
        np.testing.assert_allclose(row, collect(repeated).compute().ap, atol=1e-12)


def test_each_image_once_is_the_data_set_itself():
    metric = collect(make_images(20))
    ap = resampled_ap(metric, np.ones((1, 20), dtype=np.int64))
    np.testing.assert_allclose(ap[0], metric.compute().ap, atol=1e-12)


def test_noise_is_the_scatter_of_data_sets_of_this_size():
    """Against the scatter of mAP over independent data sets of the same kind and size."""
    independent = [collect(make_images(40, seed)).compute().map for seed in range(25)]
    noise = np.mean([image_noise(collect(make_images(40, seed)), resamples=60)["metrics/mAP_0.5:0.95"] for seed in range(3)])
    assert 0.6 < noise / np.std(independent, ddof=1) < 1.6


def test_the_draw_depends_on_the_seed_alone():
    metric = collect(make_images(10))
    assert image_noise(metric, resamples=20) == image_noise(metric, resamples=20)
    assert image_noise(metric, resamples=20) != image_noise(metric, resamples=20, seed=1)


@pytest.mark.parametrize("images", [[], make_images(1)])
def test_too_few_images_have_no_noise(images):
    assert image_noise(collect(images)) == {}


def test_other_rules_and_images_without_objects_are_ordinary():
    assert image_noise(collect(make_images(10), rule="yolov5")) == {}
    nothing = (Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long)), make_images(1)[0][1])
    empty = GroundTruth.of_boxes(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0, 4).double())
    assert image_noise(collect([(nothing[0], empty)] * 3)) == {}
