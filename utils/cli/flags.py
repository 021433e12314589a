"""A flag is defined once, on the field of the frozen dataclass that holds it: name, type, default, allowed values, help, use with --resume.

argparse (``utils.cli.command``), the checks of a config's values, the rules of ``--resume`` and docs/flags.md are made from these fields.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from utils.errors import UserError
from utils.reading.text_files import path_fault

LARGEST_WHOLE = 10**9  # where a flag names no largest number
_METADATA_KEY = "flag"


@dataclass(frozen=True)
class Flag:
    """How a field is given on a command line, and which values it may have.

    Attributes:
        help: one line for ``--help`` and docs/flags.md, without the default.
        section: title of the section of ``--help`` that begins with this flag; empty continues the one before.
        aliases: further spellings, with their dashes.
        shorthands: flags without a value -> the value of this one that they stand for; the flag itself takes precedence.
        metavar: what stands for the value in ``--help``; None means N for integers, X for numbers.
        nargs: number of values as argparse counts them, where the annotation does not say it.
        const: the value of a flag that is given without one.
        least: smallest allowed number.
        most: largest allowed number.
        below: number that all allowed ones are smaller than.
        special: further allowed values -> what they mean.
        choices: allowed texts, in any letter case; an empty default is allowed too.
        hint: added to the message about a value that is not allowed.
        may_be_empty: whether an empty text on the command line means something.
        fault: says why a text is not allowed; an empty answer where it is.
        positional: whether it is given by place, without its name.
        resumable: whether it may be given together with ``--resume``; any other would make the run another one.
        name: of the field. This and what follows is filled in by ``flags_of``.
        default: of the field.
        scalar: type of one value: bool, int, float or str.
        many: whether the field is a tuple of them.
        mixed: whether the field also takes values of other types, which its class converts and checks by itself.
    """

    help: str
    section: str = ""
    aliases: tuple[str, ...] = ()
    shorthands: Mapping[str, Any] = field(default_factory=dict)
    metavar: str | None = None
    nargs: str | None = None
    const: Any = None
    least: float | None = None
    most: float | None = None
    below: float | None = None
    special: Mapping[int, str] = field(default_factory=dict)
    choices: tuple[str, ...] = ()
    hint: str = ""
    may_be_empty: bool = False
    fault: Callable[[str], str] = path_fault
    positional: bool = False
    resumable: bool = False
    name: str = ""
    default: Any = None
    scalar: type = str
    many: bool = False
    mixed: bool = False

    @property
    def spelling(self) -> str:
        """As it is typed: ``--batch-size``, and what stands for a value without a name."""
        return self.metavar or self.name if self.positional else spelling_of(self.name)

    @property
    def allowed(self) -> str:
        """The allowed values in words, such as ``at least 1``; empty where all of the type are."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.below is not None:
            return f"at least {_number(self.least)} and below {_number(self.below)}"
        if self.most is not None:
            return f"from {_number(self.least)} to {_number(self.most)}"
        return "" if self.least is None else f"at least {_number(self.least)}"


def flag(default: Any, help: str, **options: Any) -> Any:
    """A dataclass field that is a flag; ``options`` are attributes of ``Flag``."""
    return field(default=default, metadata={_METADATA_KEY: Flag(help, **options)})


def flags_of(config_class: type) -> tuple[Flag, ...]:
    """The flags of a config class in the order of its fields; fields that are no flags are left out."""
    return _resolve_flags(config_class)


def resumable_names(config_class: type) -> frozenset[str]:
    """Names of the fields that may be given anew together with ``--resume``."""
    return frozenset(flag.name for flag in flags_of(config_class) if flag.resumable)


def spelling_of(name: str) -> str:
    """The flag of a field: ``batch_size`` -> ``--batch-size``."""
    return f"--{name.replace('_', '-')}"


