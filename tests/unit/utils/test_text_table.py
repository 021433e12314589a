"""Tables as text: columns line up, and the last one leaves no blanks."""

from __future__ import annotations

from utils.text_table import markdown_table, text_table


def test_columns_are_as_wide_as_their_widest_cell():
    lines = [("row", "module"), ("7", "SE"), ("10", "FocalModulation")]
    assert text_table(lines, right=[0]) == "row  module\n  7  SE\n 10  FocalModulation"
    assert text_table(lines) == "row  module\n7    SE\n10   FocalModulation"


def test_a_table_without_rows_is_its_header():
    assert text_table([("a", "b")]) == "a  b"
    assert text_table([]) == ""
    assert markdown_table(("a", "b"), []) == "| a | b |\n| --- | --- |"


def test_markdown_has_a_line_a_row():
    assert markdown_table(("a", "b"), [("1", "2")]).splitlines()[2] == "| 1 | 2 |"
