"""How a YAML row's arguments become constructor arguments and an output width: ten rules for all blocks.

A rule is ``(args, context) -> LayerPlan``. It never sees other rows or the block's name; the parser adds those.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, get_args, get_origin

from tasks.keypoints import Keypoints
from utils.errors import UserError

Channels: TypeAlias = "int | tuple[int, ...]"  # a tuple for a layer that gives several maps (CBLinear)
# Former names of the rules, which users' files may still have.
FORMER_NAMES = {
    "projects": "out_width", "stacks": "out_width_repeated", "preserves": "keep_width", "attends": "same_width", "concatenates": "concat",
    "takes_first": "add", "folds": "rearrange", "splits": "split_maps", "fuses": "select_and_add", "detects": "head",
}  # fmt: skip
LARGEST_OPTION = 64  # a leading integer above it is read as a width, not as a reduction, a kernel or a number of heads


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a network: what to build and where its input comes from.

    A rule fills in ``args``, ``out_channels``, ``repeats`` and (where the dialect decides) ``cls``; the parser adds the rest.

    Attributes:
        args: positional constructor arguments.
        out_channels: output width; a tuple where the layer returns several maps; 0 for a head.
        repeats: how many copies of the layer follow each other; 1 where the block repeats inside itself.
        kwargs: keyword constructor arguments.
        cls: what to build; None means the registered class.
        index: row number over backbone and head.
        sources: absolute row numbers of the inputs, -1 for the image.
        name: registered name of the block.
        section: ``backbone`` or ``head``.
        identity_start: wrap the layer so that it begins as an exact no-op.
        repeat_args: constructor arguments of the second and later repeats, where they differ (c_out to c_out).
        takes_list: the layer's forward takes the list of its inputs, not a single map.
    """

    args: tuple[Any, ...]
    out_channels: Channels
    repeats: int = 1
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    cls: Callable[..., Any] | None = None
    index: int = -1
    sources: tuple[int, ...] = ()
    name: str = ""
    section: str = ""
    identity_start: bool = False
    repeat_args: tuple[Any, ...] | None = None
    takes_list: bool = False


class HeadForm(NamedTuple):
    """What decides, beside dialect and anchors, which of the heads of one name a row means."""

    end2end: bool = False  # the file's key: a one-to-one branch beside the one-to-many one
    reg_max: int | None = None  # the file's key: bins of a box side's distribution; None: the head's own
    light_classes: bool = False  # whether the blocks before the head are those of YOLOv10 and later
    keypoints: Keypoints | None = None  # the file's keys, or the data set's


@dataclass(frozen=True)
class RuleContext:
    """What a rule can read of the row that it plans.

    Attributes:
        in_channels: width of each input, in the order of the row's ``from``.
        repeats: the row's number after depth scaling.
        width: scales a width that was written in the YAML.
        nc: number of classes.
        anchors: anchor sizes per level in px, or None where the file does not list them.
        dialect: ``"v5"``, ``"v8"`` or ``"v9"``, of models/spec/dialects.py.
        cls: the registered class, for its signature.
        kind: what the block is in a network, as registered.
        form: for a head, what the file and its blocks say of it.
    """

    in_channels: tuple[Channels, ...]
    repeats: int
    width: Callable[[int], int]
    nc: int
    anchors: tuple[tuple[float, ...], ...] | None
    dialect: str
    cls: Callable[..., Any]
    kind: str = "block"
    form: HeadForm = field(default_factory=HeadForm)

    @property
    def single(self) -> int:
        """Width of the one input."""
        if len(self.in_channels) != 1:
            raise UserError(f"takes one input, not {len(self.in_channels)}")
        if not isinstance(self.in_channels[0], int):
            raise UserError("reads a layer that gives several maps; only CBFuse can")
        return self.in_channels[0]

    @property
    def plain(self) -> tuple[int, ...]:
        """Widths of all inputs, each a single map."""
        if not all(isinstance(c, int) for c in self.in_channels):
            raise UserError("reads a layer that gives several maps; only CBFuse can")
        return self.in_channels  # type: ignore[return-value]


ChannelRule = Callable[[Sequence[Any], RuleContext], LayerPlan]


