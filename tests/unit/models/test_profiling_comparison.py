"""Several networks in one table of costs: counts by formulas, attention beside the customary figure."""

from __future__ import annotations

import csv

import pytest
import torch
import yaml
from torch import nn

from models.analysis.comparison import NetworkCost, customary_multiply_adds, median_seconds
from models.analysis.operations import multiply_adds
from models.analysis.profiling import main, sort_costs
from models.spec.registry import BLOCKS
from tests.tiny import tiny_cfg


def test_customary_counts_are_those_of_the_formulas():
    network = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Flatten(2), nn.Linear(96, 5))
    pixels = 6 * 4
    expected = pixels * 8 * 2 * 9 + pixels * 8 * 6 * 4 + 6 * 96 * 5
    assert customary_multiply_adds(network, torch.zeros(1, 4, 6, 4)) == expected
    assert multiply_adds(network, torch.zeros(1, 4, 6, 4)) == expected


def test_products_of_attention_are_in_one_figure_only():
    block, x = BLOCKS["MHSA"].cls(32).eval(), torch.zeros(1, 32, 6, 10)
    assert multiply_adds(block, x) > customary_multiply_adds(block, x) > 0


def test_calls_alternate_and_are_all_timed():
    order = []
    times = median_seconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3)
    assert order == ["a", "b"] * 5
    assert all(median >= 0 and spread >= 0 for median, spread in times.values())


def test_networks_are_sorted_by_their_cost():
    small, large = (NetworkCost(n, 1, p, g, g, 1, 0.1, 0.0, 2) for n, p, g in (("a", 5, 9.0), ("b", 7, 3.0)))
    assert sort_costs([small, large], "row") == [small, large]
    assert sort_costs([small, large], "parameters") == [large, small]
    assert sort_costs([large, small], "mult-adds") == [small, large]
    assert small.fps == pytest.approx(20)


def test_the_command_prints_one_table_for_several_networks(tmp_path, capsys):
    for name, attention in (("plain", None), ("se", ("SE", []))):
        cfg = tiny_cfg(attention=attention) if attention else tiny_cfg()
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(cfg))
    files = [str(tmp_path / f"{name}.yaml") for name in ("plain", "se")]
    assert main([*files, "--imgsz", "64", "--csv", str(tmp_path / "cost.csv")]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:5] == ["model", "layers", "parameters", "GFLOPs", "customary"]
    assert head.endswith("FPS")
    assert [row.split()[0] for row in rows] == files
    with (tmp_path / "cost.csv").open(newline="") as file:
        assert [row["model"] for row in csv.DictReader(file)] == files
