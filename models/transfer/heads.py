"""Which tensor of one head goes to which of another: by branch from the main one, by level, and by class.

Branches are counted from the main one, so a dual head's second branch and a single head's only one are partners. Rows of the class
convolutions belong to classes: they go by class name where both sides know names, and by number where there are as many classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from models.transfer.alignment import Alignment
from models.transfer.structure import Row, Shape

TOWER = re.compile(r"(?P<prefix>.*?)cv(?P<number>\d+)\.(?P<level>\d+)\.(?P<rest>.+)")
DISTRIBUTION = re.compile(r"dfl(?P<number>\d*)\.(?P<rest>.+)")
BY_ANCHOR = re.compile(r"(?P<kind>m2?|ia|im)\.(?P<level>\d+)\.(?P<rest>.+)")
PLACEHOLDER = re.compile(r"class_?\d+|\d+")
BOX_VALUES = 5  # of an anchor: x, y, w, h, objectness


class Move(NamedTuple):
    """One tensor, or rows of it, from source to target; names within the rows.

    Attributes:
        rows: target and source indices along ``dim``; None for all of it.
        note: what was done to make it fit.
    """

    target: str
    source: str
    rows: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    dim: int = 0
    note: str = ""


class Part(NamedTuple):
    """What a tensor is for, in terms that mean the same in every head."""

    kind: str
    branch: int  # from the main one, which is -1
    level: int
    rest: str


@dataclass(frozen=True)
class Classes:
    """What the two sides know of their classes; names are None where unknown."""

    theirs: Sequence[str] | None
    ours: Sequence[str] | None

    def pairs(self, counts: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Indices of target and source that are the same class.

        Args:
            counts: classes of the source and of the target.
        """
        theirs, ours = (_known(names, count) for names, count in zip((self.theirs, self.ours), counts))
        if theirs and ours:
            place = {name: i for i, name in reversed(list(enumerate(theirs)))}
            both = [(i, place[name]) for i, name in enumerate(ours) if name in place]
            if both:
                return tuple(i for i, _ in both), tuple(i for _, i in both)
        every = tuple(range(counts[1]))
        return (every, every) if counts[0] == counts[1] else ((), ())


def head_moves(alignment: Alignment, classes: Classes, *, keep_anchors: bool) -> list[Move]:
    """What goes from one head to the other.

    Args:
        keep_anchors: the target's anchors stay as they are.
    """
    source, target = alignment.source.rows[-1], alignment.target.rows[-1]
    theirs, ours = {part: name for name, part in _parts(source).items()}, _parts(target)
    branches = {part.branch for part in ours.values()}
    levels = {b: alignment.levels(b, (_levels(theirs, b), _levels(ours.values(), b))) for b in branches}
    moves = []
    for name, part in ours.items():
        partner = theirs.get(part._replace(level=levels[part.branch].get(part.level, -2) if part.level >= 0 else -1))
        if partner is None:
            continue
        move = _move(name, partner, part, (source.tensors, target.tensors), classes)
        moves += [move] if move else []
    if not keep_anchors:
        same = [n for n in ("anchors", "anchor_grid") if n in target.tensors and source.tensors.get(n) == target.tensors[n]]
        moves += [Move(name, name) for name in same]
    return moves


def _move(name: str, partner: str, part: Part, tensors: tuple[Mapping[str, Shape], Mapping[str, Shape]], classes: Classes) -> Move | None:
    theirs, ours = tensors[0][partner], tensors[1][name]
    if part.kind.endswith("class") and re.fullmatch(r"\d+\.(weight|bias)", part.rest):
        pairs = classes.pairs((theirs[0], ours[0]))
        return _by_rows(Move(name, partner, pairs, 0, _note(pairs, ours[0])), (theirs, ours))
    if part.kind in ("m", "im"):
        return _by_anchor(Move(name, partner, None, 0 if part.kind == "m" else 1), tensors, classes)
    return Move(name, partner) if theirs == ours else None


