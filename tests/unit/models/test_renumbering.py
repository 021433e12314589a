"""A row inserted by hand without renumbering those behind it is noticed before hours of training."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import cast

import pytest
import yaml

from data.dataset_spec import DatasetSpec
from engine.training.setup.network import build_network
from models import build_model
from models.spec.config_files import CONFIGS, find_config
from models.spec.parser import load_spec
from models.spec.planning import doubtful_rows, plan_layers
from utils.config import TrainConfig

SOME = ("yolov5s", "yolov7", "yolov7-w6", "yolov8", "yolov8-p2", "yolov9-c", "yolov9-e", "yolov8-AFPN", "yolov9-c-FocalModulation")


def doubt(cfg) -> str:
    spec = load_spec(cfg)
    return doubtful_rows(spec, plan_layers(spec))


def inserted(section: str, place: int) -> dict:
    """yolov8 with EMA behind a row, and no number changed."""
    cfg = copy.deepcopy(yaml.safe_load(find_config("yolov8.yaml")[0].read_text(encoding="utf-8")))
    cfg["scale"] = "n"
    cfg[section].insert(place, [-1, 1, "EMA", []])
    return cfg


@pytest.mark.parametrize(("section", "place", "joined"), [
    ("backbone", 5, "15 [Concat], 18 [Concat], 21 [Concat]"), ("head", 1, "15 [Concat], 18 [Concat], 21 [Concat]"),
    ("head", 7, "18 [Concat], 21 [Concat]"),
])  # fmt: skip
def test_forgotten_numbers_are_named(section, place, joined):
    text = doubt(inserted(section, place))
    assert "row(s) 22 [C2f] lead nowhere" in text
    assert f"the head reads row(s) {joined}, where a block behind it is usual" in text
    assert text.endswith("every from behind it moves by one (python -m models.edit does)")
    assert "\n" not in text


def test_a_row_that_nothing_reads_is_named():
    text = doubt(inserted("head", 12))
    assert "row(s) 22 [EMA] lead nowhere" in text
    assert "Concat" not in text


def test_training_says_it_once(tmp_path, capsys):
    path = tmp_path / "yolov8n-EMA.yaml"
    path.write_text(yaml.safe_dump(inserted("head", 12)), encoding="utf-8")
    build_network(TrainConfig(cfg=str(path)), None, cast(DatasetSpec, SimpleNamespace(nc=2, ch=3, names=("a", "b"), keypoints=None)))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: yolov8n-EMA.yaml: row(s) 22 [EMA] lead nowhere")


@pytest.mark.parametrize("name", [name for name in SOME if list(CONFIGS.rglob(f"{name}.yaml"))])
def test_published_networks_raise_no_doubt(name):
    assert doubt(name) == ""


def test_levels_in_falling_stride_are_named():
    rows = [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16, 3, 2]]]
    rising, falling = (
        build_model({"nc": 2, "backbone": rows, "head": [[sources, 1, "DDetect", ["nc"]]], "yaml_file": "mine.yaml"})
        for sources in ([0, 1, 2], [2, 0, 1])
    )
    assert rising.doubts() == []
    (line,) = falling.doubts()
    assert "row 3 [DDetect]: its levels are not in rising stride: row 2 (stride 8), row 0 (stride 2), row 1 (stride 4); " in line
    assert line.endswith("published networks and weights have the finest first: [0, 1, 2]")
