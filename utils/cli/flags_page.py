"""docs/flags.md, made from the fields of the configs.

Example:
    python -m utils.cli.flags_page        # writes docs/flags.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from utils.cli import detect_arguments, explain_arguments, export_arguments, study_arguments, train_arguments, val_arguments
from utils.cli.command import Command, shown_value
from utils.cli.flags import Flag, flags_of, resumable_names
from utils.hyperparameters import Hyperparameters

PAGE = Path(__file__).parents[2] / "docs" / "flags.md"
COMMANDS = (
    train_arguments.COMMAND, val_arguments.COMMAND, detect_arguments.COMMAND, export_arguments.COMMAND, study_arguments.COMMAND,
    explain_arguments.COMMAND,
)  # fmt: skip
INTRODUCTION = """# Flags

Made by `python -m utils.cli.flags_page` from the fields of `TrainConfig`, `ValConfig`, `DetectConfig`, `ExportConfig`,
`StudyConfig` and `ExplainConfig`: a flag is defined there once, and argparse, the checks of its value, the rules of `--resume` and this
page follow. From Python the same names, with underscores, are parameters of these classes. A unique beginning of a flag is enough
(`--batch`, `--conf`); `--help` prints the same list.
"""
_TYPE_NAMES = {bool: "switch", int: "integer", float: "number", str: "text"}
_MARKDOWN = str.maketrans({"|": r"\|", "<": "&lt;", "*": r"\*"})


def main() -> int:
    """Writes the page; returns the exit status."""
    PAGE.write_text(format_page(), encoding="utf-8")
    print(f"{PAGE}: written")
    return 0


def format_page() -> str:
    """The whole page as Markdown."""
    return "\n".join([INTRODUCTION, *(line for command in COMMANDS for line in _command_lines(command)), *_hyperparameter_lines()])


def _command_lines(command: Command) -> Iterator[str]:
    """Heading, table of flags, and what is known by name only."""
    flags = flags_of(command.config_class)
    resumable = resumable_names(command.config_class)
    yield f"## {command.prog}\n"
    if resumable:
        yield "Flags without a yes under `--resume` would make the run another one and are refused beside it.\n"
    yield from _table(
        ["Flag", "Type", "Default", "Allowed", *(["With `--resume`"] if resumable else []), "Meaning"],
        [[_spellings(f), _type_name(f), *_values(f), *([_yes(f.resumable)] if resumable else []), _escaped(f.help)] for f in flags],
    )
    for spelling, value, flag in ((s, v, f) for f in flags for s, v in f.shorthands.items()):
        yield f"`{spelling}` stands for `{flag.spelling}{'' if value is True else f' {value}'}`.\n"
    if command.refused:
        yield "Refused by name, with what to write instead:\n"
        yield from (f"- `{spelling}`: {_escaped(text)}" for spelling, text in command.refused.items())
        yield ""
    if command.accepted or command.ignored:
        yield "Accepted, without effect:\n"
        yield from (f"- `{spelling}`: {_escaped(text)}" for spelling, text in command.accepted.items())
        yield from (f"- `{spelling}`" for spelling in command.ignored)
        yield ""


def _hyperparameter_lines() -> Iterator[str]:
    yield "## Hyper-parameters\n"
    yield "Keys of a YAML file for `train.py --hyp`; what each family of models takes is in [training.md](training.md).\n"
    rows = [[f"`{key.name}`", _type_name(key), *_values(key), _escaped(key.help)] for key in flags_of(Hyperparameters)]
    yield from _table(["Key", "Type", "Default", "Allowed", "Meaning"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(row)} |"
    yield ""


def _spellings(flag: Flag) -> str:
    return ", ".join(f"`{spelling}`" for spelling in (flag.spelling, *flag.aliases))


def _type_name(flag: Flag) -> str:
    name = _TYPE_NAMES[flag.scalar]
    if flag.many or flag.nargs in ("+", "*"):
        return f"{name}, one or more"
    return name if flag.const is None else f"{name}; alone: {flag.const}"


def _values(flag: Flag) -> tuple[str, str]:
    """Default and allowed values."""
    default = "" if flag.scalar is bool else shown_value(flag.default)
    special = "".join(f"; {value}: {meaning}" for value, meaning in flag.special.items())
    return f"`{default}`" if default else "", _escaped(flag.allowed + special)


def _yes(value: bool) -> str:
    return "yes" if value else ""


def _escaped(text: str) -> str:
    return text.translate(_MARKDOWN)


if __name__ == "__main__":
    sys.exit(main())
