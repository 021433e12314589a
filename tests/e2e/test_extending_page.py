"""docs/extending.md, literally: one test a section, which writes the section's file and runs its commands as they stand on the page."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest

from models.checkpoints.checkpoint import load_checkpoint
from tests.tiny import tiny_checkpoint
from tests.tiny_training import make_world

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Section:
    """One worked example of the page."""

    text: str

    @property
    def file_name(self) -> str:
        """Of the user's file: the first one that the section names."""
        match = re.search(r"`(\w+\.py)`", self.text)
        assert match is not None
        return match[1]

    def block(self, language: str) -> str:
        (code,) = re.findall(rf"```{language}\n(.*?)```", self.text, flags=re.S)
        return code

    @property
    def lines_written(self) -> int:
        """As the page claims."""
        match = re.search(r"Lines\s+written: (\d+)", self.text)
        assert match is not None
        return int(match[1])


def section(title: str) -> Section:
    """What stands below a heading of the page."""
    (text,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, flags=re.S | re.M)
    return Section(text)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder in which the project lies, with a training run, an image and a data set of a few images."""
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name != "runs":
            (tmp_path / entry.name).symlink_to(entry)
    tiny_checkpoint(tmp_path / "runs/train/exp/weights/best.pt")
    (tmp_path / "photos").mkdir()
    cv2.imwrite(str(tmp_path / "photos/one.png"), np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    make_world(tmp_path)
    (tmp_path / "data.yaml").rename(tmp_path / "mine.yaml")
    return tmp_path


def run_section(example: Section, clone: Path) -> list[str]:
    """Writes the section's file and runs its commands; returns the output of each."""
    (clone / example.file_name).write_text(example.block("python"), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": "", "PYTEST_ADDOPTS": "-p no:cacheprovider"}
    outputs = []
    for line in example.block("bash").splitlines():
        command = line.replace("python ", f"{shlex.quote(sys.executable)} ", 1) if line.startswith("python ") else line
        done = subprocess.run(["bash", "-c", command], cwd=clone, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        outputs.append(done.stdout)
    return outputs


def test_export_format_of_the_page_works(clone):
    example = section("An export format")
    exported, detected = run_section(example, clone)
    assert re.search(r"frozen: .*best\.frozen", exported)
    assert "differs from torch by at most" in exported
    assert "one.png" in detected
    assert example.lines_written == len(example.block("python").splitlines())


def header(clone: Path, name: str) -> list[str]:
    """Names of the columns of a run's results.csv."""
    return (clone / f"runs/train/{name}/results.csv").read_text(encoding="utf-8").splitlines()[0].split(",")


def test_an_attention_block(clone):
    example = section("An attention block")
    run_section(example, clone)
    weights = load_checkpoint(clone / "runs/train/gate/weights/best.pt").weights
    assert any(name.endswith(".gate.0.weight") for name in weights)
    assert example.lines_written == len(example.block("python").splitlines())


def test_a_metric_column(clone):
    example = section("A metric column")
    run_section(example, clone)
    assert header(clone, "strict").index("metrics/mAP_0.75") == header(clone, "strict").index("metrics/mAP_0.5:0.95") + 1
    checkpoint = load_checkpoint(clone / "runs/train/strict/weights/best.pt")
    assert checkpoint.fitness == checkpoint.metrics["metrics/mAP_0.75"]
    assert example.lines_written == len(example.block("python").splitlines())


def test_a_task_has_as_many_lines_as_the_page_says():
    """Its commands are run, at greater length, by tests/e2e/test_toy_task.py."""
    example = section("A task")
    assert example.lines_written == len(example.block("python").splitlines())
