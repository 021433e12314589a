"""The command line of a script, made from the flags of its config, and the flags of other YOLOs that it knows by name."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from utils.cli.flags import Flag, flags_of
from utils.cli.parser import OneLineParser
from utils.errors import UserError


@dataclass(frozen=True)
class Command:
    """What a script accepts on its command line.

    Attributes:
        config_class: the dataclass whose fields are its flags.
        prog: name of the script.
        description: first line of ``--help``.
        refused: flags of other YOLOs -> why they are not here, and what to write instead.
        accepted: flags of other YOLOs that change nothing -> why, which is printed.
        ignored: flags of other YOLOs that change nothing, without a word -> the number of their values.
    """

    config_class: type
    prog: str
    description: str
    refused: Mapping[str, str] = field(default_factory=dict)
    accepted: Mapping[str, str] = field(default_factory=dict)
    ignored: Mapping[str, int] = field(default_factory=dict)

    def read(self, argv: Sequence[str] | None = None, *, epilog: str = "") -> dict[str, Any]:
        """Name of a field -> value, for the flags that were given; several values as a tuple. ``epilog`` is the end of ``--help``.

        Raises:
            UserError: a flag that is refused, or an empty text where one has no meaning.
        """
        given = vars(self.build_parser(epilog=epilog).parse_args(argv))
        for spelling in given.pop("refused", ()):
            raise UserError(f"{spelling}: {self.refused[spelling]}")
        for spelling in given.pop("accepted", ()):
            print(f"{spelling}: {self.accepted[spelling]}")
        given.pop("ignored", None)
        for name, value in given.pop("shorthands", ()):
            given.setdefault(name, value)
        for flag in flags_of(self.config_class):
            _check_is_given(flag, given.get(flag.name))
        return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}

    def build_parser(self, *, epilog: str = "") -> argparse.ArgumentParser:
        """A parser that sets only what was given, so that the defaults of the config hold; prefixes such as ``--batch`` are accepted."""
        parser = OneLineParser(
            prog=self.prog,
            description=self.description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            argument_default=argparse.SUPPRESS,
        )
        for section, flags in self.sections():
            group = parser.add_argument_group(section) if section else parser
            for flag in flags:
                names = (flag.name,) if flag.positional else (flag.spelling, *flag.aliases)
                group.add_argument(*names, **_argparse_options(flag))
                for spelling, value in flag.shorthands.items():
                    hidden: dict[str, Any] = {"dest": "shorthands", "const": (flag.name, value), "help": argparse.SUPPRESS}
                    group.add_argument(spelling, action="append_const", **hidden)
        for dest, known in (("refused", self.refused), ("accepted", self.accepted)):
            for spelling in known:
                parser.add_argument(spelling, dest=dest, action=_Noted, nargs="*", help=argparse.SUPPRESS)
        for spelling, count in self.ignored.items():
            parser.add_argument(spelling, dest="ignored", action=_Noted, nargs=count, help=argparse.SUPPRESS)
        return parser

    def sections(self) -> Iterator[tuple[str, list[Flag]]]:
        """Title and flags of every section, in the order of the fields."""
        by_title: dict[str, list[Flag]] = {}
        for flag in flags_of(self.config_class):
            by_title.setdefault(flag.section, []).append(flag)
        yield from by_title.items()


def _check_is_given(flag: Flag, value: Any) -> None:
    """Refuses an empty text, which is an unset shell variable more often than a wish."""
    if not flag.may_be_empty and any(v == "" for v in (value if isinstance(value, list) else [value])):
        raise UserError(f"{flag.spelling} '': an empty value (a shell variable that is not set?); give one, or leave {flag.spelling} out")


def shown_value(value: Any) -> str:
    """A value as it is typed; empty for None, an empty text and an empty tuple."""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def _argparse_options(flag: Flag) -> dict[str, Any]:
    default = "" if flag.default in (None, False) else shown_value(flag.default)
    text = flag.help + (f" (default {default})" if default else "")
    if flag.scalar is bool:
        return {"action": "store_true", "help": text}
    if flag.positional:
        return {"nargs": "?", "default": argparse.SUPPRESS, "metavar": flag.metavar, "help": text}
    nargs = flag.nargs or ("+" if flag.many else None if flag.const is None else "?")
    metavar = flag.metavar or {int: "N", float: "X"}.get(flag.scalar)
    options = {"nargs": nargs, "const": flag.const, "metavar": metavar, "type": flag.scalar if flag.scalar is not str else None}
    return {"help": text, **{name: value for name, value in options.items() if value is not None}}


class _Noted(argparse.Action):
    """Remembers that a flag was given, whatever follows it."""

    def __call__(self, parser: object, namespace: argparse.Namespace, values: object, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, []), self.option_strings[0]])
