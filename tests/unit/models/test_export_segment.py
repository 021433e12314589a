"""Exported segmentation networks: rows or candidates, and prototypes, which come back as the predictions of torch."""

from __future__ import annotations

import pytest
import torch

from models import build_model
from models.export.exporting import export_model
from models.export.model import load_exported
from models.export.source import ExportOptions
from tests.foreign_models import randomize_
from utils.nms import MOST_UNIQUE

SIZE = (64, 96)


@pytest.mark.parametrize("name", ["yolov8n-seg", "yolo26n-seg"])
@torch.no_grad()
def test_a_traced_file_gives_masks_coefficients_and_prototypes(tmp_path, name):
    torch.manual_seed(0)
    model = randomize_(build_model(f"{name}.yaml", nc=2)).eval()
    path = tmp_path / "net.torchscript"
    assert export_model(model, "torchscript", path, ExportOptions(imgsz=SIZE)).holds
    opened, images = load_exported(path), torch.rand(1, 3, *SIZE)
    found, wanted = opened.predict(images), model.deploy().predict(images)
    assert opened.task.name == "segment"
    assert torch.allclose(found.shared["prototypes"], wanted.shared["prototypes"], atol=1e-4)
    assert found.unique is (name == "yolo26n-seg")
    if found.unique:  # the best of all candidates, in order
        assert found.fields["coefficients"].shape == (1, MOST_UNIQUE, 32)
        score = wanted.scores.amax()
        assert float(found.scores[0, 0].amax()) == pytest.approx(float(score), abs=1e-5)
        away = (wanted.fields["coefficients"][0] - found.fields["coefficients"][0, 0]).abs().amax(dim=1)
        assert float(away.min()) < 1e-4, "the best row has the coefficients of one of the candidates"
    else:
        assert torch.allclose(found.fields["coefficients"], wanted.fields["coefficients"], atol=1e-4)
        assert torch.allclose(found.boxes, wanted.boxes, atol=1e-3)
