"""Weights from one network into another, whatever was inserted, removed or replaced between them.

Layers find their partners by structure (:mod:`models.transfer.alignment`), not by number. Within two partners a tensor goes to the place
of the same name and shape; heads are matched by branch, level and class (:mod:`models.transfer.heads`). A report says what became of
every row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from models.model import Model
from models.spec.parser import ModelSpec, load_spec
from models.transfer.alignment import NONE, Alignment, align
from models.transfer.first_convolution import adapted_tensor, first_convolutions
from models.transfer.heads import Classes, Move, head_moves
from models.transfer.report import ADAPTED, DROPPED, FRESH, KEPT, MOVED, PARTIAL, RowReport, TransferReport
from models.transfer.structure import GAMMA, SCALE, Row, Shape, Structure, counts, rows_of, structure_of, structure_of_weights
from utils.errors import UserError

SAME_ANCHORS = 5e-3  # by which anchors may differ that were stored in half precision


@dataclass(frozen=True)
class Source:
    """Weights to take from.

    Attributes:
        weights: state dict, names ``model.<row>.…``.
        cfg: the YAML of the network that they are of; None where unknown, then only names, shapes and order count.
        names: its class names; None where unknown.
        origin: for messages.
    """

    weights: Mapping[str, Tensor]
    cfg: Mapping[str, object] | None = None
    names: Sequence[str] | None = None
    origin: str = "weights"

    @property
    def ch(self) -> int:
        """Channels of the images that the weights were trained on."""
        return int(str(self.cfg.get("ch", 3))) if self.cfg else 3

    def spec(self) -> ModelSpec | None:
        """The network's rows, or None where there is no YAML or none that can be read here."""
        if not self.cfg:
            return None
        try:
            return load_spec({"yaml_file": self.origin, **self.cfg})
        except UserError:
            return None


@dataclass(frozen=True)
class _Filled:
    """A tensor of the network, and how much of it came from where."""

    target: str
    source: str | None
    elements: int
    whole: bool
    note: str = ""
    adapted: bool = False


def transfer(model: Model, source: Source, *, own_anchors: bool = False) -> TransferReport:
    """Copies into ``model``, in place, all that has a place there, and reports what became of every row.

    Args:
        own_anchors: anchors that the model's YAML lists stay, whatever the source has; else only where the source's YAML lists others.
    """
    spec = source.spec()
    shapes = {name: tuple(value.shape) for name, value in source.weights.items()}
    alignment = align(_structure(shapes, spec), structure_of(model))
    others = _other_anchors(model, source, alignment)
    keep_anchors = (own_anchors and others) or (spec is not None and spec.anchors != model.spec.anchors)  # then the file means its own
    filled = _fill(model, source, alignment, keep_anchors=keep_anchors)
    in_rows = {f"model.{i}.{name}" for i, inner in rows_of(shapes).items() for name in inner}
    loose = sum(prod(shape) for name, shape in shapes.items() if name not in in_rows and counts(name))
    rows = (*_row_reports(alignment, filled), *_left_out({"tensors of no row": loose}))
    remark = f"those that {model.spec.origin} lists stay; the checkpoint has others" if keep_anchors and others else ""
    return TransferReport(source.origin, rows, _whole(alignment, filled), len(model.state_dict()), remark)


def _other_anchors(model: Model, source: Source, alignment: Alignment) -> bool:
    """Whether the model's YAML lists anchors, and the source has others."""
    ours = getattr(model.head, "anchors", None)
    theirs = source.weights.get(f"model.{alignment.source.rows[-1].index}.anchors") if alignment.source.rows else None
    if ours is None or theirs is None or getattr(model.head, "only_counted", False):
        return False
    return theirs.shape != ours.shape or not torch.allclose(theirs.to(ours), ours, rtol=SAME_ANCHORS)


def fill_rows(
    model: Model, weights: Mapping[str, Tensor], *, rows: Sequence[int], origin: str, left_out: Mapping[str, int]
) -> TransferReport:
    """Copies into ``rows`` of ``model``, in place, the tensors of the same name and shape; the report is about these rows alone.

    Args:
        left_out: elements that the origin holds besides, by what they are.
    """
    theirs, ours = structure_of_weights({name: tuple(value.shape) for name, value in weights.items()}, None), structure_of(model)
    theirs, ours = (s._replace(rows=tuple(replace(row, is_head=False) for row in s.rows)) for s in (theirs, ours))  # all by name
    place = {row.index: position for position, row in enumerate(theirs.rows)}
    of_target = tuple(place.get(row.index, NONE) for row in ours.rows)
    alignment = Alignment(theirs, ours, tuple(row.index for row in theirs.rows), of_target)
    filled = _fill(model, Source(weights), alignment)
    reports = [report for report in _row_reports(alignment, filled) if report.target is None or report.target in rows]
    tensors = sum(len(ours.rows[i].tensors) for i in rows)
    return TransferReport(origin, (*reports, *_left_out(left_out)), _whole(alignment, filled), tensors)


