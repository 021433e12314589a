"""Training, validation and detection on a fake CUDA device (tests/fake_cuda.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import detect
import train
import val
from models.checkpoints.checkpoint import load_checkpoint
from tests.fake_cuda import GPU, DeviceRecord, fake_cuda
from tests.tiny import tiny_checkpoint
from tests.tiny_training import TINY, config, make_world
from utils import distributed
from utils.errors import UserError

STEP = ("engine/training/step.py",)
LOGGING = ("engine/logging/progress.py", "engine/training/nonfinite_guard.py")  # read the losses every so many iterations
PUTS = """
import torch
from torch import nn
from models.spec import channel_rules as rules
from models.spec.registry import register

class Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clone().put_(torch.tensor([0, 0]), torch.zeros(2))

@register("PutsForTests", channels=rules.keep_width)
class PutsForTests(nn.Module):
    def forward(self, x):
        return Through.apply(x)
"""
DUAL, PLAIN = "[[3, 4, 3, 4], 1, DualDDetect, [nc]]", "[[3, 4], 1, Detect, [nc]]"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def _ordinary_kernels_afterwards():
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def gpu() -> Iterator[DeviceRecord]:
    """Makes the fake device the default of ``select_device``."""
    with pytest.MonkeyPatch.context() as patch, fake_cuda(patch) as seen:
        patch.setattr(distributed, "select_device", lambda name="": GPU)
        yield seen


def waits_in_training(seen: DeviceRecord) -> set[str]:
    """Waits below the lines of a training step, whatever file they are in; copies with them."""
    waits = (wait for wait in (*seen.syncs, *seen.copies) if not wait.split(" < ")[0].split()[-1].startswith("tests/"))
    return {wait for wait in waits if any(file in wait for file in STEP) and not any(file in wait for file in LOGGING)}


def trained(world: Path, folder: Path, **changes) -> dict[str, torch.Tensor]:
    result = train.train(config(world, folder, epochs=2, amp="off", **changes))
    return load_checkpoint(result.save_dir / "weights" / "last.pt").weights


@pytest.mark.parametrize(("block", "head"), [("FocalModulation, []", DUAL), ("BRA, []", PLAIN), ("NLBlockND, []", PLAIN)])
@pytest.mark.usefixtures("same_kernels")
def test_training_on_the_fake_device_gives_the_cpu_weights(world, tmp_path, block, head):
    cfg = tmp_path / "tiny-v9.yaml"
    cfg.write_text(TINY.format(block=block).replace("[[3, 4], 1, DDetect, [nc]]", head))
    expected = trained(world, tmp_path / "cpu", cfg=cfg, deterministic=True)
    with gpu() as seen:
        got = trained(world, tmp_path / "gpu", cfg=cfg, deterministic=True)
    assert max((got[k].double() - v.double()).abs().max() for k, v in expected.items()) < 3e-6
    assert not waits_in_training(seen)
    assert not seen.nondeterministic


def test_detection_and_validation_on_the_fake_device_equal_the_cpu(world, tmp_path, capsys):
    weights = tiny_checkpoint(tmp_path / "tiny.pt", names=("dark", "bright"))
    found = ["--weights", str(weights), "--source", str(world / "images" / "val"), "--imgsz", "64", "--conf-thres", "0.01", "--nosave"]
    measured = ["--weights", str(weights), "--data", str(world / "data.yaml"), "--imgsz", "64", "--workers", "0"]

    def lines() -> list[str]:
        for look in ([], ["--augment"], ["--slice", "48"]):
            assert detect.main([*found, *look]) == 0
        assert val.main([*measured, "--project", str(tmp_path)]) == 0
        shown = capsys.readouterr().out.splitlines()
        return [line.rsplit(",", 1)[0] for line in shown if line.startswith("image ")] + [x for x in shown if x.split()[:1] == ["all"]]

    expected = lines()
    with gpu():
        assert lines() == expected
    assert len(expected) == 3 * 4 + 1


def test_kernel_without_a_deterministic_form_gives_one_line(world, tmp_path):
    (tmp_path / "puts.py").write_text(PUTS)
    (tmp_path / "puts-v9.yaml").write_text((world / "tiny-v9.yaml").read_text().replace("Conv, [16, 1, 1]", "PutsForTests, []"))
    given = {"cfg": tmp_path / "puts-v9.yaml", "plugins": (tmp_path / "puts.py",)}
    with pytest.raises(UserError, match="put_ has no deterministic form on this device: leave out --deterministic") as caught:
        trained(world, tmp_path, deterministic=True, **given)
    assert "\n" not in str(caught.value)
    assert trained(world, tmp_path, **given)
