"""What is wrong with a user's file of modules, and which line to write: names that nothing defines, classes without forward."""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

from torch import nn

from utils.errors import UserError, closest, first_line

ALL_BLOCKS = "from models.blocks import *"
# What pasted classes use without importing it, and the line that brings it.
IMPORTS = {
    "nn": "import torch.nn as nn", "torch": "import torch", "F": "import torch.nn.functional as F", "math": "import math",
    "np": "import numpy as np", "partial": "from functools import partial", "Tensor": "from torch import Tensor",
    "rearrange": "from einops import rearrange", "register": "from models.spec.registry import register",
    "rules": "from models.spec import channel_rules as rules",
    **{name: f"from typing import {name}" for name in ("Any", "Callable", "Dict", "List", "Optional", "Sequence", "Tuple", "Union")},
    **dict.fromkeys(("autopad", "DropPath", "DFL", "RepCSP", "TransformerLayer", "TransformerBlock"), ALL_BLOCKS),
}  # fmt: skip
OF_OTHER_PROJECTS = (
    "models",
    "utils",
    "ultralytics",
    "mmcv",
    "mmengine",
    "mmdet",
    "yolov5",
    "yolov9",
)  # packages that hold Conv and C3 there


class Undefined(NamedTuple):
    """A name that a function of a file uses and nothing defines."""

    name: str
    line: int


def classes_of(module: ModuleType) -> list[type[nn.Module]]:
    """The torch modules that a file defines itself, in the order of their lines."""
    own = [v for v in vars(module).values() if isinstance(v, type) and issubclass(v, nn.Module) and v.__module__ == module.__name__]
    return sorted(dict.fromkeys(own), key=line_of)


def line_of(cls: type) -> int:
    """The line of a class in its file, 0 where it is not known."""
    lines = [f.__code__.co_firstlineno for f in vars(cls).values() if isinstance(f, FunctionType)]
    try:
        return inspect.getsourcelines(cls)[1]
    except (OSError, TypeError):
        return min(lines, default=0)


def without_forward(cls: type[nn.Module]) -> str:
    """What is wrong with a class that has no forward, neither its own nor that of a block it extends; empty where it has one."""
    if cls.forward is not nn.Module.forward:
        return ""
    methods = [name for name, value in vars(cls).items() if isinstance(value, FunctionType) and not name.startswith("__")]
    meant = closest("forward", methods)
    hint = f", did you mean its {meant[0]!r}?" if meant else ""
    return f"line {line_of(cls)}: class {cls.__name__} has no forward(self, x){hint}"


def undefined_names(module: ModuleType) -> list[Undefined]:
    """Names that functions and methods of a file read as globals and that nothing defines, each at its first line."""
    known = vars(module).keys() | vars(builtins).keys()
    first: dict[str, int] = {}
    for function in _functions(module):
        for name, line in _globals_of(function.__code__):
            if name not in known:
                first[name] = min(line, first.get(name, line))
    return [Undefined(name, line) for name, line in sorted(first.items(), key=lambda item: item[1])]


def globals_of(cls: type) -> set[str]:
    """Names that the methods of a class read as globals."""
    return {name for f in vars(cls).values() if isinstance(f, FunctionType) for name, _ in _globals_of(f.__code__)}


def remedy(name: str, blocks: Mapping[str, Any]) -> str:
    """The line that brings a name, where it is that of a usual import or of a block; empty for another one.

    Args:
        blocks: what is registered, by name.
    """
    if name in IMPORTS:
        return f"add the line: {IMPORTS[name]}"
    home = getattr(getattr(blocks.get(name), "cls", None), "__module__", "")
    return f"it lives in {home}; add the line: from {home} import {name}, or {ALL_BLOCKS}" if home.startswith("models.") else ""


def fault_of(error: BaseException, path: Path, blocks: Mapping[str, Any]) -> str:
    """An exception that a file raised while it was imported: its line, what happened and what to write."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"line {error.lineno}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f"line {lines[-1]}: " if lines else ""
    if isinstance(error, UserError):
        return f"{where}{error}"
    return f"{where}{type(error).__name__}: {first_line(error)}{_hint(error, blocks)}"


def _hint(error: BaseException, blocks: Mapping[str, Any]) -> str:
    if isinstance(error, SystemExit):
        return "; it may not end the program: put what runs by itself under if __name__ == '__main__':"
    if isinstance(error, NameError) and error.name:
        found = remedy(error.name, blocks)
        return f"; {found}" if found else ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        if package in OF_OTHER_PROJECTS:
            return f"; YOLO's blocks come with: {ALL_BLOCKS}"
        return f"; pip install {package}, or leave it out where nothing needs it"
    if isinstance(error, ImportError):  # also a relative import, which a single file cannot have
        return f"; YOLO's blocks come with: {ALL_BLOCKS}"
    return ""


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    """Functions and methods that the file defines; those that it imports have other globals."""
    for value in list(vars(module).values()):
        members = list(vars(value).values()) if isinstance(value, type) and value.__module__ == module.__name__ else [value]
        for member in members:
            for part in (member.fget, member.fset) if isinstance(member, property) else (member,):
                inner: Any = part.func if isinstance(part, functools.partial) else getattr(part, "__func__", part)
                function = inspect.unwrap(inner)
                if isinstance(function, FunctionType) and function.__globals__ is vars(module):
                    yield function


def _globals_of(code: CodeType) -> Iterator[tuple[str, int]]:
    """Names that a function and those within it read as globals, with their lines."""
    lines = [(start, end, line) for start, end, line in code.co_lines() if line is not None]
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            offset = instruction.offset
            yield instruction.argval, next((line for start, end, line in lines if start <= offset < end), code.co_firstlineno)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _globals_of(constant)
