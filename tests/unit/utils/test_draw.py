"""Boxes on images and the images of a run: that something legible comes out, at any size and with nothing to show."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from engine.logging.batch_images import save_batch_image
from tasks import DETECT
from tests.unit.utils.test_metrics import hard_case
from utils.errors import UserError
from utils.metrics.metrics import MetricAccumulator
from utils.types import Batch, Detections, Letterbox, Targets
from utils.visual.draw import colour_of, default_thickness, draw_boxes, draw_detections, text_width
from utils.visual.plots import as_rgb, plot_confusion, plot_curves, plot_labels, plot_results

NAMES = ("cell", "größe", "x")
NONE = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))
ONE = Detections(torch.tensor([[20.0, 30.0, 60.0, 90.0]]), torch.tensor([0.5]), torch.tensor([0]))


def blank(h: int = 120, w: int = 160) -> np.ndarray:
    return np.zeros((h, w, 3), dtype=np.uint8)


def read(path: Path) -> np.ndarray:
    image = cv2.imread(str(path))
    assert image is not None, f"{path} is no image"
    return image


def test_draws_on_a_copy_in_the_colour_of_the_class() -> None:
    image = blank()
    drawn = draw_detections(image, ONE, NAMES, line_thickness=3)
    assert not image.any()
    assert tuple(drawn[90, 40]) == colour_of(0)
    assert not drawn[60, 40].any()


def test_labels_and_confidence_can_be_hidden() -> None:
    full, name_only, box_only = (draw_detections(blank(), ONE, NAMES, **o) for o in ({}, {"hide_conf": True}, {"hide_labels": True}))
    painted = [int(d.any(axis=2).sum()) for d in (full, name_only, box_only)]
    assert painted[0] > painted[1] > painted[2] > 0


def test_no_detection_leaves_the_image_unchanged() -> None:
    assert not draw_detections(blank(), NONE, NAMES).any()


@pytest.mark.parametrize("box", [(-500, -500, 900, 900), (0, 0, 0, 0), (150, 110, 400, 400), (-50, 5, -20, 9), (float("nan"), 0, 5, 1e9)])
@pytest.mark.parametrize("name", ["cell", "größe 漢", "a very long name that cannot fit into the image at all"])
def test_boxes_outside_the_image_are_drawn_without_error(box: tuple[float, ...], name: str) -> None:
    image = blank()
    draw_boxes(image, np.array([box]), [name], [3])
    assert image.shape == (120, 160, 3)


@pytest.mark.parametrize("name", ["cell", "größe"])
def test_label_stays_in_the_image(name: str) -> None:
    """A box in the right upper corner: the label moves left and down, and is as wide as elsewhere."""
    image = blank()
    draw_boxes(image, np.array([[150.0, 0.0, 159.0, 10.0]]), [name], [0], line_thickness=2)
    columns = np.flatnonzero((image == colour_of(0)).all(axis=2).any(axis=0))
    assert columns.min() <= 160 - text_width(name, 10)


def test_colours_differ_and_lines_grow_with_the_image() -> None:
    assert len({colour_of(i) for i in range(80)}) == 80
    assert default_thickness((100, 100)) == 2
    assert default_thickness((2000, 4000)) == 9


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_any_image_becomes_rgb(channels: int, dtype: torch.dtype) -> None:
    full = {torch.uint8: 255, torch.uint16: 65535, torch.float32: 1}[dtype]
    image = torch.full((channels, 4, 6), full, dtype=torch.float32).to(dtype)
    found = as_rgb(image)
    assert found.shape == (4, 6, 3)
    assert found.dtype == np.uint8
    assert (found == 255).all()


def batch_of(images: torch.Tensor, targets: Targets) -> Batch:
    count = len(images)
    letterbox = Letterbox(torch.zeros(count, 2), torch.ones(count, 2), torch.zeros(count, 2))
    return Batch(images, targets, tuple(f"dir/image{i}.jpg" for i in range(count)), letterbox, 2)


@pytest.mark.parametrize(("count", "tiles"), [(1, (1, 1)), (3, (2, 2)), (20, (4, 4))])
def test_batch_mosaic(tmp_path: Path, count: int, tiles: tuple[int, int]) -> None:
    targets = Targets.of_rows(torch.tensor([[0, 0, 0.5, 0.5, 0.4, 0.4], [0, 1, 0.2, 0.2, 0.1, 0.1]]))
    batch = batch_of(torch.zeros(count, 3, 64, 96, dtype=torch.uint8), targets)
    path = tmp_path / "größe 1.jpg"
    save_batch_image(path, batch, DETECT, NAMES)
    h, w = read_unicode(path).shape[:2]
    assert w == 320 * tiles[1]
    assert h == round(320 * 64 / 96) * tiles[0]
    save_batch_image(tmp_path / "pred.jpg", batch, DETECT, NAMES, detections=[ONE] * count)
    assert read(tmp_path / "pred.jpg").max() > 100


def test_empty_batch_is_drawn(tmp_path: Path) -> None:
    batch = batch_of(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), Targets.empty())
    save_batch_image(tmp_path / "a.jpg", batch, DETECT, NAMES)
    save_batch_image(tmp_path / "b.jpg", batch, DETECT, NAMES, detections=[NONE, NONE])
    np.testing.assert_array_equal(read(tmp_path / "a.jpg"), read(tmp_path / "b.jpg"))


@pytest.mark.parametrize("metrics", [hard_case(0, images=10), MetricAccumulator(["class"] * 40)])
def test_curves_and_confusion(tmp_path: Path, metrics: MetricAccumulator) -> None:
    result = metrics.compute()
    plot_curves(result, tmp_path)
    plot_confusion(result.confusion, result.names, tmp_path / "confusion_matrix.png")
    for name in ("PR_curve", "P_curve", "R_curve", "F1_curve", "confusion_matrix"):
        assert min(read(tmp_path / f"{name}.png").shape[:2]) > 500


@pytest.mark.parametrize("labels", [[], [np.array([[0, 0.5, 0.5, 0.2, 0.2], [2, 0.1, 0.1, 0.1, 0.1]])], [np.zeros((0, 5))] * 2])
def test_labels_image(tmp_path: Path, labels: list[np.ndarray]) -> None:
    plot_labels(labels, NAMES, tmp_path / "labels.jpg")
    assert read(tmp_path / "labels.jpg").shape == (1280, 1432, 3)


def test_results_image(tmp_path: Path) -> None:
    table = tmp_path / "results.csv"
    header = "epoch, train/box_loss,metrics/precision,metrics/recall,metrics/mAP_0.5,val/box_loss"
    table.write_text("\n".join([header, *(f"{i},{1 / (i + 1)},0.5,,nonsense,0.1" for i in range(8))]))
    plot_results(table, tmp_path / "results.png")
    assert read(tmp_path / "results.png").shape[1] > 1000
    table.write_text(header)
    with pytest.raises(UserError, match="no rows"):
        plot_results(table, tmp_path / "results.png")


def read_unicode(path: Path) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    return image