def _by_anchor(move: Move, tensors: tuple[Mapping[str, Shape], Mapping[str, Shape]], classes: Classes) -> Move | None:
    """Output rows of an anchor-based head: for every anchor its box and objectness, and the classes that have a partner."""
    theirs, ours = tensors[0][move.source], tensors[1][move.target]
    anchors = [_anchors_a_cell(t) for t in tensors]
    per_cell = anchors[1]
    if per_cell is None or anchors[0] not in (None, per_cell) or theirs[move.dim] % per_cell:
        return None
    outputs = theirs[move.dim] // per_cell, ours[move.dim] // per_cell
    pairs = classes.pairs((outputs[0] - BOX_VALUES, outputs[1] - BOX_VALUES))
    mine, other = ((*range(BOX_VALUES), *(BOX_VALUES + i for i in side)) for side in pairs)
    rows = (
        tuple(anchor * outputs[1] + i for anchor in range(per_cell) for i in mine),
        tuple(anchor * outputs[0] + i for anchor in range(per_cell) for i in other),
    )
    return _by_rows(move._replace(rows=rows, note=_note(pairs, outputs[1] - BOX_VALUES)), (theirs, ours))


def _by_rows(move: Move, shapes: tuple[Shape, Shape]) -> Move | None:
    """The move, simplified where it is the whole tensor; None where nothing of it can be made."""
    (theirs, ours), dim, rows = shapes, move.dim, move.rows
    if rows is None or not rows[0] or theirs[:dim] + theirs[dim + 1 :] != ours[:dim] + ours[dim + 1 :]:
        return None
    return Move(move.target, move.source) if theirs == ours and rows[0] == rows[1] == tuple(range(ours[dim])) else move


def _note(pairs: tuple[tuple[int, ...], tuple[int, ...]], count: int) -> str:
    return f"{len(pairs[0])} of {count} classes, by name" if pairs[0] else f"none of {count} classes"


def _parts(head: Row) -> dict[str, Part]:
    """Every tensor's part; the anchors, which belong to no level, are left out."""
    names = list(head.tensors)
    branches = 1 + max((_branch(m["number"]) for n in names if (m := TOWER.fullmatch(n))), default=0)
    parts: dict[str, Part] = {}
    for name in names:
        if tower := TOWER.fullmatch(name):
            kind = "box" if int(tower["number"]) % 2 == 0 else "class"
            parts[name] = Part(tower["prefix"] + kind, _branch(tower["number"]) - branches, int(tower["level"]), tower["rest"])
        elif distribution := DISTRIBUTION.fullmatch(name):
            parts[name] = Part("dfl", int(distribution["number"] or 1) - 1 - branches, -1, distribution["rest"])
        elif anchored := BY_ANCHOR.fullmatch(name):
            kind, branch = ("m", -2) if anchored["kind"] == "m2" else (anchored["kind"], -1)
            parts[name] = Part(kind, branch, int(anchored["level"]), anchored["rest"])
        elif name not in ("anchors", "anchor_grid"):
            parts[name] = Part("other", -1, -1, name)
    return parts


def _branch(number: str) -> int:
    """cv2 and cv3 are the first branch, cv4 and cv5 the second."""
    return int(number) // 2 - 1


def _levels(parts: Iterable[Part], branch: int) -> int:
    return 1 + max((part.level for part in parts if part.branch == branch), default=-1)


def _anchors_a_cell(tensors: Mapping[str, Shape]) -> int | None:
    shape = tensors.get("anchors")
    return shape[1] if shape and len(shape) == 3 else None


def _known(names: Sequence[str] | None, count: int) -> list[str] | None:
    """Names to compare by; None where there are none, or only made-up ones."""
    if not names or len(names) != count or all(PLACEHOLDER.fullmatch(n) for n in names):
        return None
    return [" ".join(n.casefold().split()) for n in names]