def validate_flags(config: Any) -> None:
    """Checks the values of a frozen dataclass, for its ``__post_init__``.

    What Python users naturally pass is converted first: paths, lists, one value where several are allowed, names in another letter case.

    Raises:
        UserError: a value of another type, or one that is not allowed.
    """
    for flag in flags_of(type(config)):
        value = getattr(config, flag.name)
        if not flag.mixed:
            value = _converted(flag, value)
            object.__setattr__(config, flag.name, value)
        _check(flag, value)


@cache
def _resolve_flags(config_class: type) -> tuple[Flag, ...]:
    """The flags with what the annotations and defaults of their fields say."""
    hints = get_type_hints(config_class)
    section, resolved = "", []
    for item in fields(config_class):
        flag = item.metadata.get(_METADATA_KEY)
        if flag is not None:
            section = flag.section or section
            scalar, many, mixed = _type_of(hints[item.name])
            resolved.append(replace(flag, section=section, name=item.name, default=item.default, scalar=scalar, many=many, mixed=mixed))
    return tuple(resolved)


def _type_of(hint: Any) -> tuple[type, bool, bool]:
    """Type of one value, whether there are several, and whether other types are allowed too; ``| None`` makes no difference."""
    choices = set(get_args(hint)) - {type(None)} if get_origin(hint) in (Union, UnionType) else {hint}
    if len(choices) > 1:
        return str, False, True
    (hint,) = choices
    if get_origin(hint) is tuple:
        scalar, _, mixed = _type_of(get_args(hint)[0])
        return scalar, True, mixed
    return hint, False, False


def _converted(flag: Flag, value: Any) -> Any:
    if not flag.many:
        return _converted_text(flag, value) if flag.scalar is str else value
    if value is None:
        return None if flag.default is None else ()
    values = (value,) if isinstance(value, (str, os.PathLike, int)) else tuple(value)
    if flag.scalar is not str:
        return values
    texts = tuple(_converted_text(flag, v) for v in values)
    return tuple(dict.fromkeys(texts)) if flag.choices else texts


def _converted_text(flag: Flag, value: Any) -> str:
    text = "" if value is None or value is False else str(value)
    return next((choice for choice in flag.choices if choice.lower() == text.lower()), text)


def _check(flag: Flag, value: Any) -> None:
    if value is None and flag.default is None:
        return
    values = value if flag.many else (value,)
    for v in values:
        if isinstance(v, str) and "://" not in v and (fault := flag.fault(v)):
            raise UserError(f"{flag.spelling}: {fault}")
        if flag.most is None and type(v) is int and abs(v) > LARGEST_WHOLE:
            raise UserError(f"{flag.spelling} {_shown(v)}: at most {LARGEST_WHOLE} is possible")
    if all(_is_allowed(flag, v) for v in values) and (values or flag.least is None):
        return
    shown = " ".join(map(str, value[:9])) if flag.many else _shown(value)
    raise UserError(f"{flag.spelling} {shown}: {_expected(flag)}" + (f"; {flag.hint}" if flag.hint else ""))


def _shown(value: Any) -> str:
    """A value in a message: as it was typed, texts in quotes, and cut."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _number(value: float | None) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _is_allowed(flag: Flag, value: Any) -> bool:
    if flag.choices:
        return value in flag.choices or value == flag.default == ""
    if flag.scalar not in (int, float) or flag.mixed:
        return True
    if isinstance(value, bool) or not isinstance(value, (int, flag.scalar)):
        return False
    if value in flag.special:
        return True
    least, most, below = flag.least, flag.most, flag.below
    return (least is None or value >= least) and (most is None or value <= most) and (below is None or value < below)


def _expected(flag: Flag) -> str:
    """``a whole number of at least 1 is needed``."""
    if flag.choices:
        return f"{flag.allowed} is needed"
    kind = "whole number" if flag.scalar is int else "number"
    bounds = f" of {flag.allowed}" if flag.allowed.startswith("at") else f" {flag.allowed}" if flag.allowed else ""
    if flag.many:
        return f"{kind}s{bounds} are needed"
    special = ", ".join(f"or {value} for {meaning}" for value, meaning in flag.special.items())
    return f"a {kind}{bounds}{f', {special},' if special else ''} is needed"
