"""export.py from the command line to the files beside the weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import export
from models.export.model import load_exported
from tests.tiny import NAMES, tiny_checkpoint


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("run") / "weights" / "best.pt")


def test_both_formats_are_written_beside_the_weights(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main(["--weights", str(weights), "--img", "96", "--device", "0", "--dynamic"]) == 0
    text = capsys.readouterr().out
    assert len(re.findall(r"differs from torch by at most [\d.e-]+ px", text)) == 2
    assert "--device: files are made on the CPU" in text
    for suffix in (".torchscript", ".onnx"):
        exported = load_exported(weights.with_suffix(suffix))
        assert (exported.names, exported.imgsz, exported.dynamic) == (NAMES, (96, 96), True)


def test_python_interface_and_suppression_inside(weights: Path) -> None:
    config = export.ExportConfig(weights=weights, imgsz=(64, 100), include="onnx", nms=True, topk_all=20, iou_thres=0.6, conf_thres=0.3)
    (made,) = export.export(config)
    assert made.path.name == "best-end2end.onnx"
    assert made.difference_px < 1e-3
    facts = load_exported(made.path).facts
    assert (facts.imgsz, facts.topk, facts.iou, facts.conf) == ((64, 128), 20, 0.6, 0.3)  # rounded up to the stride


def test_without_weights_the_newest_run_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export.main(["--include", "torchscript"]) == 1
    assert "train first" in capsys.readouterr().err
    tiny_checkpoint(tmp_path / "runs/train/exp/weights/best.pt")
    assert export.main(["--include", "torchscript", "--img", "64"]) == 0
    assert "taking the newest run's" in capsys.readouterr().out
    assert (tmp_path / "runs/train/exp/weights/best.torchscript").is_file()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--int8",), "--int8: .*onnxruntime.quantization"),
        (("--half",), "--half: "),
        (("--workspace", "4"), "--workspace: "),
        (("--include", "engine"), "--include engine: .*trtexec"),
        (("--include", "onnx", "openvino"), "--include openvino: "),
        (("--include", "onxn"), "did you mean 'onnx'"),
        (("--nms", "--include", "torchscript"), "--nms: "),
        (("--imgsz", "0"), "--imgsz 0"),
        (("--opset", "99"), "--opset 99"),
        (("--weights", "absent.pt"), "absent.pt: no such"),
    ],
)
def test_unsupported_requests_give_one_line(weights: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str) -> None:
    before = sorted(weights.parent.iterdir())
    assert export.main(["--weights", str(weights), "--img", "64", *flags]) == 1
    text = capsys.readouterr().err
    assert text.startswith("export.py: ")
    assert len(text.splitlines()) == 1
    assert re.search(said, text)
    assert sorted(weights.parent.iterdir()) == before


def test_unwritable_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tiny_checkpoint(tmp_path / "best.pt")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.files.os.replace", full)
    assert export.main(["--weights", str(weights), "--img", "64", "--include", "torchscript"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["best.pt"]
