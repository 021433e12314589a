"""Receptive fields: those of convolutions by their formula, those of global modules the whole input."""

from __future__ import annotations

import pytest
import torch

from engine.explain.fields import field_figure, field_lines
from models import build_model
from models.analysis.receptive_field import receptive_fields, theoretical_limits
from tests.golden import image_array
from tests.tiny import tiny_model

HEAD = [[2, 3, 4], 1, "DDetect", ["nc"]]


def plain_model(extra: list) -> torch.nn.Module:
    """Four 3x3 convolutions of stride 2, another row, and a head."""
    rows = [[-1, 1, "Conv", [8, 3, 2]] for _ in range(4)]
    return build_model({"nc": 2, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": 3, "backbone": [*rows, extra], "head": [HEAD]})


@pytest.mark.parametrize(
    ("extra", "sides"),
    [
        (["-1", 1, "Conv", [8, 1, 1]], [3, 7, 15, 31, 31]),
        ([-1, 1, "Conv", [8, 3, 1]], [3, 7, 15, 31, 63]),
        ([-1, 1, "SPPELAN", [8, 8]], [3, 7, 15, 31, 31 + 12 * 16]),  # three maxima over 5 x 5 in a row
    ],
)
def test_theoretical_field_of_convolutions_follows_the_formula(extra, sides):
    extra = [-1, *extra[1:]]
    limits = theoretical_limits(plain_model(extra), range(5), (512, 512))
    assert [limit[1] - limit[0] + 1 for limit in limits] == sides
    assert [limit[3] - limit[2] + 1 for limit in limits] == sides


@pytest.mark.parametrize("name", ["SE", "MHSA", "FocalModulation"])
def test_global_modules_see_the_whole_input(name):
    (field,) = receptive_fields(plain_model([-1, 1, name, []]), [torch.rand(1, 3, 128, 160)], [4])
    assert field.whole_input
    assert field.theoretical_hw == (128, 160)


@pytest.mark.parametrize(
    ("hw", "clipped", "says"),
    [
        ((128, 160), (False, False), "63x63 px"),
        ((48, 160), (True, False), "height at least 48 px, width 63 px"),
        ((160, 48), (False, True), "height 63 px, width at least 48 px"),
        ((64, 64), (True, True), "at least 63x63 px"),  # touches the border: what lies beyond is not known
        ((32, 32), (True, True), "at least the whole input, 32x32 px"),
    ],
)
def test_a_side_that_the_border_cuts_off_is_a_least_one(hw, clipped, says):
    """Four convolutions of stride 2 and one more: 63 px."""
    model = plain_model([-1, 1, "Conv", [8, 3, 1]])
    (field,) = receptive_fields(model, [torch.rand(1, 3, *hw)], [4])
    assert field.clipped_hw == clipped
    assert field_lines(model, [field])[0].partition("theoretical ")[2].startswith(f"{says}, effective")
    assert field_figure(model, [field], images=1).axes


def test_effective_field_lies_in_the_theoretical_one():
    model = tiny_model()
    images = [image_array(i, (1, 3, 256, 256)) for i in range(2)]
    fields = receptive_fields(model, images, [1, 3])
    for field in fields:
        assert field.effective.max() == pytest.approx(1.0)
        assert not field.whole_input
        rows = field.effective.sum(1).nonzero().flatten()
        assert int(rows[-1] - rows[0]) + 1 <= field.theoretical_hw[0]
        sides = list(field.sides_px.values())
        assert sides == sorted(sides)
        assert sides[0] >= 1
        assert all(abs(value - 128) < 40 for value in field.middle_yx)


def test_nothing_of_the_network_changes():
    model = tiny_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    receptive_fields(model, [torch.rand(1, 3, 64, 64)], [3])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
