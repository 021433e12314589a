"""The capacity control: plain convolution blocks in place of a variant's modules, of as many parameters or multiply-adds.

An inserted module is compared with what the same capacity does without attention: ``ConvControl`` (models/layers/capacity.py) stands at the
same places, and its free widths are chosen so that each block matches its module within ``TOLERANCE``. Where a block in another place was
replaced, the control is the network before, with a block behind that row that matches what the replacement added.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_fields

import torch
from torch import Tensor, nn

from models.analysis.operations import multiply_adds
from models.edit.requests import AUXILIARY, read_insertion
from models.edit.rows import Edited, edit
from models.layers.attention.ops.identity import IdentityStart
from models.model import DRY_RUN_SIZE, Model, build_layer
from models.spec.planning import plan_layers
from utils.sizes import round_up_to_stride

BLOCK = "ConvControl"
KINDS = ("params", "flops")
TOLERANCE = 0.02  # of the module's parameters or multiply-adds
ENOUGH = 0.002  # a closer match is not searched for
KERNELS = (3, 1, 5, 7)  # in the order in which they are tried


@dataclass(frozen=True)
class Place:
    """What a variant adds at one place of the network that it is made from.

    Attributes:
        row: behind which it stands.
        auxiliary: whether auxiliary branches read it.
        channels: of that row's output.
        pixels: of that row's output.
        parameters, multiply_adds: that are added there.
        identity: whether it starts as the identity.
    """

    text: str
    row: int
    auxiliary: bool
    channels: int
    pixels: int
    parameters: int
    multiply_adds: int
    identity: bool

    def budget(self, kind: str) -> int:
        """What a control block has to match."""
        return self.parameters if kind == "params" else self.multiply_adds


@dataclass(frozen=True)
class Design:
    """Widths and kernel of a block: C → hidden → middle → C."""

    hidden: int
    middle: int
    kernel: int

    def parameters(self, channels: int) -> int:
        convolutions = channels * (self.hidden + self.middle) + self.kernel**2 * self.hidden * self.middle
        return convolutions + 2 * (self.hidden + self.middle + channels)  # of the batch norms

    def multiply_adds(self, channels: int, pixels: int) -> int:
        return pixels * (channels * (self.hidden + self.middle) + self.kernel**2 * self.hidden * self.middle)

    def cost(self, place: Place, kind: str) -> int:
        return self.parameters(place.channels) if kind == "params" else self.multiply_adds(place.channels, place.pixels)


@dataclass(frozen=True)
class Control:
    """The blocks that take the place of a variant's modules.

    Attributes:
        insertions: as ``--attention`` takes them; empty where no module is large enough for a block.
        notes: what has no block, a line each.
    """

    insertions: tuple[str, ...]
    notes: tuple[str, ...]


def control_of(base: Model, insert: Sequence[str], replace: Sequence[str], *, kind: str, imgsz: int, init: str = "") -> Control:
    """The control of a variant: what to insert into ``base`` in place of its modules.

    Args:
        base: the network before the variant's edits.
        insert, replace: the variant's edits.
        kind: ``params`` or ``flops``.
        imgsz: px, for which multiply-adds are matched.
        init: how the variant's insertions start.

    Raises:
        UserError: an edit cannot be made.
    """
    insertions, notes = [], []
    for place in added_places(base, insert, replace, imgsz=imgsz, init=init):
        design = match(place, kind)
        if design is None:
            notes.append(_too_small(place, kind))
            continue
        options = f"hidden={design.hidden}, middle={design.middle}, kernel={design.kernel}{', init=identity' if place.identity else ''}"
        insertions.append(f"{BLOCK}@{place.row}{AUXILIARY if place.auxiliary else ''}({options})")
    return Control(tuple(insertions), tuple(notes))


def match(place: Place, kind: str) -> Design | None:
    """The block whose cost is that of the place within ``TOLERANCE``; None where there is none.

    The nearest to equal widths with the first kernel that gives a close match is taken, else the closest match of all.
    """
    budget = place.budget(kind)
    best: tuple[float, Design] | None = None
    for design in _designs(place, kind):
        error = abs(design.cost(place, kind) - budget) / max(budget, 1)
        if best is None or error < best[0]:
            best = error, design
        if error <= ENOUGH:
            break
    return best[1] if best and best[0] <= TOLERANCE else None


def _designs(place: Place, kind: str) -> Iterator[Design]:
    """Blocks of about the right cost: for each kernel, the widths from equal to more and more unequal."""
    c = place.channels
    norm = 2 if kind == "params" else 0  # values of a batch norm for each channel
    budget = place.budget(kind) / (1 if kind == "params" else place.pixels) - norm * c
    for k in (kernel**2 for kernel in KERNELS):
        side = c + norm
        equal = (math.sqrt(side**2 + k * max(budget, 0)) - side) / k  # k h² + 2 (c + norm) h = budget
        first = max(int(equal), 1)
        for step in range(max(first // 2, 4)):
            for hidden in dict.fromkeys((first + step, max(first - step, 1))):
                middle = (budget - side * hidden) / (k * hidden + side)
                for m in (math.floor(middle), math.ceil(middle)):
                    if m >= 1:
                        yield Design(hidden, m, math.isqrt(k))


def added_places(base: Model, insert: Sequence[str], replace: Sequence[str], *, imgsz: int, init: str = "") -> list[Place]:
    """What the edits add, place by place, in the order of the edits.

    Raises:
        UserError: an edit cannot be made.
    """
    side = round_up_to_stride(imgsz, base.stride)
    places = []
    for text in insert:
        for one, auxiliary in _single_positions(text):
            edited = edit(base.spec, insert=one, init=init)
            for new in edited.inserted:
                layer, row = _layer_of(edited, new), _row_before(edited, new)
                places.append(_place(base, row, layer, _multiply_adds(layer, [_map(base, row, side)]), text=one, auxiliary=auxiliary))
    for text in replace:
        edited = edit(base.spec, replace=text)
        for row in edited.replaced:  # nothing else is edited, so that rows keep their numbers
            layer, old = _layer_of(edited, row), base.model[row]
            maps = [_map(base, source, side) for source in base.plans[row].sources]
            more = _multiply_adds(layer, maps) - _multiply_adds(old, maps)
            place = _place(base, row, layer, more, text=f"{text.split('@')[0]}@{row}", auxiliary=True)
            places.append(replace_fields(place, parameters=place.parameters - _parameters(old)))
    return [replace_fields(place, pixels=_map(base, place.row, side)[0, 0].numel()) for place in places]


def _place(base: Model, row: int, layer: nn.Module, multiply_adds: int, *, text: str, auxiliary: bool) -> Place:
    identity = isinstance(layer, IdentityStart)
    channels = base.plans[row].out_channels
    assert isinstance(channels, int)  # what has several maps takes no module behind it
    return Place(text, row, auxiliary, channels, 0, _parameters(layer), multiply_adds, identity)


def _single_positions(text: str) -> Iterator[tuple[str, bool]]:
    """``EMA@4,6(factor=8)`` as ``EMA@4(factor=8)`` and ``EMA@6(factor=8)``, each with whether auxiliary branches read it."""
    request = read_insertion(text)
    arguments = text[text.index("(") :] if "(" in text else ""
    for position in request.positions:
        yield f"{request.module}@{position.name}{AUXILIARY if position.auxiliary else ''}{arguments}", position.auxiliary


def _layer_of(edited: Edited, row: int) -> nn.Module:
    return build_layer(plan_layers(edited.spec)[row], edited.spec).eval()


def _map(base: Model, row: int, side: int) -> Tensor:
    """A blank output of a row, of the image for -1, for an input of ``side`` px: (1, C, H, W)."""
    if row < 0:
        return torch.zeros(1, base.ch, side, side)
    _, channels, height, width = base.shapes[row]
    return torch.zeros(1, channels, height * side // DRY_RUN_SIZE, width * side // DRY_RUN_SIZE)


def _multiply_adds(layer: nn.Module, maps: Sequence[Tensor]) -> int:
    was_training = layer.training
    layer.eval()
    total = multiply_adds(layer, maps[0] if len(maps) == 1 else list(maps))
    layer.train(was_training)
    return total


def _parameters(layer: nn.Module) -> int:
    """Of a layer, without the number that an identity start adds."""
    return sum(p.numel() for p in layer.parameters()) - isinstance(layer, IdentityStart)


def _row_before(edited: Edited, row: int) -> int:
    """The row of the network before the edits behind which an inserted row stands."""
    old_of = {new: old for old, new in edited.rows.items()}
    return old_of[plan_layers(edited.spec)[row].sources[0]]


def _too_small(place: Place, kind: str) -> str:
    smallest = Design(1, 1, 1).cost(place, kind)
    unit = "parameters" if kind == "params" else "multiply-adds"
    budget = place.budget(kind)
    if budget < smallest:
        return f"{place.text} adds {budget:,} {unit}, fewer than the smallest convolution block ({smallest:,}): nothing stands in its place"
    return f"{place.text} adds {budget:,} {unit}, which no convolution block matches within {TOLERANCE:.0%}: nothing stands in its place"
