"""Which tensor of a head is what: by the declaration of its class (``Head.parameter_parts``).

Weights without a YAML name no class. Theirs is the known head of which all declared submodules are among the names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from models.heads.base import Head, ParameterPart
from models.spec.registry import BLOCKS

Parts = Mapping[str, ParameterPart]
NO_LEVEL = -1
UNDECLARED = ParameterPart("other", by_level=False)


class HeadTensor(NamedTuple):
    """What a tensor of a head is for; equal in two heads for tensors that are partners.

    Attributes:
        role, branch: of the declared part.
        level: ``NO_LEVEL`` where the part belongs to none.
        rest: name within the level's module, or the whole name of what is not declared.
    """

    role: str
    branch: int
    level: int
    rest: str


def identify(name: str, parts: Parts) -> tuple[HeadTensor, ParameterPart]:
    """What a tensor of a head is for, with the part that declares it.

    Args:
        name: within the head.
    """
    submodule, _, rest = name.partition(".")
    part = parts.get(submodule)
    if part is not None and not part.by_level:
        return HeadTensor(part.role, part.branch, NO_LEVEL, rest), part
    level, _, inner = rest.partition(".")
    if part is None or not level.isdecimal():
        return HeadTensor(UNDECLARED.role, UNDECLARED.branch, NO_LEVEL, name), UNDECLARED
    return HeadTensor(part.role, part.branch, int(level), inner), part


def parts_of_names(names: Iterable[str]) -> Parts:
    """The declaration of the head that a row of these tensors is; empty where it is none.

    Of several, the one with the most submodules (a dual head has those of a single one, too). Tensors that no head declares, such as those
    of a mask branch, are accepted beside a distribution layer or anchors, which no other row has.
    """
    names = list(names)
    best: Parts = {}
    for parts in (head.parameter_parts() for head in _known_heads()):
        if len(parts) > len(best) and _is_complete(names, parts):
            best = parts
    declared = {name for name in names if identify(name, best)[1] is not UNDECLARED}
    certain = {"distribution", "anchors"} & {identify(name, best)[0].role for name in declared}
    return best if certain or len(declared) == len(names) else {}


def _is_complete(names: list[str], parts: Parts) -> bool:
    """Whether every declared submodule is among the names, with the layers that the declaration lists."""
    for submodule, part in parts.items():
        inner = [identify(name, parts)[0] for name in names if name.partition(".")[0] == submodule]
        if part.by_level and not inner:
            return False
        if any(tensor.role == UNDECLARED.role or (part.by_level and not part.output and "." in tensor.rest) for tensor in inner):
            return False
    return True


def _known_heads() -> Iterator[type[Head]]:
    len(BLOCKS)  # imports the project's heads
    waiting = [Head]
    while waiting:
        for head in waiting.pop().__subclasses__():
            yield head
            waiting.append(head)