@torch.no_grad()
def _fill(model: Model, source: Source, alignment: Alignment, *, keep_anchors: bool = True) -> dict[int, list[_Filled]]:
    """Copies what belongs together; gives what was filled by position of the target's rows."""
    own = model.state_dict()
    own_channels, filled = _Channels((source.ch, model.ch), first_convolutions(model)), {}
    for position, row in enumerate(alignment.target.rows):
        partner = alignment.of_target[position]
        if partner == NONE:
            continue
        theirs = alignment.source.rows[partner]
        if row.is_head:
            moves = head_moves(alignment, Classes(source.names, model.names), keep_anchors=keep_anchors)
        else:
            moves = [Move(row.places[p], theirs.places[p]) for p in row.places if p in theirs.places]
        filled[position] = _copy_row(own, source.weights, row, theirs, moves, own_channels)
    return filled


def _structure(shapes: Mapping[str, Shape], spec: ModelSpec | None) -> Structure:
    try:
        return structure_of_weights(shapes, spec)
    except UserError:  # a row that is not known here: names and shapes still say a lot
        return structure_of_weights(shapes, None)


class _Channels(NamedTuple):
    """Channels of the images of source and target, and the target's weights that read them."""

    numbers: tuple[int, int]
    read_by: frozenset[str]


def _copy_row(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], row: Row, partner: Row, moves: Sequence[Move], channels: _Channels
) -> list[_Filled]:
    """Copies the tensors of one row; a first convolution is adapted to the channels of the images."""
    filled = []
    for move in moves:
        name = f"model.{row.index}.{move.target}"
        mine, theirs = own[name], weights[f"model.{partner.index}.{move.source}"]
        if move.rows is not None:
            index, other = (torch.tensor(i, device=mine.device) for i in move.rows)
            mine.index_copy_(move.dim, index, theirs.to(mine).index_select(move.dim, other))
            elements = mine.numel() // mine.shape[move.dim] * len(index)
            filled.append(_Filled(move.target, move.source, elements, elements == mine.numel(), move.note))
        elif mine.shape == theirs.shape:
            mine.copy_(theirs)
            filled.append(_Filled(move.target, move.source, mine.numel(), True))
        elif name in channels.read_by:
            adapted = adapted_tensor(theirs, tuple(mine.shape), channels=channels.numbers)
            if adapted is not None:
                mine.copy_(adapted)
                note = "first convolution adapted from {} to {} input channels".format(*channels.numbers)
                filled.append(_Filled(move.target, move.source, mine.numel(), False, note, adapted=True))  # to be trained on
    return filled + _enabled_scales(own, row, partner, filled)


def _enabled_scales(own: Mapping[str, Tensor], row: Row, partner: Row, filled: Sequence[_Filled]) -> list[_Filled]:
    """γ = 1 for a module whose partner does not start as the identity: it took effect there, so it does here."""
    scales = [name for place, name in row.places.items() if place.name.endswith(SCALE) and place not in partner.places]
    scales = [name for name in scales if any(f.target.startswith(name.removesuffix(GAMMA)) for f in filled)]
    for name in scales:
        own[f"model.{row.index}.{name}"].fill_(1.0)
    return [_Filled(name, None, 1, True, "γ set to 1") for name in scales]


def _row_reports(alignment: Alignment, filled: Mapping[int, Sequence[_Filled]]) -> list[RowReport]:
    """The target's rows in order, then those of the source that went nowhere; rows without tensors are left out."""
    rows = []
    for position, row in enumerate(alignment.target.rows):
        partner = alignment.of_target[position]
        if row.size:
            rows.append(_row_report(row, alignment.source.rows[partner] if partner != NONE else None, filled.get(position, ())))
    used = {alignment.of_target[position] for position, parts in filled.items() if parts}
    return rows + [_dropped(row) for position, row in enumerate(alignment.source.rows) if row.size and position not in used]


def _whole(alignment: Alignment, filled: Mapping[int, Sequence[_Filled]]) -> frozenset[str]:
    return frozenset(f"model.{alignment.target.rows[p].index}.{f.target}" for p, parts in filled.items() for f in parts if f.whole)


def _row_report(row: Row, partner: Row | None, filled: Sequence[_Filled]) -> RowReport:
    parts = [f for f in filled if counts(f.target)]
    landed = sum(f.elements for f in parts)
    if partner is None or not parts:
        return RowReport(None, row.index, row.kind, FRESH, 0, 0, row.size)
    notes = dict.fromkeys(f.note for f in parts if f.note)
    left = len(partner.tensors) - len({f.source for f in filled if f.source})
    notes |= {f"{left} tensors of the source have no place": None} if left and landed == row.size else {}
    if landed < row.size:
        notes |= {f"{100 * landed / row.size:.1f} % filled".replace("100.0", ">99.9"): None}
    if (len(notes) > 1 and landed < row.size) or any(f.adapted for f in parts):
        outcome = ADAPTED
    elif landed < row.size:
        outcome = PARTIAL
    else:
        outcome = KEPT if row.index == partner.index else MOVED
    return RowReport(partner.index, row.index, row.kind, outcome, landed, partner.size, row.size, "; ".join(notes))


def _dropped(row: Row) -> RowReport:
    return RowReport(row.index, None, row.kind, DROPPED, 0, row.size, 0)


def _left_out(sizes: Mapping[str, int]) -> list[RowReport]:
    return [RowReport(None, None, what, DROPPED, 0, size, 0) for what, size in sizes.items() if size]
