"""Fonts for names in any script, the same for plots (matplotlib) and for text on images (PIL).

matplotlib's own font comes first; what it lacks is looked for among the fonts of this machine (fontconfig's and matplotlib's lists), then
in the font that OpenCV has within it (version 5; Chinese, Japanese and Korean). One line says what to install where none has it.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable
from functools import cache
from typing import Any

log = logging.getLogger(__name__)
# families with Chinese characters, in the order in which they are preferred
FAMILIES = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "Microsoft YaHei", "PingFang SC", "Hiragino Sans GB",
    "Noto Sans CJK JP", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "SimHei", "Heiti SC", "Arial Unicode MS", "Droid Sans Fallback",
    "Noto Serif CJK SC", "SimSun", "AR PL UMing CN",
)  # fmt: skip
DEFAULT = "DejaVu Sans"  # comes with matplotlib
LAST_RESORT = "Last Resort"  # has a box for every character
ADVICE = "install one, such as fonts-noto-cjk (Debian, Ubuntu), google-noto-sans-cjk-fonts (Fedora) or SimHei"
_chosen: dict[str, str] = {}  # character -> font file; empty where no font has it
_warned: list[str] = []  # what the one line was about


def families_for(texts: Iterable[str]) -> list[str]:
    """Font families for these texts, the default first; a warning, once, where no font has some of their characters."""
    needed = [c for text in texts for c in text if not _joins(c)]
    files = dict.fromkeys(_files_of(needed))
    return list(dict.fromkeys([DEFAULT, *(_family_of(file) for file in files)]))


def text_runs(text: str) -> list[tuple[str, str]]:
    """The text in parts, each with the font file that has its characters; marks and spaces stay with what is before them."""
    _files_of([c for c in text if not _joins(c)])
    runs: list[tuple[str, str]] = []
    for c in text:
        file = runs[-1][1] if _joins(c) and runs else _chosen.get(c) or _default_file()
        if runs and runs[-1][1] == file:
            runs[-1] = (runs[-1][0] + c, file)
        else:
            runs.append((c, file))
    return runs


@cache
def font_file(file: str, size: int) -> Any:
    """A font of PIL's at a size in px."""
    from PIL import ImageFont

    return ImageFont.truetype(file, size)


def _files_of(characters: Iterable[str]) -> list[str]:
    """The font file of each character, found once for a process; characters that no font has are left out, with one warning."""
    wanted = list(dict.fromkeys(characters))
    if unknown := [c for c in wanted if c not in _chosen]:
        _choose(unknown)
    return [file for c in wanted if (file := _chosen[c])]


def _choose(characters: list[str]) -> None:
    from utils.visual.traced_font import traced_font

    default = _default_file()
    _chosen.update({c: default for c in characters if ord(c) in _characters(default)})
    missing = {c for c in characters if c not in _chosen}
    while missing:
        file, has = _font_with(frozenset(missing))
        if not has:
            break
        _chosen.update(dict.fromkeys(has, file))
        missing -= has
    if missing and (traced := traced_font(frozenset(missing))) is not None:
        _chosen.update(dict.fromkeys(traced.characters, str(traced.path)))
        missing -= traced.characters
    _chosen.update(dict.fromkeys(missing, ""))
    if missing and not _warned:
        _warned.append("".join(sorted(missing)))
        shown = " ".join(sorted(missing)[:8])
        log.warning("no font here has the characters %s, so images and figures show boxes in their place; %s", shown, ADVICE)


def _font_with(missing: frozenset[str]) -> tuple[str, set[str]]:
    """The font file of this machine that has all of these characters, or else most of them, and which it has."""
    paths = _installed()
    best: tuple[str, set[str]] = ("", set())
    for name in [*(n for n in FAMILIES if n in paths), *sorted(paths.keys() - set(FAMILIES))]:
        has = {c for c in missing if ord(c) in _characters(paths[name])}
        if len(has) > len(best[1]):
            best = (paths[name], has)
        if len(has) == len(missing):
            break
    return best


@cache
def _installed() -> dict[str, str]:
    """The file of every family's most usual form; fonts that were installed after matplotlib wrote its list are in it."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    known = {entry.fname for entry in fontManager.ttflist}
    for path in findSystemFonts():
        if path not in known:
            try:
                fontManager.addfont(path)
            except Exception:
                continue
    usual = sorted(fontManager.ttflist, key=lambda entry: entry.style == "normal" and str(entry.weight) in ("400", "normal", "regular"))
    return {entry.name: entry.fname for entry in usual if not entry.name.startswith(LAST_RESORT)}  # the most usual is the last


@cache
def _characters(path: str) -> frozenset[int]:
    """Code points that a font file has; none for a file that cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


@cache
def _default_file() -> str:
    from pathlib import Path

    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@cache
def _family_of(file: str) -> str:
    """What matplotlib calls the family of a file, which it is told of if it does not know it."""
    from matplotlib.font_manager import fontManager

    if file == _default_file():
        return DEFAULT
    if not any(entry.fname == file for entry in fontManager.ttflist):
        fontManager.addfont(file)
    return next(entry.name for entry in fontManager.ttflist if entry.fname == file)


def _joins(c: str) -> bool:
    """Whether a character has no look of its own: spaces, combining marks, joiners, control characters."""
    return c.isspace() or not c.isprintable() or unicodedata.category(c)[0] in "MC"
