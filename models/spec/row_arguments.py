"""Whether the arguments of a row are what the constructor takes, asked before it is called: their names, number and types.

A type is checked only where the constructor says it in plain words (``int``, ``float | None``, ``Sequence[int]`` …). The integers of this
project's same-width modules are counts and sizes (heads, windows, kernels, reductions), of which none can be below 1, unless the class
lists the option under ``below_one``, where such a number means something; and kernels that keep the map's size are odd.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from models.spec.channel_rules import LayerPlan, kinds_of, same_width
from models.spec.registry import BlockSpec
from utils.errors import UserError, nearest

ODD = ("kernel_size", "kernel_sizes", "k_size", "mlp_kernel_size", "side_dwconv", "before_attn_dwconv")
WORDS = {
    "int": "a whole number", "float": "a number", "bool": "True or False", "str": "a word", "None": "None",
    "Sequence[int]": "a list of whole numbers",
}  # fmt: skip


def check_arguments(plan: LayerPlan, block: BlockSpec) -> None:
    """Refuses arguments that the constructor does not have, or that are not what it says."""
    assert plan.cls is not None
    signature = _signature(plan.cls)
    if signature is None:
        return
    for key in plan.kwargs:
        kinds = {p.kind for p in signature.parameters.values()}
        if key not in signature.parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise UserError(f"has no option {key!r}; {nearest(key, signature.parameters) or 'it takes ' + what_it_takes(plan.cls)}")
    try:
        given = signature.bind(*plan.args, **plan.kwargs).arguments
    except TypeError as error:
        raise UserError(f"{error}; it takes {what_it_takes(plan.cls)}") from error
    module: BlockSpec = getattr(block.cls, "inner", block)  # C2f_EMA has EMA's options
    plain = getattr(block.cls, "outer", None)
    outer = inspect.signature(plain).parameters if plain is not None else {}  # and C2f's own, which need not be counts
    for name, value in given.items():
        parameter = signature.parameters[name]
        if wanted := _wanted(parameter, value):
            raise UserError(f"{name} should be {wanted}, not {value!r}; it takes {what_it_takes(plan.cls)}")
        if name not in outer and (wanted := _in_reach(module, parameter, value)):
            raise UserError(f"{name} should be {wanted}, not {value!r}")


def what_it_takes(cls: Callable[..., Any], *, behind: int = 0) -> str:
    """The parameters of a constructor, from place ``behind`` on, as in ``channels, factor=32, c2=None``; empty if it does not say."""
    signature = _signature(cls)
    return ", ".join(map(_written, list(signature.parameters.values())[behind:])) if signature else ""


def _signature(cls: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(cls)
    except ValueError:  # a built-in without one
        return None


def _written(parameter: inspect.Parameter) -> str:
    if parameter.kind is parameter.VAR_KEYWORD:
        return f"**{parameter.name}"
    plain = isinstance(parameter.default, (bool, int, float, str, tuple, list, type(None)))
    return f"{parameter.name}={parameter.default!r}" if plain else parameter.name


def _wanted(parameter: inspect.Parameter, value: Any) -> str:
    """What the parameter should be, in words; empty where the value is that, or where the annotation does not say."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if parameter.annotation is inspect.Parameter.empty or parameter.kind in variadic or value is parameter.default:
        return ""
    kinds = kinds_of(parameter.annotation)
    if not kinds <= WORDS.keys() or any(_is(value, kind) for kind in kinds):
        return ""
    return " or ".join(word for kind, word in WORDS.items() if kind in kinds)


def _in_reach(module: BlockSpec, parameter: inspect.Parameter, value: Any) -> str:
    """What a count or size, or each of a list, should be, in words; empty where it is that, or where the parameter is none."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    counted = kinds_of(parameter.annotation) & {"int", "Sequence[int]"} and all(_is(v, "int") for v in values)
    if module.channels is not same_width or module.kind != "attention" or not module.built_in or not counted:
        return ""
    least = 0 if parameter.default == 0 else 1
    if parameter.name not in getattr(module.cls, "below_one", ()) and any(v < least for v in values):
        return f"at least {least}"
    return "odd" if parameter.name in ODD and any(v > 0 and v % 2 == 0 for v in values) else ""


def _is(value: Any, kind: str) -> bool:
    """Whether a literal of a YAML is of a type; a whole number also serves as a number, and 0 and 1 as False and True."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "int":
        return number and isinstance(value, int)
    if kind == "float":
        return number
    if kind == "bool":
        return isinstance(value, bool) or (isinstance(value, int) and value in (0, 1))
    if kind == "str":
        return isinstance(value, str)
    if kind == "None":
        return value is None
    return isinstance(value, (list, tuple)) and all(_is(v, "int") for v in value)
