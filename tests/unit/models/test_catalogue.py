"""The catalogue's page: what is written is what the registry says, and each column means what it claims."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from models.analysis.catalogue import CHANNELS, HEADER, TIME, build_same_width, count, growth, page, same_width_names, sentence
from models.analysis.operations import multiply_adds
from models.spec import channel_rules as rules
from models.spec.registry import BLOCKS

PAGE = Path(__file__).parents[3] / "docs" / "attention.md"


def table_rows(text: str) -> list[list[str]]:
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return [row for row in rows if len(row) == len(HEADER)]


def stale_rows(written: str, fresh: str) -> list[str]:
    """Rows of a written page that differ from a fresh one, the times left aside."""
    old, new = (Counter(without_time(row) for row in text.splitlines()) for text in (written, fresh))
    return sorted((new - old) + (old - new))


def without_time(row: str) -> str:
    cells = row.split(" | ")
    return " | ".join([*cells[:TIME], *cells[TIME + 1 :]]) if len(cells) == len(HEADER) else row


@pytest.fixture(scope="module")
def fresh() -> str:
    return page(timed=False)


def test_page_is_up_to_date(fresh):
    stale = stale_rows(PAGE.read_text(encoding="utf-8"), fresh)
    assert not stale, "python -m models.catalogue --write docs/attention.md\n" + "\n".join(stale)


def test_page_lists_modules_whose_rows_name_a_width():
    listed = next(line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.endswith("`iRMB`: rows"))
    free = [name for name in same_width_names() if BLOCKS[name].channels is not rules.same_width]
    assert [part for part in listed.split("`") if part in BLOCKS] == free
    assert all(f"C2f_{name}" in BLOCKS for name in free)


def test_changed_rows_are_detected_and_changed_times_are_not(fresh):
    text = PAGE.read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| `SE`"))
    cells = row.split(" | ")
    other_time = " | ".join([*cells[:TIME], "99.9", *cells[TIME + 1 :]])
    assert other_time != row
    assert not stale_rows(text.replace(row, other_time), fresh)
    other_count = row.replace(f" | {cells[3]} | ", " | 1 | ")
    assert other_count != row
    assert stale_rows(text.replace(row, other_count), fresh) == sorted(map(without_time, (row, other_count)))


def test_every_module_with_a_paper_has_a_row_with_a_time():
    rows = table_rows(PAGE.read_text(encoding="utf-8"))
    listed = {row[0].split(",")[0].strip("`") for row in rows}
    own = {n for n in same_width_names() if BLOCKS[n].built_in}
    assert listed == {n for n in own if BLOCKS[n].kind == "attention"}
    others = {"ConvControl", "ImplicitA", "ImplicitM", "PConv", "FasterNetBlock", "AFPNBasicBlock", "RepVGGDW", "nn.BatchNorm2d"}
    assert own - listed == others  # same width, but no attention
    assert {"NLBlockND", "BoT3", "C3TR", "A2C2f", "iRMB", "SwinBlock"} <= listed
    assert all(float(row[TIME]) > 0 for row in rows)
    assert all(row[2] for row in rows)


@pytest.mark.parametrize(("module", "expected"), [
    (nn.Conv2d(CHANNELS, 8, 1), "N"),
    (nn.AdaptiveAvgPool2d(1), "N"),
    ("MHSA", "N²"),
    ("AxialAttention", "N^1.5"),
    ("MSDA", "N"),
])  # fmt: skip
def test_growth_is_the_exponent_of_the_largest_term(module, expected):
    built = build_same_width(module, CHANNELS).eval() if isinstance(module, str) else module
    assert growth(built) == expected


@pytest.mark.parametrize("name", ["MSDA", "BoT3", "nchwBRA", "ACmix", "DeformableLKA", "CloAttention", "C3TR"])
def test_counts_on_the_meta_device_are_equal(name):
    module = build_same_width(name, CHANNELS).eval()
    assert count(module, 12) == multiply_adds(module, torch.zeros(1, CHANNELS, 12, 12))


def test_descriptions_come_from_the_file_or_the_block():
    assert sentence(BLOCKS["SE"]) == "Squeeze and excitation: a channel's weight from the means of all channels"
    assert sentence(BLOCKS["FocalModulationBlock"]).startswith("FocalNet's block")
    assert r"\|" not in sentence(BLOCKS["ECA"])
