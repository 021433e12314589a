"""Rows to layer plans: applies the channel rule of every row of a spec.

Text in a row is read as literals against an allow-list; nothing in it is ever run.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from models.spec.channel_rules import Channels, HeadForm, LayerPlan, RuleContext, make_divisible
from models.spec.families import HERE, TASK_HEADS, family_of, tasks_here
from models.spec.parser import ModelSpec, Row
from models.spec.registry import BLOCKS
from models.spec.row_arguments import check_arguments
from utils.errors import UserError
from utils.reading.limits import MOST_REPEATS

# Blocks of YOLOv10 and later, C3k2_EMA included: heads behind them have light class convolutions.
LIGHT_BLOCKS = ("A2C2f", "C2fCIB", "C3k2", "DSC3k2")
PLAIN_WORD = re.compile(r"^[\w.\-/ ]*$")


def plan_layers(spec: ModelSpec) -> list[LayerPlan]:
    """Applies the channel rule of every row. Raises UserError that quotes file, row and, for an unknown module, the nearest name."""
    plans: list[LayerPlan] = []
    for index, row in enumerate(spec.rows):
        where = f"{spec.origin}: row {index} [{row.module}]"
        try:
            plans.append(plan_row(spec, row, index, plans))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        except KeyError as error:
            if absent := _absent(spec, row):
                raise UserError(f"{spec.origin}: {absent}; a module of your own joins with --plugins") from error
            raise UserError(f"{spec.origin}: row {index}: {error.args[0]}") from error
    heads = [p.index for p in plans if p.out_channels == 0]
    if heads != [len(plans) - 1]:
        raise UserError(f"{spec.origin}: the last row should be the one head; heads stand at rows {heads or 'none'}")
    return plans


def _absent(spec: ModelSpec, row: Row) -> str:
    """What a file with an unknown module is: a network for another task or of a family that is not here; empty for neither."""
    if row.module in TASK_HEADS:
        return f"a network that {TASK_HEADS[row.module]} (its head is {row.module}); {tasks_here()}"
    family = family_of([other.module for other in spec.rows])
    return f"a {family}, a family that is not here (row {spec.rows.index(row)} is {row.module}); {HERE}" if family else ""


def needed(plans: Sequence[LayerPlan]) -> list[LayerPlan]:
    """The plans that the last one reads, directly or through others, in order."""
    wanted = {plans[-1].index}
    for plan in reversed(plans):
        if plan.index in wanted:
            wanted.update(plan.sources)
    return [plan for plan in plans if plan.index in wanted]


def doubtful_rows(spec: ModelSpec, plans: Sequence[LayerPlan]) -> str:
    """One line where the rows' numbers look as if a row was inserted and those behind it not renumbered, else empty.

    Two signs: a row that the head does not need, and a head that reads a bare Concat, which no published network does.
    """
    wanted = {plan.index for plan in needed(plans)}
    unread = [f"{plan.index} [{plan.name}]" for plan in plans if plan.index not in wanted]
    joined = [f"{index} [Concat]" for index in plans[-1].sources if index >= 0 and plans[index].name == "Concat"]
    signs = [f"row(s) {', '.join(unread)} lead nowhere: the head reads them neither directly nor through others"] if unread else []
    signs += [f"the head reads row(s) {', '.join(joined)}, where a block behind it is usual"] if joined else []
    if not signs:
        return ""
    remedy = "if a row was inserted or removed, every from behind it moves by one (python -m models.edit does)"
    return f"{spec.origin}: {'; '.join(signs)}; {remedy}"


def plan_row(spec: ModelSpec, row: Row, index: int, plans: Sequence[LayerPlan]) -> LayerPlan:
    """One row's plan, given those before it. Raises UserError or KeyError (unknown module) without naming the place."""
    block = BLOCKS[row.module]
    sources = _sources(row.source, index)
    in_channels: tuple[Channels, ...] = tuple(spec.ch if s < 0 else plans[s].out_channels for s in sources)
    if heads := [s for s, channels in zip(sources, in_channels) if channels == 0]:
        raise UserError(f"reads row {heads[0]}, the head, whose output is no feature map; the head should be the last row")
    args, options = _arguments(row.args, spec)
    start = options.pop("init", None)
    if start not in (None, "identity"):
        raise UserError(f"init: {start!r} is not known; 'identity' is")
    context = RuleContext(
        in_channels=in_channels,
        repeats=_repeats(row.number, spec.depth),
        width=width_rule(spec),
        nc=spec.nc,
        anchors=spec.anchors,
        dialect=spec.dialect,
        cls=block.cls,
        kind=block.kind,
        form=_head_form(spec) if block.kind == "head" else HeadForm(),
    )
    plan = block.channels(args, context)
    if both := plan.kwargs.keys() & options.keys():
        raise UserError(f"{min(both)} is given twice, by place and by name")
    cls = plan.cls or block.cls
    placed, of_row = _options_of_row(cls, plan.args, options, spec.scale)
    of_dialect = _defaults_of_dialect(cls, placed, spec.dialect)
    plan = replace(
        plan, cls=cls, args=placed, kwargs={**of_dialect, **of_row, **plan.kwargs, **options}, index=index, sources=sources,
        name=block.name, section=row.section, identity_start=start == "identity",
    )  # fmt: skip
    check_arguments(plan, block)
    within = hasattr(block.cls, "inner")  # C2f_EMA: the module inside keeps the width, whatever its block does
    if plan.identity_start and not within and in_channels != (plan.out_channels,):
        raise UserError(f"init: identity is for modules that keep their input's width, and this one gives {plan.out_channels} channels")
    return plan


