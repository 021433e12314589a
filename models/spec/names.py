"""What the name of a network that is not here may mean: a misspelt one gets a hint, never the name of another family, task or form."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from models.spec.families import HERE, NAMED_TASKS, NUMBERED, WITHOUT_V, absent_family, respelled
from utils.errors import closest

FIRST_NUMBER = re.compile(r"\d+")
FORM = re.compile(r"p\d+")  # of other levels than the usual three
LONGEST_NUMBER = 2  # digits of a family; 2024 and 640 are none


class NameParts(NamedTuple):
    """What must be equal in two names for one to be a misspelling of the other; each is empty where a name has none."""

    number: str  # of the family
    task: str  # as registered
    form: str  # such as p2


def parts_of(stem: str) -> NameParts:
    """The parts of a name without its suffix: ``yolo12n-seg`` has 12 and ``segment``."""
    number = FIRST_NUMBER.search(stem)
    words = re.split(r"[-_]", stem.lower())
    task = next((task for word in words for end, (task, _) in NAMED_TASKS.items() if task and word.startswith(end)), "")  # also segment
    return NameParts(number[0] if number else "", task, next((word for word in words if FORM.fullmatch(word)), ""))


def absent_network(stem: str, known: Collection[str]) -> str:
    """What to say of the name of a family, or of a family's task or form, that is not among the known names; empty for other names."""
    found, parts = NUMBERED.match(stem), parts_of(stem)
    if (absent := absent_family(stem)) or not found or len(parts.number) > LONGEST_NUMBER:
        return absent
    here = {parts_of(name) for name in known if NUMBERED.match(name)}
    if all(other.number != parts.number for other in here):
        return f"YOLO{'v' if 'v' in found[0].lower() else ''}{parts.number} is not here; {HERE}"
    if parts in here:
        return ""
    has_task = any(other[:2] == parts[:2] for other in here)
    what = f"network for {_task_words(parts.task)}" if parts.task else "network"
    if has_task:
        return _absence(parts.number, f"-{parts.form} {what}", {other.number for other in here if other[1:] == parts[1:]})
    return _absence(parts.number, what, {other.number for other in here if other.task == parts.task})


def meant(stem: str, known: Collection[str], *, suffix: str = "") -> str:
    """A hint at the known name, with its suffix, that an unknown one may mean: the nearest of the same family, task and form."""
    spelled = respelled(stem)
    close = closest(spelled, [name for name in known if parts_of(name) == parts_of(spelled)])
    return f"did you mean {close[0] + suffix!r}?" if close else ""


def _absence(number: str, what: str, others: Collection[str]) -> str:
    *first, last = [_family(other) for other in sorted(others, key=int)] or [""]
    where = f"; {', '.join(first)} and {last} have one" if first else f"; {last} has one" if last else ""
    return f"{_family(number)} has no {what} here{where}"


def _family(number: str) -> str:
    return f"YOLO{'' if number in WITHOUT_V else 'v'}{number}"


def _task_words(task: str) -> str:
    return next(words for name, words in NAMED_TASKS.values() if name == task)
