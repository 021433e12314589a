"""Which row is which, by structure alone: edits of the four networks of the contract, and published pairs whose rows are known."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest
import torch

from models import build_model
from models.transfer.alignment import NONE, align
from models.transfer.structure import Row, Structure, structure_of, structure_of_weights
from tests.golden import find

NETWORKS = ("yolov5s", "yolov8n", "yolov9-t", "yolov9-c")
ATTENTION = Row(0, "CBAM", (), {"channel.weight": (4, 64), "spatial.weight": (1, 2, 7, 7)}, (0,))


@cache
def structure(name: str) -> Structure:
    with torch.device("meta"):
        return structure_of(build_model(name))


def without_graph(known: Structure) -> Structure:
    return structure_of_weights({f"model.{row.index}.{name}": shape for row in known.rows for name, shape in row.tensors.items()}, None)


def inserted(known: Structure, after: int, row: Row, *, for_all: bool) -> tuple[Structure, dict[int, int]]:
    """With a row more behind row ``after``, read by all its readers or only by the next row; and old row -> new row."""
    number = {i: i if i <= after else i + 1 for i in range(-1, len(known.rows))}
    rows: list[Row] = []
    for i, old in enumerate(known.rows):
        sources = tuple(after + 1 if s == after and (for_all or i == after + 1) else number[s] for s in old.sources)
        rows.append(replace(old, index=number[i], sources=sources))
        if i == after:
            rows.append(replace(row, index=after + 1, sources=(after,)))
    return known._replace(rows=tuple(rows)), number


def removed(known: Structure, at: int) -> tuple[Structure, dict[int, int]]:
    number = {i: i if i < at else i - 1 for i in range(-1, len(known.rows))} | {at: known.rows[at].sources[0]}
    rows = [replace(r, index=number[i], sources=tuple(number[s] for s in r.sources)) for i, r in enumerate(known.rows) if i != at]
    return known._replace(rows=tuple(rows)), {**number, at: NONE}


def misplaced(source: Structure, target: Structure, truth: dict[int, int]) -> list[tuple[int, int, int]]:
    """(row, where it went, where it belongs) of rows with tensors."""
    found = align(source, target).of_source
    went = [(row.index, found[i], truth.get(row.index, NONE)) for i, row in enumerate(source.rows) if row.size]
    return [(row, there, right) for row, there, right in went if there != right]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_single_insertion_is_aligned(name):
    known = structure(name)
    for after in range(len(known.rows) - 1):
        edited, truth = inserted(known, after, ATTENTION, for_all=after % 2 == 0)
        assert misplaced(known, edited, truth) == []
        if after % 4 == 0:
            assert misplaced(without_graph(known), edited, truth) == []


@pytest.mark.parametrize("name", NETWORKS)
def test_second_of_two_identical_layers_counts_as_inserted(name):
    known = structure(name)
    for after in [i for i, row in enumerate(known.rows[:-1]) if len(row.sources) == 1]:
        edited, truth = inserted(known, after, known.rows[after], for_all=True)
        assert misplaced(known, edited, truth) == []


@pytest.mark.parametrize("name", NETWORKS)
def test_every_single_removal_is_aligned(name):
    known = structure(name)
    for at in [i for i, row in enumerate(known.rows[:-1]) if len(row.sources) == 1]:
        assert misplaced(known, *removed(known, at)) == []


@pytest.mark.parametrize("name", NETWORKS)
def test_several_insertions_at_once_are_aligned(name):
    known, choose = structure(name), random.Random(1)
    for _ in range(8):
        edited, truth = known, {i: i for i in range(len(known.rows))}
        for _ in range(4):
            edited, step = inserted(edited, choose.randrange(len(edited.rows) - 1), ATTENTION, for_all=choose.random() < 0.5)
            truth = {old: step[new] for old, new in truth.items()}
        assert misplaced(known, edited, truth) == []


@pytest.mark.parametrize("scale", ["t", "c", "e", *(pytest.param(s, marks=pytest.mark.slow) for s in "sm")])
def test_dual_and_single_networks_are_matched_as_published(scale):
    published = find("models", "deploy_maps_yolov9_to_gelan").meta["maps"][scale]
    truth = {row: row + shift for first, last, shift in published["layers"] for row in range(first, last + 1)}
    truth[published["detect"][0]] = published["detect"][1]
    dual, single = structure(f"yolov9-{scale}"), structure(f"gelan-{scale}")
    assert misplaced(dual, single, truth) == []
    assert misplaced(single, dual, {new: old for old, new in truth.items()}) == []
    if scale != "e":  # there the auxiliary branch has layers of the same shapes, which only the edges tell apart
        assert misplaced(without_graph(dual), single, truth) == []


def test_equal_graphs_are_matched_row_by_row_for_any_width():
    small, large = structure("yolov8n"), structure("yolov8s")
    assert align(small, large).of_source == tuple(range(len(small.rows)))


def test_another_scale_is_matched_by_unscaled_arguments():
    small, large = structure("yolov8n"), structure("yolov8s-CBAM")
    assert align(small, large).of_source == tuple(i if i < 9 else i + 1 for i in range(len(small.rows)))


def test_head_levels_are_matched_by_their_inputs():
    three, four = structure("yolov8s"), structure("yolov8s-p2")
    assert align(three, four).levels(-1, (3, 4)) == {1: 0, 2: 1, 3: 2}
    assert align(without_graph(three), four).levels(-1, (3, 4)) == {1: 0, 2: 1, 3: 2}


def test_networks_with_no_common_row_match_nothing():
    lone = structure_of_weights({"model.0.fc.weight": (3, 3)}, None)
    assert align(lone, structure("yolov8n")).of_source == (NONE,)
    assert align(structure_of_weights({}, None), structure("yolov8n")).of_source == ()
