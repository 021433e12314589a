"""Which layer of one network is which layer of another: the best-scoring alignment of two sequences of rows.

Both sequences keep their order; a row of either may be without partner. A pair scores by what the two rows are (kind, and how much of
their tensors agree in name and shape) and by what they read: a row that reads the partners of what the other reads. Edges pass through
rows without partner that have one input, so an inserted layer does not separate those around it. What a pair's edges are worth depends on
earlier pairs, so each cell of the dynamic programme keeps several partial alignments. Ties go to the earlier row.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import log10, prod
from typing import NamedTuple

from models.transfer.structure import Place, Row, Structure, counts

KEPT = 8  # partial alignments a cell
NONE = -2  # no partner; -1 is the image
SAME_KIND, SAME_HOST = 0.5, 0.35  # C2f and C2f_EMA share their host
SHARE, FULL, SIZE = 1.0, 2.0, 0.2  # worth of agreeing tensors; of agreeing in all; for every tenfold of parameters
EDGES = 1.0  # worth of reading the same
WRITTEN = 6.0  # worth of the same arguments in two scales of a YAML, where equal shapes occur at different depths
LEAST_SHARE = 0.3  # of the tensors of two rows of different kind, for them to be partners
OTHER_WRAPPING = 0.9  # factor where one row starts as the identity and the other does not
TIE = 1e-6


class Partners(NamedTuple):
    """Partner's position, or NONE, of every row so far, in both directions."""

    score: float
    of_source: tuple[int, ...]
    of_target: tuple[int, ...]


class Alignment(NamedTuple):
    """Two structures and the partners of their rows, by position, both ways; NONE without one."""

    source: Structure
    target: Structure
    of_source: tuple[int, ...]
    of_target: tuple[int, ...]

    def levels(self, branch: int, count: tuple[int, int]) -> dict[int, int]:
        """Target level -> source level of a branch of the two heads.

        By the rows that the levels read; where that is not known, by number if there are as many, and from the coarsest if not.

        Args:
            branch: counted from the main one, which is -1.
            count: levels of the source's and of the target's branch.
        """
        theirs, ours = self.source.rows[-1].branches, self.target.rows[-1].branches
        if self.source.known and min(len(theirs), len(ours)) >= -branch:
            read_there, read_here = _read(self, self.source.rows[-1], self.target.rows[-1], branch=branch)
            pairs = {level: read_there.index(row) for level, row in enumerate(read_here) if row != NONE and row in read_there}
            if len(pairs) == min(count):
                return pairs
        shift = count[0] - count[1]
        return {level: level + shift for level in range(count[1]) if 0 <= level + shift < count[0]}


def align(source: Structure, target: Structure) -> Alignment:
    """The best alignment of two networks; their heads are partners whatever they are."""
    heads = source.has_head and target.has_head
    sizes = len(source.rows) - source.has_head, len(target.rows) - target.has_head
    candidates = _search(source, target, sizes)
    if heads:
        candidates = [c._replace(score=c.score + _heads_agree(source, target, c)) for c in candidates]
    best = max(candidates, key=lambda c: c.score)
    of_source = (*best.of_source, *([sizes[1] if heads else NONE] * source.has_head))
    of_target = (*best.of_target, *([sizes[0] if heads else NONE] * target.has_head))
    return Alignment(source, target, of_source, of_target)


def agreeing(source: Row, target: Row) -> list[Place]:
    """Places whose tensors have one shape in both rows."""
    theirs = source.places
    return [p for p, name in target.places.items() if p in theirs and source.tensors[theirs[p]] == target.tensors[name]]


def _search(source: Structure, target: Structure, sizes: tuple[int, int]) -> list[Partners]:
    """Fills the table row by row; gives the best alignments of the first rows, the heads left out."""
    start = _common_beginning(source.rows[: sizes[0]], target.rows[: sizes[1]])
    common = tuple(range(start))
    above: list[list[Partners]] = []
    for i in range(start, sizes[0] + 1):
        cells: list[list[Partners]] = []
        for j in range(start, sizes[1] + 1):
            options = [Partners(0.0, common, common)] if i == j == start else []
            if i > start:
                options += [Partners(c.score, (*c.of_source, NONE), c.of_target) for c in above[j - start]]
            if j > start:
                options += [Partners(c.score, c.of_source, (*c.of_target, NONE)) for c in cells[-1]]
            if i > start and j > start:
                options += _paired(source, target, (i - 1, j - 1), above[j - start - 1])
            cells.append(_best(options))
        above = cells
    return above[-1]


