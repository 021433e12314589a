"""How far a written network may differ from its source: the usual limits, float32's own rounding where that is more, or what is given."""

from __future__ import annotations

import pytest

from models.analysis import equivalence
from models.analysis.equivalence import FOLDED, HALVED, difference
from models.checkpoints.convert import convert
from tests.tiny import tiny_checkpoint, tiny_model
from utils.errors import UserError

FOUND = [  # differences of maps, boxes and scores, float32's own rounding of them
    ((0.0, 0.0, 3e-4), (0.0, 0.0, 1e-4), True),
    ((0.0, 0.0, 3e-4), (1.0, 1.0, 5e-5), False),
    ((0.0, 0.0, 2e-2), (1.0, 1.0, 1.0), False),
    ((0.0, 3e-2, 0.0), (0.0, 1e-2, 0.0), True),
    ((5e-5, 3e-2, 3e-4), (2e-5, 1e-2, 1e-4), True),
    ((0.0, 2.0, 0.0), (1.0, 1.0, 1.0), False),
]


@pytest.mark.parametrize(("found", "rounding", "holds"), FOUND)
def test_folding_may_differ_by_the_rounding_of_float32(monkeypatch, found, rounding, holds):
    answers = iter([found] * len(equivalence.RANDOM) + [rounding] * len(equivalence.RANDOM))
    monkeypatch.setattr(equivalence, "_differences", lambda *_, **__: next(answers))
    model = tiny_model()
    assert difference(model, model, inputs=(), allowed=FOLDED).holds is holds


@pytest.mark.parametrize(("rounding", "says_why"), [((0.1, 300.0, 0.9), True), ((1e-6, 1e-3, 1e-5), False)])
def test_a_network_that_float32_itself_rounds_so_far_is_named_as_such(monkeypatch, rounding, says_why):
    answers = iter([(0.2, 450.0, 1.0)] * len(equivalence.RANDOM) + [rounding] * len(equivalence.RANDOM))
    monkeypatch.setattr(equivalence, "_differences", lambda *_, **__: next(answers))
    model = tiny_model()
    found = difference(model, model, inputs=(), allowed=FOLDED)
    assert not found.holds
    assert ("it is hardly trained, or has diverged" in str(found)) is says_why


def test_the_limits_of_half_precision_are_not_widened(monkeypatch):
    monkeypatch.setattr(equivalence, "_differences", lambda *_, **__: (0.0, 0.0, 0.03))
    model = tiny_model()
    assert difference(model, model, inputs=(), allowed=HALVED).allowed == HALVED


def test_a_conversion_takes_the_tolerance_that_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(equivalence, "_differences", lambda *_, **__: (0.5, 0.5, 0.05))
    source = tiny_checkpoint(tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"not written, .*; models\.convert --tolerance PX SCORE allows more$"):
        convert(source, deploy=True)
    with pytest.raises(UserError, match="two numbers above 0"):
        convert(source, deploy=True, tolerance=(0.0, 1.0))
    assert convert(source, deploy=True, tolerance=(1.0, 0.1)).path.is_file()
