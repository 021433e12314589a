"""Every family of heads trains on data sets at the edge: one class, 500 boxes, a box that covers its image, no box at all."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import torch
import yaml

from engine.logging.callbacks import Callback
from models.checkpoints.checkpoint import load_checkpoint, load_model
from tests.image_files import write_images
from train import TrainResult, train
from utils.config import Hyperparameters, TrainConfig

BACKBONE = [[-1, 1, "Conv", [c, 3, 2]] for c in (8, 16, 16, 32)]  # strides 8 and 16 last
ANCHORS = [[8, 8, 16, 16], [28, 28, 60, 60]]
FAMILIES = {
    "v5": {"anchors": ANCHORS, "head": [[[2, 3], 1, "Detect", ["nc", "anchors"]]]},
    "v5 counted": {"anchors": 2, "head": [[[2, 3], 1, "Detect", ["nc", "anchors"]]]},
    "v7": {"anchors": ANCHORS, "head": [[[2, 3], 1, "IDetect", ["nc", "anchors"]]]},
    "v7 auxiliary": {"anchors": ANCHORS, "head": [[[2, 3, 2, 3], 1, "IAuxDetect", ["nc", "anchors"]]]},
    "v8": {"scales": {"n": [1.0, 1.0, 1024]}, "head": [[[2, 3], 1, "Detect", ["nc"]]]},
    "v9 dual": {"anchors": 3, "head": [[[2, 3, 2, 3], 1, "DualDDetect", ["nc"]]]},
    "v10": {"scales": {"n": [1.0, 1.0, 1024]}, "head": [[[2, 3], 1, "v10Detect", ["nc"]]]},
    "v26": {"scales": {"n": [1.0, 1.0, 1024]}, "end2end": True, "reg_max": 1, "head": [[[2, 3], 1, "Detect", ["nc"]]]},
}
GAINS = {"v5": {"box": 0.05, "cls": 0.5, "obj": 1.0}, "v7": {"box": 0.05, "cls": 0.3, "obj": 0.7}}
PLAIN = dict.fromkeys(("mosaic", "mixup", "copy_paste", "scale", "translate", "fliplr", "hsv_h", "hsv_s", "hsv_v"), 0.0)


class Watch(Callback):
    """Most boxes in an image that reached the loss, and how many classes there were."""

    most = 0
    labels: frozenset[float] = frozenset()

    def on_batch(self, run, epoch, iteration, batch) -> None:
        self.most = max(self.most, batch.max_boxes)
        self.labels |= set(batch.targets.rows()[:, 1].tolist())


def config_of(tmp_path, family: str, data, *, iou_loss: str = "CIoU", **flags) -> TrainConfig:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"nc": 80, "backbone": BACKBONE, **FAMILIES[family]}))
    hyp = Hyperparameters(**PLAIN, **GAINS.get(family[:2], {}), warmup_epochs=0, warmup_min_iters=0, nbs=4, iou_loss=iou_loss)
    return TrainConfig(
        cfg=str(tmp_path / "tiny.yaml"), data=str(data), hyp=hyp, imgsz=64, epochs=2, batch_size=2, workers=0, device="cpu",
        noplots=True, project=str(tmp_path / "runs"), **flags,
    )  # fmt: skip


def trained(tmp_path, family: str, data, **flags) -> tuple[TrainResult, Watch]:
    watch = Watch()
    return train(config_of(tmp_path, family, data, **flags), callbacks=[watch]), watch


class Interrupt(Callback):
    """Ctrl-C in the second epoch."""

    def on_batch(self, run, epoch, iteration, batch) -> None:
        if epoch == 1:
            raise KeyboardInterrupt


def losses_of(result: TrainResult) -> list[dict[str, float]]:
    with open(result.save_dir / "results.csv", newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if "loss" in k} for row in csv.DictReader(file)]
    assert all(math.isfinite(v) for row in rows for v in row.values())
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_one_class_with_500_boxes_and_a_full_image_box_trains(tmp_path, family):
    rng = np.random.default_rng(1)
    crowd = [(0, *rng.uniform(0.1, 0.9, 2), *rng.uniform(0.05, 0.2, 2)) for _ in range(500)]
    labels = {"train": [crowd, [(0, 0.5, 0.5, 1, 1)], [], [(0, 0.3, 0.3, 0.2, 0.2)]], "val": [crowd[:9], [(0, 0.5, 0.5, 1, 1)]]}
    result, watch = trained(tmp_path, family, write_images(tmp_path / "data", labels))
    assert watch.most == 500
    last = losses_of(result)[-1]
    assert all(last[k] > 0 for k in last if "box" in k)
    class_loss = next(v for k, v in last.items() if k == "train/cls_loss")
    assert (class_loss == 0) == family.startswith(("v5", "v7"))  # with one class, objectness says it all
    assert load_model(result.best_weights).nc == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_single_cls_trains_every_family(tmp_path, family):
    rows = [[(i % 3, 0.5, 0.5, 0.4, 0.3)] for i in range(4)]
    data = write_images(tmp_path / "data", {"train": rows, "val": rows}, names=("a", "b", "c"))
    result, watch = trained(tmp_path, family, data, single_cls=True)
    losses_of(result)
    assert watch.labels == {0.0}
    assert load_model(result.best_weights).nc == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_epoch_without_any_box_trains(tmp_path, family, capsys):
    """The one box of the set is too small to be kept when the image is loaded."""
    labels = {"train": [[], [], [], [(1, 0.5, 0.5, 0.001, 0.001)]], "val": [[(1, 0.5, 0.5, 0.4, 0.4)], []]}
    result, watch = trained(tmp_path, family, write_images(tmp_path / "data", labels, names=("a", "b")))
    assert watch.most == 0
    for row in losses_of(result):
        assert row["train/box_loss"] == 0
        assert row["train/obj_loss" if family.startswith(("v5", "v7")) else "train/cls_loss"] > 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("anchors: ")]
    assert len(lines) == family.startswith(("v5", "v7"))
    assert all("kept (0.00 anchors a box" in line for line in lines)


@pytest.mark.parametrize("family", ["v5", "v9 dual"])
def test_the_running_mean_of_a_box_loss_survives_a_resume(tmp_path, family):
    """A resumed WIoU training equals one that never stopped, which its mean of 1 − IoU is part of."""
    rows = [[(0, 0.5, 0.5, 0.4, 0.3)], [(0, 0.4, 0.6, 0.5, 0.5), (0, 0.2, 0.2, 0.3, 0.3)]] * 2
    data = write_images(tmp_path / "data", {"train": rows, "val": rows[:2]})
    config = config_of(tmp_path, family, data, iou_loss="WIoU-v3")
    whole = load_checkpoint(train(config.replace(name="whole")).last_weights).weights
    with pytest.raises(KeyboardInterrupt):
        train(config.replace(name="stopped"), callbacks=[Interrupt()])
    last = tmp_path / "runs" / "stopped" / "weights" / "last.pt"
    assert 0 < float(load_checkpoint(last).training["loss"]["mean"]) < 1
    resumed = load_checkpoint(train(TrainConfig(resume=str(last))).last_weights).weights
    assert all(torch.equal(value, whole[key]) for key, value in resumed.items())
