"""Plugins that do not do what they are meant to: one line that names the file, and nothing of it stays registered."""

from __future__ import annotations

import logging

import pytest

from models import build_model
from models.spec.registry import BLOCKS, load_plugin
from utils.errors import UserError
from utils.metrics import columns

HEAD = "from torch import nn\nfrom models.spec import channel_rules as rules\nfrom models.spec.registry import register\n"
CLASS = (
    "class {name}(nn.Module):\n    def __init__(self, channels):\n        super().__init__()\n    def forward(self, x):\n        return x\n"
)


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


def warnings_of(path, caplog) -> list[str]:
    with caplog.at_level(logging.WARNING):
        load_plugin(path)
    return [record.getMessage().removeprefix(f"--plugins {path}: ") for record in caplog.records]


@pytest.mark.parametrize(("text", "expected"), [
    ("class Mine(nn.Module):\n    pass\n", "line 1: NameError: name 'nn' is not defined; add the line: import torch.nn as nn"),
    ("import torch.nn as nn\nx = Conv(3, 8)\n", "line 2: NameError: name 'Conv' is not defined; it lives in models.layers.conv; "
     "add the line: from models.layers.conv import Conv, or from models.blocks import *"),
    ("x = autopad(3)\n", "line 1: NameError: name 'autopad' is not defined; add the line: from models.blocks import *"),
    ("import torch\nfrom models.common import Conv\n", "line 2: ModuleNotFoundError: No module named 'models.common'; YOLO's blocks "
     "come with: from models.blocks import *"),
    ("from ..modules.conv import Conv\n", "line 1: ImportError: attempted relative import with no known parent package; YOLO's blocks "
     "come with: from models.blocks import *"),
    ("import no_such_package.inner\n", "line 1: ModuleNotFoundError: No module named 'no_such_package'; pip install no_such_package, or "
     "leave it out where nothing needs it"),
    ("x = 1\ndef f(:\n    pass\n", "line 2: invalid syntax"),
    ("def f():\n    raise ValueError('two\\nlines')\n\nf()\n", "line 2: ValueError: two"),
    ("import sys\nsys.exit(3)\n", "line 2: SystemExit: 3; it may not end the program: put what runs by itself under "
     "if __name__ == '__main__':"),
])  # fmt: skip
def test_what_a_plugin_raises_is_one_line_with_its_place_and_the_remedy(tmp_path, text, expected):
    path = tmp_path / "mine.py"
    path.write_text(text)
    assert complaint(path) == f"--plugins {path}: {expected}"


def test_classes_that_nothing_registers_are_named_with_their_lines(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(HEAD + CLASS.format(name="First") + CLASS.format(name="Second"))
    assert "the classes found are First (line 4), Second (line 9); write @register" in complaint(path)


def test_a_class_without_forward_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(HEAD + registered("Odd_1").replace("def forward", "def foward"))
    assert complaint(path).endswith("line 4: class Odd_1 has no forward(self, x), did you mean its 'foward'?")
    assert "Odd_1" not in BLOCKS


def test_names_that_nothing_defines_are_named_before_anything_is_built(tmp_path, caplog):
    path = tmp_path / "mine.py"
    body = registered("Late_1").replace("        return x\n", "        return F.relu(Conv(3, 3)(x)) + mystery + [math.pi for _ in x][0]\n")
    path.write_text(HEAD + body)
    assert warnings_of(path, caplog) == [
        "line 9: nothing defines 'F'; add the line: import torch.nn.functional as F",
        "line 9: nothing defines 'Conv'; it lives in models.layers.conv; add the line: from models.layers.conv import Conv, or from "
        "models.blocks import *",
        "line 9: nothing defines 'mystery'",
        "line 9: nothing defines 'math'; add the line: import math",
    ]


def test_a_class_that_no_row_can_name_is_named_and_a_helper_is_not(tmp_path, caplog):
    path = tmp_path / "mine.py"
    whole = registered("Whole_1").replace("return x", "return Helper_1(3)(x)")
    path.write_text(HEAD + CLASS.format(name="Helper_1") + whole + CLASS.format(name="Alone_1"))
    assert warnings_of(path, caplog) == ["no row can name Alone_1: not registered, and no other class there uses it"]


PASTED = """
from models.blocks import *

class PastedBottleneck(nn.Module):
    def __init__(self, c1, c2, shortcut=True, g=1, k=(3, 3), e=0.5):
        super().__init__()
        c_ = int(c2 * e)
        self.cv1 = Conv(c1, c_, k[0], 1)
        self.conv = nn.Conv2d(c_, c2, 3, 1, autopad(3, None, 1), bias=False)
        self.drop = DropPath(0.1)

    def forward(self, x):
        return self.drop(self.conv(self.cv1(x)))

@register("C2f_Pasted", channels=rules.out_width_repeated)
class C2f_Pasted(C2f):
    def __init__(self, c1, c2, n=1, shortcut=False, g=1, e=0.5):
        super().__init__(c1, c2, n, shortcut, g, e)
        self.m = nn.ModuleList(PastedBottleneck(self.c, self.c, shortcut, g, k=(3, 3), e=1.0) for _ in range(n))

@register("C3_Pasted", channels=rules.out_width_repeated)
class C3_Pasted(C3):
    def __init__(self, c1, c2, n=1, shortcut=True, g=1, e=0.5):
        super().__init__(c1, c2, n, shortcut, g, e)
        c_ = int(c2 * e)
        self.m = nn.Sequential(*(Bottleneck(c_, c_, shortcut, g, e=1.0) for _ in range(n)))
"""


def test_pasted_classes_find_the_blocks_that_they_assume(tmp_path, caplog):
    path = tmp_path / "pasted.py"
    path.write_text(PASTED)
    assert warnings_of(path, caplog) == []
    rows = [[-1, 1, "Conv", [16, 3, 2]], [-1, 2, "C2f_Pasted", [16]], [-1, 1, "C3_Pasted", [16]]]
    model = build_model({"nc": 2, "backbone": rows, "head": [[[1, 2], 1, "DDetect", ["nc"]]]}, plugins=[path])
    assert type(model.model[1]).__name__ == "C2f_Pasted"


def test_an_error_within_a_plugins_class_names_its_line(tmp_path):
    path = tmp_path / "faulty.py"
    path.write_text(HEAD + registered("Faulty_1").replace("return x", "return x + self.gain"))
    rows = [[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Faulty_1", []]]
    with pytest.raises(UserError) as caught:
        build_model({"nc": 2, "backbone": rows, "head": [[[1], 1, "DDetect", ["nc"]]]}, plugins=[path])
    assert "row 1 [Faulty_1]: fails on input" in str(caught.value)
    assert "has no attribute 'gain' (faulty.py, line 9)" in str(caught.value)


def test_every_layer_is_among_the_blocks_for_plugins():
    """Those of models/layers that are no attention; what another layer is made of is left out."""
    import models.blocks

    homes = {"models.layers.conv", "models.layers.csp", "models.layers.c3k", "models.layers.pooling", "models.layers.transformer"}
    wanted = {spec.cls.__name__ for spec in map(BLOCKS.__getitem__, BLOCKS) if getattr(spec.cls, "__module__", "") in homes}
    rare = {"Res", "CSP", "BottleneckCSPB", "BottleneckCSPC", "DownC", "Stem"}
    assert wanted - rare <= set(models.blocks.__all__)
