"""What can be built: ``list_models("*BiFormer*")`` gives names for ``build_model`` and ``--cfg``, ``list_blocks()`` those for YAML rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import yaml

from models.spec.config_files import CONFIGS, SCALED_NAME, SCALES_KEY
from models.spec.registry import BLOCKS, KINDS, Kind, load_plugin
from utils.errors import UserError, nearest

# The key and what belongs to it: lines that are indented, comments or empty. Parsing the rows of the networks as well takes far longer.
SCALES_TABLE = re.compile(SCALES_KEY.pattern + rb".*(?:\n(?:[ \t#].*)?)*", re.MULTILINE)


def list_models(pattern: str = "*", *, scales: bool = True) -> list[str]:
    """Names of model YAMLs, as ``build_model`` and ``--cfg`` take them, in order.

    Args:
        pattern: shell-like, letter case aside: ``*`` and ``?``; a word without these is looked for anywhere in the names.
        scales: a file with a table of scales is listed once for each letter (``yolov8n-CBAM``) beside its own name.
    """
    names: list[str] = []
    for path in CONFIGS.rglob("*.yaml"):
        names.append(path.stem)
        if scales and (table := SCALES_TABLE.search(path.read_bytes())):
            letters = yaml.safe_load(table[0])["scales"] or {}
            names += [scaled for letter in letters if (scaled := _scaled(path.stem, str(letter)))]
    return _matching(set(names), pattern)


def list_blocks(pattern: str = "*", *, kind: Kind | None = None, plugins: Sequence[str] = ()) -> list[str]:
    """Names that a YAML row can have, those of plugins included, in order.

    Args:
        pattern: as of ``list_models``; aliases match too, and the block's own name is given.
        kind: attention, backbone, neck, head, framework or block; all if not given.
        plugins: Python files of the caller's that register more.

    Raises:
        UserError: the kind is unknown, or a plugin cannot be used.
    """
    if kind is not None and kind not in KINDS:
        raise UserError(f"kind {kind!r} is unknown; {nearest(str(kind), KINDS) or 'known are ' + ', '.join(KINDS)}")
    for path in plugins:
        load_plugin(path)
    chosen = [spec for name in BLOCKS if kind in (None, (spec := BLOCKS[name]).kind)]
    return [spec.name for spec in chosen if _matching((spec.name, *spec.aliases), pattern)]


def _matching(names: Iterable[str], pattern: str) -> list[str]:
    wanted = pattern.lower().removesuffix(".yaml")
    if not any(c in wanted for c in "*?["):
        wanted = f"*{wanted}*"
    return sorted(name for name in names if fnmatchcase(name.lower(), wanted))


def _scaled(stem: str, letter: str) -> str:
    """The name with a scale letter after the family, which reads this file at that scale; empty where it would not."""
    for end in range(1, len(stem) + 1):
        name = f"{stem[:end]}{letter}{stem[end:]}"
        parts = SCALED_NAME.match(name)
        if parts and parts["scale"] == letter and f"{parts['family']}{parts['rest']}" == stem:
            return name
    return ""
