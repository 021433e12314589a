"""The layout of COCO's archives through training and validation, down to the file that COCO's server takes."""

from __future__ import annotations

import json

import pytest

import train
import val
from tests.coco_layout import coco_names, write_coco_layout
from tests.tiny import tiny_checkpoint
from tests.tiny_training import TINY, config
from utils.metrics.coco_eval import COCO_CATEGORY_IDS
from utils.metrics.metrics import COCO_STATS


@pytest.mark.slow
def test_training_and_validation_work_on_coco_json_only(tmp_path, capsys):
    yaml_path = write_coco_layout(tmp_path / "coco")
    (tmp_path / "tiny-v9.yaml").write_text(TINY.format(block="Conv, [16, 1, 1]"))
    train.train(config(tmp_path, tmp_path / "runs", data=str(yaml_path), cfg=str(tmp_path / "tiny-v9.yaml"), epochs=1))
    out = capsys.readouterr().out
    assert "train: labels from" in out
    assert "train: 6 images, 10 objects, 1 images without objects, 0 images left out" in out


def test_val_prints_the_twelve_numbers_and_writes_coco_ids(tmp_path, capsys):
    yaml_path = write_coco_layout(tmp_path / "coco")
    weights = tiny_checkpoint(tmp_path / "tiny.pt", coco_names())
    flags = ["--weights", weights, "--data", yaml_path, "--img", 64, "--batch-size", 2, "--workers", 0, "--device", "cpu"]
    flags += ["--project", tmp_path / "runs", "--name", "coco", "--save-json", "--conf-thres", 0.0001]
    assert val.main([str(f) for f in flags]) == 0
    out = capsys.readouterr().out
    (line,) = [text for text in out.splitlines() if text.startswith("pycocotools: ")]
    assert [entry.rpartition(" ")[0] for entry in line.removeprefix("pycocotools: ").split(", ")] == list(COCO_STATS)
    assert len(COCO_STATS) == 12
    found = json.loads((tmp_path / "runs/coco/tiny_predictions.json").read_text())
    assert found
    assert {f["category_id"] for f in found} <= set(COCO_CATEGORY_IDS)
    assert max(f["category_id"] for f in found) > 79  # COCO's ids, not class numbers
    assert {f["image_id"] for f in found} <= set(range(400, 404))
    assert sorted(found[0]) == ["bbox", "category_id", "image_id", "score"]


@pytest.mark.parametrize("crowded", [True, False])
def test_detections_in_crowds_are_ignored(tmp_path, crowded):
    """The same answer scores perfectly with the crowd region in the file, and not without it."""
    import torch

    from tests.coco_layout import edit_json
    from utils.metrics.coco_eval import read_instances
    from utils.metrics.metrics import MetricAccumulator
    from utils.types import Detections

    write_coco_layout(tmp_path / "coco")
    path = tmp_path / "coco/annotations/instances_val2017.json"

    def one_person(content):
        crowd = content["annotations"][-1]
        person = {**crowd, "id": 1, "bbox": [1, 1, 20, 20], "area": 400, "iscrowd": 0}
        content["annotations"] = [person] + [crowd] * crowded

    edit_json(path, one_person)
    annotations = read_instances(path, coco_names())
    accumulator = MetricAccumulator(coco_names())
    boxes = torch.tensor([[30.0, 30.0, 50.0, 50.0], [1.0, 1.0, 21.0, 21.0]])
    found = [Detections(boxes, torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.long))]
    name = "000000000400.jpg"
    accumulator.update(found, annotations.truth_of([name]), images=annotations.ids_of([name]))
    assert accumulator.compute().map50 == pytest.approx(1.0 if crowded else 0.5, abs=5e-3)


def test_validation_between_epochs_ignores_crowds_too(tmp_path, monkeypatch):
    """A network that finds every object, and with more certainty things in the crowd region, is perfect."""
    import torch

    from engine.training.setup.build import build_run
    from engine.training.setup.config import resolve_config
    from utils.types import Detections

    yaml_path = write_coco_layout(tmp_path / "coco")
    (tmp_path / "tiny-v9.yaml").write_text(TINY.format(block="Conv, [16, 1, 1]"))
    given = config(tmp_path, tmp_path / "runs", data=str(yaml_path), cfg=str(tmp_path / "tiny-v9.yaml"), batch_size=2)
    run = build_run(*resolve_config(given), torch.device("cpu"))
    content = json.loads((tmp_path / "coco/annotations/instances_val2017.json").read_text())
    shown = iter(run.loaders.val)

    def answers(predictions, suppression):
        batch, found = next(shown), []
        for path, scale, pad in zip(batch.paths, batch.letterbox.scale_xy, batch.letterbox.pad_xy):
            mine = [a for a in content["annotations"] if path.endswith(f"{a['image_id']:012d}.jpg")]
            rows = [[*a["bbox"], COCO_CATEGORY_IDS.index(a["category_id"]), 0.8] for a in mine if not a["iscrowd"]]
            rows = [[x, y, 9.0, 9.0, 0, 0.9] for a in mine if a["iscrowd"] for x, y in ((50, 1), (1, 50))] + rows
            known = torch.tensor(rows).view(-1, 6)
            corners = torch.cat((known[:, :2], known[:, :2] + known[:, 2:4]), 1) * scale.repeat(2) + pad.repeat(2)
            found.append(Detections(corners, known[:, 5], known[:, 4].long()))
        return found

    monkeypatch.setattr("tasks.detect.non_max_suppression", answers)
    metrics = train.validate(run)
    assert metrics.map == pytest.approx(1.0, abs=1e-6)
    assert metrics.confusion[:, -1].sum() == 0
