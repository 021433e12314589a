"""Names in any script, in images and plots: with a font that has them, with OpenCV's own, and without either."""

from __future__ import annotations

import logging
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.visual import fonts, traced_font
from utils.visual.draw import draw_boxes, draw_text, text_width
from utils.visual.figures import drawing, figure_formats
from utils.visual.fonts import families_for, text_runs
from utils.visual.names import short_name

CHINESE = "行人与自行车"
NASTY = ("US$5_%{a}^2", "two\nlines", "长" * 300, "\x1b[31m", "x\ud800", "", "_hidden", "行人")


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of earlier names."""
    monkeypatch.setattr(fonts, "_chosen", {})
    monkeypatch.setattr(fonts, "_warned", [])


def nothing(*_: object) -> tuple[str, set[str]]:
    return "", set()


def test_names_in_latin_letters_need_no_other_font() -> None:
    assert families_for(["SE@9 ± é Ж", "$a_b"]) == [fonts.DEFAULT]


def test_a_font_of_the_system_is_found_and_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has all characters goes before one that has some."""
    monkeypatch.setattr(fonts, "_installed", lambda: {"SimHei": "/some/half.ttf", "Zzz": "/some/whole.ttf"})
    has = {"/some/half.ttf": frozenset(map(ord, CHINESE[:3])), "/some/whole.ttf": frozenset(map(ord, CHINESE))}
    own = fonts._characters
    monkeypatch.setattr(fonts, "_characters", lambda path: has.get(path) or own(path))
    assert text_runs(f"a {CHINESE} b") == [("a ", fonts._default_file()), (f"{CHINESE} ", "/some/whole.ttf"), ("b", fonts._default_file())]


@pytest.mark.skipif(not hasattr(cv2, "FontFace"), reason="OpenCV before 5 has no font of its own for Chinese")
def test_without_a_font_the_one_within_opencv_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog) -> None:
    from PIL import ImageFont

    monkeypatch.setattr(fonts, "_font_with", nothing)
    family = families_for([CHINESE])[1]
    (_, file), = text_runs(CHINESE)
    assert ImageFont.truetype(file, 20).getname()[0] == family
    assert fonts._characters(file) == frozenset(map(ord, CHINESE))
    with figure_formats(["pdf"]), drawing(tmp_path / "a.png", 2, 1, texts=[CHINESE]) as figure:
        figure.text(0.1, 0.4, CHINESE)
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "a.pdf"}
    assert not caplog.records


@pytest.mark.skipif(not hasattr(cv2, "FontFace"), reason="OpenCV before 5 has no font of its own for Chinese")
def test_a_traced_character_looks_like_the_one_that_opencv_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_font_with", nothing)
    ours, theirs = (np.zeros((60, 60, 3), np.uint8) for _ in range(2))
    draw_text(ours, "国", (6, 46), height=round(40 * 0.73), colour=(255, 255, 255))
    cv2.putText(theirs, "国", (6, 46), (255, 255, 255), cv2.FontFace("uni"), 40)
    same = np.corrcoef(ours[:, :, 0].ravel(), theirs[:, :, 0].ravel())[0, 1]
    assert same > 0.85


def test_a_missing_font_is_one_line_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    monkeypatch.setattr(fonts, "_font_with", nothing)
    monkeypatch.setattr(traced_font, "traced_font", lambda characters: None)
    with caplog.at_level(logging.WARNING):
        assert families_for(["注意力"]) == families_for(["坐标"]) == [fonts.DEFAULT]
        with drawing(tmp_path / "a.png", 2, 1, texts=["注意力"]) as figure:
            figure.text(0.1, 0.4, "注意力")
        assert text_width("注意力", 10) > 0
    (record,) = caplog.records
    assert "install one, such as fonts-noto-cjk" in record.getMessage()


@pytest.mark.parametrize("name", NASTY)
def test_any_name_is_one_line_on_an_image(name: str) -> None:
    image = np.zeros((120, 160, 3), np.uint8)
    draw_boxes(image, np.array([[20.0, 40.0, 90.0, 90.0]]), [f"{short_name(name)} 0.90"], [0])
    assert image.any()


@pytest.mark.parametrize(("points", "same"), [("行人 ", True), ("é́", True), ("a行", False)])
def test_spaces_and_marks_stay_with_what_is_before_them(points: str, same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_font_with", lambda missing: ("/some/font.ttf", set(missing)))
    assert (len(text_runs(points)) == 1) is same
