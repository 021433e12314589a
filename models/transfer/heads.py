"""Which tensor of one head goes to which of another: by branch from the main one, by level, and by class.

What a tensor is for is declared by the heads (``Head.parameter_parts``). Branches are counted from the main one, so a dual head's second
branch and a single head's only one are partners. Class channels of output layers go by class name where both sides know names, and by
number where there are as many classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from models.heads.base import ParameterPart
from models.transfer.alignment import Alignment
from models.transfer.head_parts import NO_LEVEL, HeadTensor, identify
from models.transfer.structure import Shape

ANCHOR_ROLES = ("anchors", "anchors in px")
MAIN = -1  # the main branch
ANY_OUTPUT = "*"  # every layer of a part has its channels
PLACEHOLDER = re.compile(r"class_?\d+|\d+")


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
    theirs = {identify(name, source.head_parts)[0]: name for name in source.tensors}
    ours = {name: identify(name, target.head_parts) for name in target.tensors}
    levels = {
        b: alignment.levels(b, (_levels(theirs, b), _levels([tensor for tensor, _ in ours.values()], b)))
        for b in {MAIN, *(tensor.branch for tensor, _ in ours.values())}
    }
    moves = []
    for name, (tensor, part) in ours.items():
        partner = next(filter(None, (_partner(t, part, theirs, levels) for t in _in_order(tensor, part))), None)
        if partner is None or (keep_anchors and part.role in ANCHOR_ROLES):
            continue
        move = _move(Move(name, partner), tensor.rest, part, (source.tensors, target.tensors), classes)
        moves += [move] if move else []
    return moves


def _in_order(tensor: HeadTensor, part: ParameterPart) -> list[HeadTensor]:
    """The tensors that may be a tensor's partner, the first that there is counts."""
    return [tensor, tensor._replace(branch=MAIN)] if part.like_main else [tensor]


def _partner(
    tensor: HeadTensor, part: ParameterPart, theirs: Mapping[HeadTensor, str], levels: Mapping[int, Mapping[int, int]]
) -> str | None:
    """The source's name of a tensor that is for the same; None where it has none."""
    level = levels[tensor.branch].get(tensor.level) if part.by_level else NO_LEVEL
    return theirs.get(tensor._replace(level=level)) if level is not None else None


def _move(
    move: Move, rest: str, part: ParameterPart, tensors: tuple[Mapping[str, Shape], Mapping[str, Shape]], classes: Classes
) -> Move | None:
    """The move between two partners: the whole tensor, or of an output layer with classes the channels that mean the same.

    Args:
        rest: the target's name within its level's module.
    """
    theirs, ours = tensors[0][move.source], tensors[1][move.target]
    if "class" not in part.channels or part.output not in (ANY_OUTPUT, rest.rpartition(".")[0]):
        return move if theirs == ours else None
    per_cell = 1
    if part.by_anchor:
        anchors = [_anchors_a_cell(t) for t in tensors]
        if anchors[1] is None or anchors[0] not in (None, anchors[1]) or theirs[part.dim] % anchors[1]:
            return None
        per_cell = anchors[1]
    outputs = theirs[part.dim] // per_cell, ours[part.dim] // per_cell
    behind = [t.get(part.behind, (0,))[0] for t in tensors]
    pairs, note = _channel_pairs(part, (outputs[0] - behind[0], outputs[1] - behind[1]), classes)
    if behind[0] == behind[1]:
        pairs += [(outputs[1] - i, outputs[0] - i) for i in range(behind[0], 0, -1)]
    mine = tuple(anchor * outputs[1] + i for anchor in range(per_cell) for i, _ in pairs)
    other = tuple(anchor * outputs[0] + j for anchor in range(per_cell) for _, j in pairs)
    return _by_rows(Move(move.target, move.source, (mine, other), part.dim, note), (theirs, ours))


def _channel_pairs(part: ParameterPart, counts: tuple[int, int], classes: Classes) -> tuple[list[tuple[int, int]], str]:
    """(target, source) output channels of one anchor that mean the same, and how many of the classes are among them.

    Args:
        counts: output channels of the source and of the target.
    """
    pairs: list[tuple[int, int]] = []
    note = ""
    for meaning, where in part.channels.items():
        theirs, ours = (range(count)[where] for count in counts)
        if meaning == "class":
            same = classes.pairs((len(theirs), len(ours)))
            pairs += [(ours[i], theirs[j]) for i, j in zip(*same)]
            note = _note(same, len(ours))
        elif len(theirs) == len(ours):
            pairs += zip(ours, theirs)
    return pairs, note


def _by_rows(move: Move, shapes: tuple[Shape, Shape]) -> Move | None:
    """The move, simplified where it is the whole tensor; None where nothing of it can be made."""
    (theirs, ours), dim, rows = shapes, move.dim, move.rows
    if rows is None or not rows[0] or theirs[:dim] + theirs[dim + 1 :] != ours[:dim] + ours[dim + 1 :]:
        return None
    return Move(move.target, move.source) if theirs == ours and rows[0] == rows[1] == tuple(range(ours[dim])) else move


def _note(pairs: tuple[tuple[int, ...], tuple[int, ...]], count: int) -> str:
    return f"{len(pairs[0])} of {count} classes, by name" if pairs[0] else f"none of {count} classes"


def _levels(tensors: Iterable[HeadTensor], branch: int) -> int:
    return 1 + max((tensor.level for tensor in tensors if tensor.branch == branch), default=-1)


def _anchors_a_cell(tensors: Mapping[str, Shape]) -> int | None:
    shape = tensors.get("anchors")
    return shape[1] if shape and len(shape) == 3 else None


def _known(names: Sequence[str] | None, count: int) -> list[str] | None:
    """Names to compare by; None where there are none, or only made-up ones."""
    if not names or len(names) != count or all(PLACEHOLDER.fullmatch(n) for n in names):
        return None
    return [" ".join(n.casefold().split()) for n in names]