def _paired(source: Structure, target: Structure, pair: tuple[int, int], before: Sequence[Partners]) -> list[Partners]:
    """The partial alignments ``before``, each with two more partners."""
    i, j = pair
    theirs, ours = source.rows[i], target.rows[j]
    worth = _likeness(theirs, ours)
    if worth is None:
        return []
    if source.known and target.known and source.scale != target.scale and theirs.kind == ours.kind and theirs.written == ours.written:
        worth += WRITTEN
    worth -= TIE * (i + j)
    pairs = []
    for c in before:
        edges = 0.0
        if source.known and target.known:
            edges = EDGES * _agreement(*_read(Alignment(source, target, c.of_source, c.of_target), theirs, ours))
        pairs.append(Partners(c.score + worth + edges, (*c.of_source, j), (*c.of_target, i)))
    return pairs


def _best(options: list[Partners]) -> list[Partners]:
    if len(options) == 1:
        return options
    different = {(c.of_source, c.of_target): c for c in options}
    return heapq.nlargest(KEPT, different.values(), key=lambda c: c.score)


def _common_beginning(theirs: Sequence[Row], ours: Sequence[Row]) -> int:
    """How many first rows are equal in everything; they are partners without a search. All of them where the graphs are the same: the
    tensors' shapes may then differ, as between two scales of one YAML."""
    if len(theirs) == len(ours) and all(s.sources is not None and _stands_alike(s, t) for s, t in zip(theirs, ours)):
        return len(theirs)
    count = 0
    for s, t in zip(theirs, ours):
        if s.sources is None or not _stands_alike(s, t) or s.tensors != t.tensors or (not s.tensors and s.args != t.args):
            break
        count += 1
    return count


def _stands_alike(source: Row, target: Row) -> bool:
    return (source.kind, source.sources) == (target.kind, target.sources)


def _likeness(source: Row, target: Row) -> float | None:
    """What a pair is worth by itself; None where the rows cannot be partners."""
    kind = _same_kind(source, target)
    if not source.size or not target.size:
        if source.size != target.size or kind < SAME_KIND:
            return None
        return kind + (SHARE if source.args == target.args else 0.5 * SHARE)
    agree = sum(prod(target.tensors[name]) for place in agreeing(source, target) if counts(name := target.places[place]))
    share = 2 * agree / (source.size + target.size)
    if not kind and share < LEAST_SHARE:
        return None
    worth = kind + share * (SHARE + FULL * share + SIZE * log10(1 + agree))
    return worth if source.wrapped == target.wrapped else OTHER_WRAPPING * worth


def _same_kind(source: Row, target: Row) -> float:
    if not source.kind or not target.kind:
        return SAME_KIND if source.tensors and source.places.keys() == target.places.keys() else 0.0
    if source.kind == target.kind:
        return SAME_KIND
    return SAME_HOST if source.kind.partition("_")[0] == target.kind.partition("_")[0] else 0.0


def _heads_agree(source: Structure, target: Structure, partners: Partners) -> float:
    """What it is worth that the heads' levels read the same rows, branch by branch from the main one."""
    theirs, ours = source.rows[-1], target.rows[-1]
    alignment = Alignment(source, target, partners.of_source, partners.of_target)
    worth = 0.0
    for branch in range(-min(len(theirs.branches), len(ours.branches)), 0):
        read = _read(alignment, theirs, ours, branch=branch)
        worth += EDGES * len(read[1]) * _agreement(*read)
    return worth


def _agreement(theirs: Sequence[int], ours: Sequence[int]) -> float:
    """From 0 to 1: how much of what two rows read belongs together; two inputs without partner may or may not."""
    if len(theirs) == len(ours):
        hits = sum(0.5 if a == b == NONE else a == b for a, b in zip(theirs, ours))
    else:
        hits = len({a for a in theirs if a != NONE} & set(ours))
    return hits / max(len(theirs), len(ours), 1)


def _read(alignment: Alignment, source: Row, target: Row, *, branch: int | None = None) -> tuple[list[int], list[int]]:
    """The inputs of two rows, both as positions in the target; NONE for one that leads to no row with a partner."""
    theirs, ours = source.sources or (), target.sources or ()
    if branch is not None:
        theirs = tuple(theirs[i] for i in source.branches[branch])
        ours = tuple(ours[i] for i in target.branches[branch])
    there = [_partnered(s, alignment.source.rows, alignment.of_source) for s in theirs]
    here = [_partnered(t, alignment.target.rows, alignment.of_target) for t in ours]
    return [alignment.of_source[s] if s >= 0 else s for s in there], here


def _partnered(position: int, rows: Sequence[Row], partners: Sequence[int]) -> int:
    """The row itself, or the first with a partner (or the image, -1) that it comes from through rows with one input; else NONE."""
    while position >= 0 and partners[position] == NONE:
        sources = rows[position].sources or ()
        if len(sources) != 1:
            return NONE
        position = sources[0]
    return position
