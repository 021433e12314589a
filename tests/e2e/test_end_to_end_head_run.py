"""Networks with a one-to-many and a one-to-one branch through train.py, val.py, detect.py and export.py."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

import detect
import export
import train
import val
from models import build_model, load_model
from models.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.export.model import load_exported
from tests.e2e.test_fake_cuda_run import gpu, waits_in_training
from tests.golden import fill_, image_array
from tests.tiny_training import config, make_world
from utils.errors import UserError
from utils.nms import Suppression

ROWS = """
nc: 80
scales: {{n: [1.0, 1.0, 1024]}}
{keys}
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 1, 1]]
  - [-1, 1, Conv, [32, 3, 2]]
head:
  - [[3, 4], 1, {head}, [nc]]
"""
FORMS = {"v10": {"keys": "", "head": "v10Detect"}, "v26": {"keys": "end2end: True\nreg_max: 1", "head": "Detect"}}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = make_world(tmp_path_factory.mktemp("world"))
    for name, form in FORMS.items():
        (root / f"tinyn-{name}.yaml").write_text(ROWS.format(**form))
    return root


@pytest.fixture(scope="module")
def weights(world, tmp_path_factory) -> Path:
    """A filled network with plain distances, whose scores differ from cell to cell."""
    model = fill_(build_model(world / "tinyn-v26.yaml", names=("dark", "bright")), 1.35)
    for tower in (*model.head.cv2, *model.head.one2one_cv2):
        torch.nn.init.constant_(tower[-1].bias, 2.0)
    path = tmp_path_factory.mktemp("run") / "best.pt"
    save_checkpoint(path, Checkpoint(cfg=model.spec.to_dict(), cfg_name="tinyn-v26.yaml", names=model.names, weights=model.state_dict()))
    return path


def lines(capsys) -> tuple[list[str], list[str]]:
    """What val.py says of all classes, and what detect.py says of each image, without the time."""
    shown = capsys.readouterr().out.splitlines()
    return [x for x in shown if x.split()[:1] == ["all"]], [x.rsplit(",", 1)[0] for x in shown if x.startswith("image ")]


def look(weights: Path, world: Path, folder: Path, capsys, *flags: str) -> tuple[list[str], list[str]]:
    common = ["--weights", str(weights), "--imgsz", "64", *flags]
    assert val.main([*common, "--data", str(world / "data.yaml"), "--workers", "0", "--project", str(folder)]) == 0
    assert detect.main([*common, "--source", str(world / "images" / "val"), "--conf-thres", "0.52", "--nosave"]) == 0
    return lines(capsys)


def test_a_flag_chooses_between_the_branches(weights, world, tmp_path, capsys):
    one, many = look(weights, world, tmp_path, capsys), look(weights, world, tmp_path, capsys, "--nms")
    assert len(one[1]) == len(many[1]) == 4
    assert one != many


@pytest.mark.parametrize("dynamic", [False, True])
def test_exported_files_hold_300_detections_and_answer_as_the_weights_do(weights, world, tmp_path, capsys, dynamic):
    copied = tmp_path / "best.pt"
    copied.write_bytes(weights.read_bytes())
    made = export.export(export.ExportConfig(weights=str(copied), imgsz=(64, 64), dynamic=dynamic))
    assert [m.file_format for m in made] == ["torchscript", "onnx"]
    images = image_array(0, (1, 3, 64, 64))
    for file in made:
        exported = load_exported(file.path, trust=True)
        (rows,) = exported.run(images)
        assert rows.shape == (1, 300, 6)
        assert exported.one_to_one
        assert exported.facts.end2end
        assert exported.predict(images).unique
    capsys.readouterr()
    ours, theirs = (look(path, world, tmp_path, capsys) for path in (weights, made[1].path))
    assert theirs[1] == ours[1]
    assert not dynamic or theirs[0] == ours[0]  # val.py gives files of fixed size square images


def test_suppression_inside_a_file_is_that_of_the_one_to_many_branch(weights, tmp_path):
    copied = tmp_path / "best.pt"
    copied.write_bytes(weights.read_bytes())
    (made,) = export.export(export.ExportConfig(weights=str(copied), imgsz=(64, 64), include=("onnx",), nms=True, conf_thres=0.52))
    exported = load_exported(made.path)
    assert not exported.one_to_one
    images = image_array(0, (1, 3, 64, 64))
    many = load_model(copied).deploy(for_suppression=True)
    wanted = many.task.postprocess(many.predict(images), Suppression(conf=0.52, iou=0.45, max_det=100))[0]
    got = exported.task.postprocess(exported.predict(images), Suppression(conf=0.52, iou=0.45, max_det=100))[0]
    assert len(got) == len(wanted) > 0
    torch.testing.assert_close(got.scores, wanted.scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("script", "extra"), [(detect, ["--source", "images/val"]), (val, ["--data", "data.yaml"])])
def test_suppression_without_a_branch_for_it_is_refused(weights, world, tmp_path, capsys, monkeypatch, script, extra):
    monkeypatch.chdir(world)
    copied = tmp_path / "best.pt"
    copied.write_bytes(weights.read_bytes())
    (made,) = export.export(export.ExportConfig(weights=str(copied), imgsz=(64, 64), include=("torchscript",)))
    capsys.readouterr()
    assert script.main(["--weights", str(made.path), "--nms", "--imgsz", "64", *extra]) == 1
    assert "holds the detections of a one-to-one branch; export it with --nms" in capsys.readouterr().err


def test_a_network_without_a_one_to_one_branch_says_so(world, tmp_path, capsys):
    result = train.train(config(world, tmp_path, epochs=1))
    capsys.readouterr()
    source = ["--source", str(world / "images" / "val"), "--imgsz", "64", "--nosave"]
    assert detect.main(["--weights", str(result.save_dir / "weights" / "last.pt"), "--nms", *source]) == 0
    assert "--nms: has no effect: without a one-to-one branch, suppression is usual for" in capsys.readouterr().out


@pytest.mark.parametrize(("form", "optimizer"), [("v10", "SGD"), ("v26", "SGD"), ("v26", "MuSGD")])
@pytest.mark.usefixtures("same_kernels")
def test_a_step_on_the_fake_device_waits_for_nothing(world, tmp_path, form, optimizer):
    given = {"cfg": world / f"tinyn-{form}.yaml", "optimizer": optimizer, "epochs": 2, "amp": "off", "deterministic": True}

    def trained(name: str) -> dict[str, torch.Tensor]:
        result = train.train(config(world, tmp_path / name, **given))
        return load_checkpoint(result.save_dir / "weights" / "last.pt").weights

    expected = trained("cpu")
    with gpu() as seen:
        got = trained("gpu")
    tolerance = 1e-6 if optimizer == "SGD" else 1e-2  # MuSGD's products are in bfloat16 on a GPU
    assert max((got[k].double() - v.double()).abs().max() for k, v in expected.items()) < tolerance
    assert not waits_in_training(seen)
    assert not seen.nondeterministic


def test_the_weights_of_the_branches_move_with_the_epochs_also_after_a_resume(world, tmp_path, monkeypatch):
    from models.losses.end_to_end import EndToEndLoss

    seen: list[tuple[float, float]] = []
    call = EndToEndLoss.__call__

    def noted(self, output, batch):
        if output.main[0].requires_grad:
            seen.append(self.branch_weights)
        return call(self, output, batch)

    monkeypatch.setattr(EndToEndLoss, "__call__", noted)
    given = {"cfg": world / "tinyn-v10.yaml", "noval": True}
    result = train.train(config(world, tmp_path, epochs=3, **given))
    with (result.save_dir / "results.csv").open() as file:
        assert {"train/box_loss", "train/cls_loss", "train/dfl_loss"} <= set(next(csv.reader(file)))
    assert [w[0] for w in seen] == pytest.approx(np.repeat([0.8, 0.45, 0.1], 3))
    assert [sum(w) for w in seen] == pytest.approx([1.0] * 9)


def test_attention_before_the_head_and_a_frozen_backbone_train(world, tmp_path):
    given = {"attention": ("EMA@detect",), "freeze": (3,), "optimizer": "MuSGD", "lr_mult": "head=2", "epochs": 1}
    result = train.train(config(world, tmp_path, cfg=world / "tinyn-v26.yaml", **given))
    model = load_model(result.save_dir / "weights" / "last.pt")
    assert sum(plan.name == "EMA" for plan in model.plans) == 2
    assert model.predict(image_array(0, (1, 3, 64, 64))).unique


def test_a_misspelt_key_is_named(world):
    text = (world / "tinyn-v26.yaml").read_text().replace("end2end", "end2endd")
    (world / "wrongn-v26.yaml").write_text(text)
    with pytest.raises(UserError, match="'end2endd'"):
        build_model(world / "wrongn-v26.yaml")
