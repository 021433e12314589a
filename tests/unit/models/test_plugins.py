"""Plugins that do not do what they are meant to: one line that names the file, and nothing of it stays registered."""

from __future__ import annotations

import logging

import pytest

from models.spec.registry import BLOCKS, load_plugin
from utils.errors import UserError
from utils.metrics import columns

HEAD = "from torch import nn\nfrom models.spec import channel_rules as rules\nfrom models.spec.registry import register\n"
CLASS = "class {name}(nn.Module):\n    def __init__(self, channels):\n        super().__init__()\n"


def registered(name: str) -> str:
    return f'@register("{name}", channels=rules.same_width)\n{CLASS.format(name=name)}'


def complaint(path) -> str:
    with pytest.raises(UserError) as caught:
        load_plugin(path)
    assert str(caught.value).startswith(f"--plugins {path}: ")
    return str(caught.value)


@pytest.mark.parametrize(("body", "place"), [
    (CLASS.format(name="CBAM"), "above CBAM"), ("", "above its class"), ("x = 3\n", "above its class"),
])  # fmt: skip
def test_a_plugin_that_registers_nothing_is_refused(tmp_path, body, place):
    path = tmp_path / "mine.py"
    path.write_text(HEAD + body)
    text = complaint(path)
    assert "registers nothing" in text
    assert text.endswith(f"write @register(name, channels=rules.same_width) {place}")
    complaint(path)  # again, not taken for one that is loaded


@pytest.mark.parametrize("name", ["CBAM", "BRA", "nn.Conv2d"])
def test_the_name_of_a_built_in_is_refused_for_the_file_that_takes_it(tmp_path, name):
    path, mine = tmp_path / "mine.py", f"Fresh_{name[:2].upper()}".rstrip(".")
    path.write_text(HEAD + registered(mine) + f'register("{name}", channels=rules.same_width)({mine})\n')
    text = complaint(path)
    assert f"block name {name!r} is taken by this project's own " in text
    assert "under another name" in text
    assert "row" not in text
    assert mine not in BLOCKS
    path.write_text(HEAD + registered(mine))
    assert load_plugin(path).name == "mine.py"


def test_a_class_with_a_built_ins_name_beside_a_registered_one_is_named(tmp_path, caplog):
    path = tmp_path / "two.py"
    path.write_text(HEAD + registered("Fresh_2") + CLASS.format(name="CBAM"))
    with caplog.at_level(logging.WARNING):
        load_plugin(path)
    (record,) = caplog.records
    assert record.getMessage() == f"--plugins {path}: its class CBAM is not registered: rows called CBAM build this project's own"


@pytest.mark.parametrize("body", [
    "from utils.metrics.columns import register_column\nregister_column('metrics/one_more')(lambda metrics: 0.0)\n",
    "from utils.metrics.columns import choose_best_by\nchoose_best_by({'metrics/mAP_0.5': 0.3, 'metrics/mAP_0.5:0.95': 0.7})\n",
])  # fmt: skip
def test_plugins_of_other_registries_are_no_blocks(tmp_path, body):
    tables = (columns.METRIC_COLUMNS, columns.FITNESS_WEIGHTS)
    kept = [dict(table) for table in tables]
    path = tmp_path / "columns.py"
    path.write_text(body)
    try:
        assert load_plugin(path).name == "columns.py"
    finally:
        for table, before in zip(tables, kept):
            table.clear()
            table.update(before)