def _head_form(spec: ModelSpec) -> HeadForm:
    light = any(row.module.startswith(LIGHT_BLOCKS) for row in spec.rows)
    return HeadForm(spec.end2end, spec.reg_max, light_classes=light, keypoints=spec.keypoints)


def _repeats(number: int, depth: float) -> int:
    repeats = max(round(number * depth), 1) if number > 1 else number
    if repeats > MOST_REPEATS:
        raise UserError(f"is repeated {repeats} times at depth multiple {depth:g}; at most {MOST_REPEATS} are built")
    return repeats


def _defaults_of_dialect(cls: Any, args: Sequence[Any], dialect: str) -> dict[str, Any]:
    """What a block's options are in files of this dialect where a row does not give them: ``cls.dialect_defaults``."""
    defaults = getattr(cls, "dialect_defaults", {}).get(dialect, {})
    by_place = list(inspect.signature(cls).parameters)[: len(args)] if defaults else []
    return {name: value for name, value in defaults.items() if name not in by_place}


def _options_of_row(
    cls: Any, args: tuple[Any, ...], options: Mapping[str, Any], scale: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """A row's arguments with what its block derives from them and from the scale: ``cls.row_options(given by place or name, scale)``.

    It gives options by name. They take the place of the row's arguments by place, but not of those that the row itself names.
    """
    derive = getattr(cls, "row_options", None)
    if derive is None:
        return args, {}
    names = list(inspect.signature(cls).parameters)[: len(args)]
    given = {**dict(zip(names, args)), **options}
    derived = {name: value for name, value in derive(given, scale).items() if name not in options}
    placed = tuple(derived.get(name, value) for name, value in zip(names, args)) + args[len(names) :]
    return placed, {name: value for name, value in derived.items() if name not in names}


def _sources(source: int | tuple[int, ...], index: int) -> tuple[int, ...]:
    given = (source,) if isinstance(source, int) else source
    absolute = tuple(s if s >= 0 else index + s for s in given)
    for written, s in zip(given, absolute):
        if s >= index:
            raise UserError(f"reads row {written}, which is not before it; a row reads earlier rows only")
        if s < (-1 if index == 0 else 0):
            raise UserError(f"reads {written}, which is before the first row")
    return absolute


def width_rule(spec: ModelSpec) -> Any:
    """The function that scales a width that a row of this file names."""
    own_output = spec.anchors_per_cell * (spec.nc + 5) if spec.dialect != "v8" else None

    def width(channels: int) -> int:
        if channels == own_output:
            return channels
        capped = min(channels, spec.max_channels) if spec.max_channels else channels
        return make_divisible(capped * spec.width)

    return width


def _arguments(args: Sequence[Any], spec: ModelSpec) -> tuple[list[Any], dict[str, Any]]:
    """Positional arguments and options of a row; options are its dictionaries, text is read as literals."""
    positional: list[Any] = []
    options: dict[str, Any] = {}
    for arg in args:
        if isinstance(arg, Mapping):
            options |= {str(k): _literal(v, spec) for k, v in arg.items()}
        else:
            positional.append(_literal(arg, spec))
    return positional, options


def _literal(value: Any, spec: ModelSpec) -> Any:
    """Numbers, booleans, None, ``nc``, ``anchors``, activations such as ``nn.LeakyReLU(0.1)``, and plain words."""
    if isinstance(value, (list, tuple)):
        return [_literal(v, spec) for v in value]
    if not isinstance(value, str):
        return value
    anchors = spec.anchors or spec.anchors_per_cell
    if value == "anchors" and not anchors:
        raise UserError("needs anchors, but the file has no anchors: key; write anchors: 3, or [w1, h1, w2, …] in px for each level")
    if value == "kpt_shape":
        if spec.keypoints is None:
            raise UserError("needs keypoints, but the file has no kpt_shape: key; write kpt_shape: [17, 3], keypoints and values of each")
        return spec.keypoints.shape
    named = {"None": None, "True": True, "False": False, "nc": spec.nc, "anchors": anchors}
    if value in named:
        return named[value]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    if value.startswith(("nn.", "torch.nn.")):
        from models.layers.conv import parse_activation

        return parse_activation(value)()
    if not PLAIN_WORD.match(value):
        raise UserError(f"argument {value!r} is neither a number, a plain word nor a known activation; text in a YAML is never run")
    return value