def __getattr__(name: str) -> Any:
    """Names the new rule where a user's file asks for one by its former name.

    Raises:
        UserError: the rule was renamed.
    """
    if name in FORMER_NAMES:
        raise UserError(f"channel rule {name!r} is now called {FORMER_NAMES[name]!r}: write rules.{FORMER_NAMES[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def make_divisible(channels: float, divisor: int = 8) -> int:
    """The smallest multiple of ``divisor`` that is not below ``channels``."""
    return math.ceil(channels / divisor) * divisor


def out_width(args: Sequence[Any], context: RuleContext) -> LayerPlan:
    """``[c_out, …]``: a layer from its input's width to ``c_out`` (scaled); repeats follow each other."""
    args, out = _once(args, context), width_argument(args, context)
    return LayerPlan((context.single, out, *args[1:]), out, context.repeats, repeat_args=(out, out, *args[1:]))


def out_width_repeated(args: Sequence[Any], context: RuleContext) -> LayerPlan:
    """``[c_out, …]`` with the repeats inside the block, as its third argument (C3, C2f, BoT3 …)."""
    args, out = _once(args, context, behind=3), width_argument(args, context)
    return LayerPlan((context.single, out, context.repeats, *args[1:]), out)


def keep_width(args: Sequence[Any], context: RuleContext) -> LayerPlan:
    """Arguments as they are; the width stays (up-sampling, pooling, identity)."""
    return LayerPlan(tuple(args), context.single, context.repeats)


def same_width(args: Sequence[Any], context: RuleContext) -> LayerPlan:
    """A same-width module, built as ``cls(channels, *options)``.

    A leading integer is the width if, raw or scaled, it equals the input's; otherwise it is the module's first option, if that
    option can take it; otherwise the row is wrong. The width may be written twice, as input's and output's (``[1024, 1024]``). A class may
    say with ``published_row`` that a row of so many arguments, all integers, holds no width, as its published files write it (AIFI), and
    with ``read_row(options)`` what the arguments behind the width mean, by place and by name, where rows leave some out (CBAM).
    """
    channels = context.single
    if args and all(map(_is_int, args)) and len(args) == getattr(context.cls, "published_row", 0):
        return LayerPlan((channels, *args), channels, context.repeats)
    if args and _is_int(args[0]):
        if channels in (args[0], context.width(args[0])):
            args = args[2:] if _width_twice(context.cls, args, behind=1) else args[1:]
        elif not _first_option_takes(context.cls, args[0], channels):
            scaled = context.width(args[0])
            kept = "the module keeps its input's width, which need not be written"
            raise UserError(f"width {args[0]} (scaled {scaled}) is not the input's {channels}; {kept}")
    read = getattr(context.cls, "read_row", None)
    placed, named = read(args) if read else (args, {})
    return LayerPlan((channels, *placed), channels, context.repeats, kwargs=named)


def concat(args: Sequence[Any], context: RuleContext) -> LayerPlan:
    """Joins its inputs along the channels."""
    return LayerPlan(tuple(args), sum(context.plain), takes_list=True)


def add(args: Sequence[Any], context: RuleContext) -> LayerPlan:
    """Adds inputs of one width (Shortcut)."""
    if len(set(context.plain)) != 1:
        raise UserError(f"adds its inputs, whose widths differ: {list(context.plain)}")
    return LayerPlan(tuple(args), context.plain[0], takes_list=True)


def rearrange(channels: Callable[..., int]) -> ChannelRule:
    """Moves space into channels or back: ``channels(c, *args)`` is the output width (ReOrg: 4 c)."""

    def rule(args: Sequence[Any], context: RuleContext) -> LayerPlan:
        return LayerPlan(tuple(args), channels(context.single, *args), context.repeats)

    rule.__name__ = "rearrange"
    return rule


def split_maps(args: Sequence[Any], context: RuleContext) -> LayerPlan:
    """``[[c1, c2, …]]``: one map in, one map a listed width out; the widths are not scaled (CBLinear)."""
    if not args or not isinstance(args[0], (list, tuple)) or not all(_is_int(c) for c in args[0]):
        raise UserError("expects a list of widths as its first argument, such as [[256, 512]]")
    widths = tuple(args[0])
    return LayerPlan((context.single, list(widths), *args[1:]), widths)


def select_and_add(args: Sequence[Any], context: RuleContext) -> LayerPlan:
    """``[[i, j, …]]``: picks map i of the first input, j of the second …, and adds them to the last input (CBFuse)."""
    *several, last = context.in_channels
    if not isinstance(last, int) or not args or len(args[0]) != len(several):
        raise UserError(f"expects one index for each of its {len(several)} split inputs, and a plain layer as its last input")
    for position, (choice, widths) in enumerate(zip(args[0], several)):
        if isinstance(widths, int) or not 0 <= choice < len(widths) or widths[choice] != last:
            raise UserError(f"input {position} gives widths {widths}; index {choice} should pick one of width {last}")
    return LayerPlan(tuple(args), last, takes_list=True)


def head(args: Sequence[Any], context: RuleContext) -> LayerPlan:
    """``[nc]`` or ``[nc, anchors]``: a head that reads several levels; it knows its dialect where it matters.

    Anchors are listed in px, or only counted: then the head begins with a guess, and training fits them to the data.

    The class may give ``for_row(*, anchors, dialect, form) -> class`` to choose between forms that share one name (Detect), and
    ``row_arguments(args) -> (anchors, further)`` for what follows nc in its rows; else anchors come first.
    """
    anchors, further = getattr(context.cls, "row_arguments", _anchors_first)(args[1:])
    if anchors is None and context.anchors is not None:
        anchors = context.anchors
    choose = getattr(context.cls, "for_row", None)
    cls = choose(anchors=anchors, dialect=context.dialect, form=context.form) if choose else context.cls
    nc = args[0] if args else context.nc
    anchor_based = getattr(cls, "anchor_based", False)
    if anchor_based and anchors is None:
        raise UserError("needs anchors: write [nc, anchors], and under anchors: either 3 or [w1, h1, w2, …] in px for each level")
    built = (nc, anchors, context.plain) if anchor_based else (nc, context.plain)
    options: dict[str, Any] = {}
    if context.form.reg_max is not None:
        if "reg_max" not in inspect.signature(cls).parameters:
            raise UserError("takes no reg_max; leave the key out")
        options["reg_max"] = context.form.reg_max
    if context.form.keypoints is not None and "keypoints" in inspect.signature(cls).parameters:
        options["keypoints"] = context.form.keypoints
    return LayerPlan((*built, *further), 0, cls=cls, takes_list=True, kwargs=options)


def _anchors_first(args: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """Anchors, None where none are given, and further arguments of a head's row after nc."""
    return (args[0], args[1:]) if args else (None, ())


def width_argument(args: Sequence[Any], context: RuleContext) -> int:
    """The output width that a row begins with, scaled. Raises UserError where it does not begin with one."""
    if not args or not _is_int(args[0]) or args[0] < 1:
        raise UserError(f"expects its output width as the first argument, not {args[0] if args else 'nothing'!r}")
    return context.width(args[0])


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _first_option_takes(cls: Callable[..., Any], value: int, channels: int) -> bool:
    """Whether the parameter after the channels can be the integer ``value``: an int within reach, or a width of its own (int | None)."""
    option = _option(cls, behind=1)
    if option is None:
        return False
    kinds = kinds_of(option.annotation)
    if "int" not in kinds:
        return option.annotation is inspect.Parameter.empty and _is_int(option.default) and 0 < value <= LARGEST_OPTION
    return 0 < value <= (channels if "None" in kinds else LARGEST_OPTION)


def _once(args: Sequence[Any], context: RuleContext, *, behind: int = 2) -> Sequence[Any]:
    """The arguments of an attention module that can change the width, without the second of two equal widths (``iRMB, [1024, 1024]``)."""
    twice = context.kind == "attention" and args and _is_int(args[0]) and context.plain == (context.width(args[0]),)
    return [args[0], *args[2:]] if twice and _width_twice(context.cls, args, behind=behind) else args


def _width_twice(cls: Callable[..., Any], args: Sequence[Any], *, behind: int) -> bool:
    """Whether a row gives its width as the input's and the output's: the same number again, where the first option is no width itself."""
    if len(args) < 2 or not _is_int(args[1]) or args[1] != args[0] or args[1] <= LARGEST_OPTION:
        return False
    option = _option(cls, behind=behind)
    if option is None:
        return True
    wide = _is_int(option.default) and option.default > LARGEST_OPTION
    return not wide and "None" not in kinds_of(option.annotation)


def _option(cls: Callable[..., Any], *, behind: int) -> inspect.Parameter | None:
    """The parameter behind so many others (the channels, the repeats) that a row can give by place."""
    parameters = list(inspect.signature(cls, eval_str=False).parameters.values())[behind:]
    if not parameters or parameters[0].kind not in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
        return None
    return parameters[0]


def kinds_of(annotation: Any) -> set[str]:
    """The names of the types that an annotation joins with ``|``: ``int | None`` gives int and None."""
    if isinstance(annotation, str):
        return {part.strip() for part in annotation.split("|")}
    if get_origin(annotation) is not None or get_args(annotation):
        return {"None" if a is type(None) else getattr(a, "__name__", str(a)) for a in get_args(annotation)}
    return {getattr(annotation, "__name__", str(annotation))}
