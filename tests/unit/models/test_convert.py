"""Checkpoints in another form: what is folded, that outputs are compared before a file is left, and that every form loads again."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from models.analysis.equivalence import FOLDED, difference, drawn_image, read_images
from models.checkpoints import convert as conversions
from models.checkpoints.checkpoint import load_checkpoint, load_model, save_checkpoint
from models.checkpoints.convert import convert, main
from models.checkpoints.safetensors_writer import write_safetensors
from models.model import Model
from tests.golden import fill_
from tests.tiny import DUAL_HEAD, tiny_checkpoint, tiny_model
from utils.errors import UserError


@pytest.fixture
def dual(tmp_path) -> Path:
    """A trained dual network with training state."""
    path = tiny_checkpoint(tmp_path / "best.pt", head=DUAL_HEAD)
    loaded = load_checkpoint(path)
    save_checkpoint(path, type(loaded)(**{**vars(loaded), "training": {"optimizer": {"state": torch.ones(1000)}}}))
    return path


def same_outputs(a: Path, b: Path, *, px: float = 1e-3, scores: float = 1e-5) -> bool:
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    first, second = (load_model(path).predict(images) for path in (a, b))
    return bool((first.boxes - second.boxes).abs().max() < px and (first.scores - second.scores).abs().max() < scores)


def test_deployed_weights_are_smaller_and_compute_the_same(dual, capsys):
    done = convert(dual, deploy=True)
    assert done.path == dual.with_name("best-deploy.pt")
    assert done.parameters[1] < done.parameters[0]
    assert done.bytes[1] < done.bytes[0]
    assert same_outputs(dual, done.path)
    loaded = load_checkpoint(done.path)
    assert loaded.training is None
    assert loaded.cfg["fused"]
    assert loaded.cfg["head"][-1][2] == "DDetect"
    assert not any(".bn." in name or ".conv1." in name for name in loaded.weights)
    assert "M parameters to" in str(done)
    assert "on 3 random and 1 real images" in str(done)


def test_deployed_weights_deploy_and_convert_again(dual):
    once = convert(dual, deploy=True).path
    twice = convert(once, deploy=True).path
    first, second = load_checkpoint(once), load_checkpoint(twice)
    assert first.cfg == second.cfg
    assert all(torch.equal(first.weights[k], v) for k, v in second.weights.items())


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_safetensors_round_trip(dual, deploy, half):
    done = convert(dual, deploy=deploy, half=half, to_safetensors=True)
    assert done.path.suffix == ".safetensors"
    loaded, model = load_checkpoint(done.path), load_model(dual)
    assert (loaded.names, loaded.cfg_name) == (model.names, "tiny.yaml")
    assert load_model(done.path).spec.to_dict() == (model.deploy() if deploy else model).spec.to_dict()
    assert same_outputs(dual, done.path, px=8.0 if half else 1e-3, scores=2e-2 if half else 1e-5)


def test_safetensors_package_reads_the_file(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b.c": torch.tensor(3), "half": torch.ones(3).half(), "none": torch.zeros(0, 4)}
    tensors |= {"yes": torch.tensor([True])}
    write_safetensors(tmp_path / "x.safetensors", tensors, {"format": "pt", "names": "[1]"})
    read = safetensors.load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in tensors.items())
    data = (tmp_path / "x.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    assert json.loads(data[8 : 8 + length])["__metadata__"]["format"] == "pt"


def test_half_precision_halves_the_file_and_leaves_anchors(tmp_path):
    path = tiny_checkpoint(tmp_path / "best.pt")
    done = convert(path, half=True)
    assert done.bytes[1] < 0.62 * done.bytes[0]
    assert {v.dtype for v in load_checkpoint(done.path).weights.values() if v.is_floating_point()} == {torch.float16}
    assert conversions._halved("model.4.anchors", torch.ones(2)).dtype == torch.float32
    assert next(load_model(done.path).parameters()).dtype == torch.float32


def test_only_the_training_state_is_stripped(dual):
    done = convert(dual, strip_optimizer=True)
    before, after = load_checkpoint(dual), load_checkpoint(done.path)
    assert (before.training is None, after.training) == (False, None)
    assert before.cfg == after.cfg
    assert all(torch.equal(before.weights[k], v) for k, v in after.weights.items())


def test_plain_copy_keeps_all_entries(dual, tmp_path):
    done = convert(dual, out=tmp_path / "copy.pt")
    assert load_checkpoint(done.path).training is not None


def test_differing_outputs_leave_no_file(dual, monkeypatch):
    real = conversions._halved
    monkeypatch.setattr(conversions, "_halved", lambda name, value: real(name, value) * (2 if name == "model.0.conv.weight" else 1))
    with pytest.raises(UserError, match=r"best-half\.pt: not written, the outputs are not those of .*best\.pt: raw maps differ"):
        convert(dual, half=True)
    assert [p.name for p in dual.parent.iterdir()] == ["best.pt"]


def test_float16_overflow_is_detected(tmp_path):
    path = tiny_checkpoint(tmp_path / "best.pt")
    loaded = load_checkpoint(path)
    loaded.weights["model.0.conv.weight"].mul_(1e7)
    loaded.weights["model.0.bn.running_mean"].mul_(1e7)
    loaded.weights["model.0.bn.running_var"].mul_(1e14)
    save_checkpoint(path, loaded)
    with pytest.raises(UserError, match="not written"):
        convert(path, half=True)


def test_full_disk_keeps_the_old_file(dual, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="No space left on device"):
        convert(dual, to_safetensors=True)
    assert [p.name for p in dual.parent.iterdir()] == ["best.pt"]


def test_given_images_are_used_for_the_check(dual, tmp_path):
    folder = tmp_path / "größe"
    folder.mkdir()
    for i in range(2):
        (folder / f"{i}.png").write_bytes(cv2.imencode(".png", np.full((40, 70, 3), 90 * i, np.uint8))[1].tobytes())
    assert convert(dual, deploy=True, images=[folder]).difference.real == 2
    (folder / "0.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"0\.png: not an image"):
        convert(dual, deploy=True, images=[folder / "0.png"])
    (folder / "none").mkdir()
    with pytest.raises(UserError, match="a folder without images"):
        convert(dual, deploy=True, images=[folder / "none"])


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_check_images_match_the_network_channels(channels):
    model = tiny_model()
    model.spec = type(model.spec)(**{**vars(model.spec), "ch": channels})
    (image,) = read_images(model, [])
    assert image.shape == (1, channels, 320, 320)
    assert 0 <= image.min() < image.max() <= 1


@pytest.mark.parametrize(("trained", "side"), [(64, 64), (100, 128), (1280, 320), (None, 320), ("all", 320)])
def test_images_are_no_larger_than_those_of_the_training(tmp_path, monkeypatch, trained, side):
    path = tiny_checkpoint(tmp_path / "best.pt")
    loaded = load_checkpoint(path)
    save_checkpoint(path, type(loaded)(**{**vars(loaded), "config": {"imgsz": trained}}))
    seen = set()
    real = Model.forward
    monkeypatch.setattr(Model, "forward", lambda self, x: seen.add(x.shape[2:]) or real(self, x))
    convert(path, deploy=True)
    assert max(max(shape) for shape in seen) == side


def test_drawn_check_image_has_edges():
    assert drawn_image().shape == (300, 400, 3)
    assert np.array_equal(drawn_image(), drawn_image())
    assert drawn_image().std() > 30


def test_output_difference_is_detected():
    a, b = tiny_model(), tiny_model()
    assert difference(a, b, inputs=[], allowed=FOLDED).boxes_px == 0.0
    b.model[0].conv.weight.data[0] *= 1.01
    assert not difference(a, b, inputs=[], allowed=FOLDED).holds
    fill_(b, 1.35).model[0].conv.weight.data.fill_(float("nan"))
    assert not difference(a, b, inputs=[], allowed=FOLDED).holds
    assert not difference(a, tiny_model(("one",)), inputs=[], allowed=FOLDED).holds


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "nothing to do; give --deploy"),
        (["--to-safetensors", "--out", "x.pt"], "belong together"),
        (["--deploy", "--out", "x.safetensors"], "belong together"),
        (["--deploy", "--out", "nowhere/x.pt"], "there is no folder nowhere"),
    ],
)
def test_unsuitable_requests_are_refused(dual, flags, says, monkeypatch, capsys):
    monkeypatch.chdir(dual.parent)
    assert main(["best.pt", *flags]) == 1
    assert says in capsys.readouterr().err


def test_command_line_reports_its_actions(dual, capsys):
    main([str(dual), "--deploy", "--half"])
    said = capsys.readouterr().out
    assert "best-deploy-half.pt: " in said
    assert "checked: raw maps differ by" in said
