"""Flags are defined once: what a field declares is what argparse, the checks, --resume and docs/flags.md do."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from utils.cli.command import Command
from utils.cli.flags import Flag, flag, flags_of, resumable_names, validate_flags
from utils.cli.flags_page import COMMANDS, PAGE, format_page
from utils.config import TrainConfig
from utils.errors import UserError

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Config:
    """Every kind of flag."""

    count: int = flag(3, "a count", section="numbers", least=1, special={-1: "the largest"}, resumable=True)
    share: float = flag(0.5, "a share", least=0, most=1)
    smoothing: float | None = flag(None, "left open", least=0, below=1)
    sizes: tuple[int, ...] = flag((64, 96), "sizes", least=32)
    text: str = flag("", "a text", section="texts", metavar="FILE", aliases=("--txt",))
    kind: str = flag("SGD", "a kind", choices=("SGD", "Adam"), shorthands={"--adam": "Adam"}, hint="see the manual")
    names: tuple[str, ...] = flag((), "names")
    where: str = flag("", "optional value", const="ram", choices=("ram", "disk"))
    on: bool = flag(False, "a switch")
    derived: int | None = None

    def __post_init__(self) -> None:
        validate_flags(self)


COMMAND = Command(
    Config, prog="x.py", description="X.", refused={"--old": "write --count"}, accepted={"--grid": "always"}, ignored={"--rank": 1}
)


def test_only_given_flags_are_set():
    assert COMMAND.read([]) == {}
    line = "--cou 5 --sizes 64 --txt a.txt --names a b --where --on --rank 1"
    expected = {"count": 5, "sizes": (64,), "text": "a.txt", "names": ("a", "b"), "where": "ram", "on": True}
    assert COMMAND.read(line.split()) == expected


def test_long_flag_wins_over_its_shorthand():
    assert COMMAND.read(["--adam"]) == {"kind": "Adam"}
    assert COMMAND.read(["--kind", "SGD", "--adam"]) == COMMAND.read(["--adam", "--kind", "SGD"]) == {"kind": "SGD"}


def test_unsupported_flags_are_refused_by_name(capsys):
    with pytest.raises(UserError, match=r"^--old: write --count$"):
        COMMAND.read(["--old", "7"])
    assert COMMAND.read(["--grid", "--on"]) == {"on": True}
    assert capsys.readouterr().out == "--grid: always\n"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"count": 0}, "--count 0: a whole number of at least 1, or -1 for the largest, is needed"),
        ({"count": 2.5}, "--count 2.5: a whole number"),
        ({"count": True}, "--count True: a whole number"),
        ({"share": 1.5}, "--share 1.5: a number from 0 to 1 is needed"),
        ({"share": float("nan")}, "--share nan: a number from 0 to 1 is needed"),
        ({"share": "half"}, "--share 'half': a number"),
        ({"share": None}, "--share None: a number"),
        ({"smoothing": 1}, "--smoothing 1: a number of at least 0 and below 1 is needed"),
        ({"sizes": (64, 16)}, "--sizes 64 16: whole numbers of at least 32 are needed"),
        ({"sizes": ()}, "--sizes : whole numbers of at least 32 are needed"),
        ({"kind": "LION"}, "--kind 'LION': one of SGD, Adam is needed; see the manual"),
        ({"kind": ""}, "--kind '': one of"),
        ({"where": "gpu"}, "--where 'gpu': one of ram, disk is needed"),
    ],
)
def test_invalid_values_are_refused(values, says):
    with pytest.raises(UserError) as caught:
        Config(**values)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


def test_python_values_are_converted():
    config = Config(count=-1, text=Path("a") / "b", kind="adam", names="one", sizes=[32], where=None)
    assert config == Config(count=-1, text=str(Path("a") / "b"), kind="Adam", names=("one",), sizes=(32,), where="")
    assert Config(names=None).names == ()


def test_an_unknown_option_of_a_flag_is_an_error():
    with pytest.raises(TypeError):
        flag(0, "help", at_least=1)


def test_resumable_flags_of_train():
    assert resumable_names(TrainConfig) == {
        "resume", "project", "data", "device", "workers", "cache", "plugins", "patience", "save_period", "save_steps", "nosave", "noplots",
        "plots", "nan_patience", "skip_nan", "logger", "checkpoint_activations",
    }  # fmt: skip


@pytest.mark.parametrize("flag", [f for command in COMMANDS for f in flags_of(command.config_class)], ids=lambda f: f.name)
def test_every_flag_has_help(flag: Flag):
    assert flag.help
    assert "\n" not in flag.help


def test_docs_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == format_page(), "run python -m utils.cli.flags_page"


@pytest.mark.parametrize("script", ["train", "val", "detect", "export"])
def test_command_lines_do_not_import_torch(script):
    code = f"import sys, utils.cli.{script}_arguments as m; m.COMMAND.build_parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
