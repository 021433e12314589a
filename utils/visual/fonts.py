"""Fonts for names in any script: a family of this machine that has the characters, or one line that says what to install."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache

# families with Chinese characters, in the order in which they are preferred
FAMILIES = (
    "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN", "Microsoft YaHei", "PingFang SC", "Hiragino Sans GB",
    "Noto Sans CJK JP", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "SimHei", "Heiti SC", "Arial Unicode MS", "Droid Sans Fallback",
    "Noto Serif CJK SC", "SimSun", "AR PL UMing CN",
)  # fmt: skip
DEFAULT = "DejaVu Sans"  # comes with matplotlib
LAST_RESORT = "Last Resort"  # has a box for every character
ADVICE = "install one, such as fonts-noto-cjk (Debian, Ubuntu), google-noto-sans-cjk-fonts (Fedora) or SimHei"
_warned: list[frozenset[str]] = []  # what the one line was about


def families_for(texts: Iterable[str]) -> list[str]:
    """Font families for these texts, the default first; a line on stderr, once, where no font has some of their characters."""
    needed = {c for text in texts for c in text if c.isprintable() and not c.isspace()}
    missing = frozenset(c for c in needed if ord(c) not in _characters(_path_of(DEFAULT)))
    if not missing:
        return [DEFAULT]
    family = _family_with(missing)
    if family:
        return [DEFAULT, family]
    if not _warned:
        _warned.append(missing)
        print(f"warning: no font here has {''.join(sorted(missing)[:8])}, so figures show boxes in their place; {ADVICE}", file=sys.stderr)
    return [DEFAULT]


@cache
def _family_with(missing: frozenset[str]) -> str:
    """The family that has all of these characters, or else most of them; empty where none has any."""
    from matplotlib.font_manager import fontManager

    _add_new_fonts()
    paths = {entry.name: entry.fname for entry in fontManager.ttflist if not entry.name.startswith(LAST_RESORT)}
    order = [name for name in FAMILIES if name in paths] + sorted(paths.keys() - set(FAMILIES))
    best, most = "", 0
    for name in order:
        found = sum(ord(c) in _characters(paths[name]) for c in missing)
        if found == len(missing):
            return name
        if found > most:
            best, most = name, found
    return best


def _add_new_fonts() -> None:
    """Adds fonts that were installed after matplotlib wrote its list."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    known = {entry.fname for entry in fontManager.ttflist}
    for path in findSystemFonts():
        if path not in known:
            try:
                fontManager.addfont(path)
            except Exception:
                continue


@cache
def _characters(path: str) -> frozenset[int]:
    """Code points that a font file has; none for a file that cannot be read."""
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def _path_of(family: str) -> str:
    from matplotlib.font_manager import FontProperties, findfont

    return findfont(FontProperties(family=[family]))
