"""Metadata of an exported file: class names, stride, image size and the rest, under the keys that other YOLOs use and read."""

from __future__ import annotations

import ast
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from utils.errors import UserError

LONGEST_TEXT = 4 << 20  # characters of one value: 100,000 class names
MOST_NAMES, LONGEST_NAME = 100_000, 1000  # classes, characters
LARGEST = {"stride": 1024, "side": 1 << 16, "batch": 1 << 16, "channels": 1024, "topk": 1 << 20}
LARGEST_INPUT = 1 << 28  # values of the images that the file takes at once: 1 GiB
AGAIN = "export it again with export.py"
SETTINGS = ("kpt_shape", "kpt_oks_sigmas", "skeleton")  # what tasks record of their results; written out since tasks import torch
_KEYS = ("names", "imgsz", "stride", "batch", "channels", "dynamic", "end2end", "topk", "iou", "conf", "task", *SETTINGS)


@dataclass(frozen=True)
class ExportFacts:
    """What a reader of an exported file has to know besides its graph."""

    names: tuple[str, ...]  # of the classes
    stride: int = 32  # px; with ``dynamic``, sides of images are multiples of it
    imgsz: tuple[int, int] = (640, 640)  # height, width in px
    batch: int = 1
    ch: int = 3
    dynamic: bool = False  # whether it accepts other sizes and batches than these
    end2end: bool = False  # whether the outputs are detections: suppression is inside the file, or not needed
    topk: int = 0  # detections an image; of the suppression inside:
    iou: float = 0.0  # overlap above which a box is dropped,
    conf: float = 0.0  # and score above which a box is a candidate
    task: str = "detect"
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the task, such as ``kpt_shape``

    def to_metadata(self) -> dict[str, str]:
        """Plain text values, as ONNX requires them; ``from_metadata`` parses them as Python literals."""
        values = {**asdict(self), "names": dict(enumerate(self.names)), "imgsz": list(self.imgsz)}
        values["channels"] = values.pop("ch")
        values |= values.pop("settings")
        return {key: str(value) for key, value in values.items()}

    @classmethod
    def from_json(cls, text: str, *, source: str) -> ExportFacts:
        """Reads metadata that is stored as one JSON text; an empty one is that of a file without any.

        Raises:
            UserError: no JSON, or as ``from_metadata``.
        """
        try:
            return cls.from_metadata(json.loads(text or "{}"), source=source)
        except (json.JSONDecodeError, ValueError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{source}: its metadata cannot be understood; {AGAIN}") from None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], *, source: str) -> ExportFacts:
        """Reads what ``to_metadata`` wrote, or what other programs store under the same keys; missing entries take their defaults.

        Raises:
            UserError: an entry that cannot be parsed, or is out of range; the message names it.
        """
        if not isinstance(metadata, Mapping):
            raise UserError(f"{source}: its metadata is a {type(metadata).__name__}, expected keys and values; {AGAIN}")
        read = _Reader({key: _literal(metadata[key]) for key in _KEYS if key in metadata}, source)
        return cls(
            names=read.names(),
            stride=read.whole("stride", cls.stride),
            imgsz=read.size("imgsz", cls.imgsz),
            batch=read.whole("batch", cls.batch),
            ch=read.whole("channels", cls.ch),
            dynamic=read.flag("dynamic"),
            end2end=read.flag("end2end"),
            topk=read.whole("topk", cls.topk, least=0),
            iou=read.part("iou"),
            conf=read.part("conf"),
            task=read.text("task", cls.task),
            settings={key: read.values[key] for key in SETTINGS if key in read.values},
        ).checked(source=source)

    def checked(self, *, source: str) -> ExportFacts:
        """The facts, if a network can have them.

        Raises:
            UserError: a number out of range, which ``source`` begins.
        """
        sides = {"stride": self.stride, "height": self.imgsz[0], "width": self.imgsz[1], "batch": self.batch, "channels": self.ch}
        for key, value in sides.items():
            most = LARGEST.get(key, LARGEST["side"])
            if not 1 <= value <= most:
                raise UserError(f"{source}: its {key} is {_shown(value)}, expected 1 to {most}; {AGAIN}")
        if (values := math.prod(sides.values()) // self.stride) > LARGEST_INPUT:
            shape = f"{self.batch}x{self.ch}x{self.imgsz[0]}x{self.imgsz[1]}"
            raise UserError(f"{source}: takes images of {shape}, {values:,} values; at most {LARGEST_INPUT:,} are computed at once")
        return self


class _Reader:
    """Values of metadata, each with the type it should have; a missing one is its default."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values, self.source = values, source

    def names(self) -> tuple[str, ...]:
        """Class names in the order of their numbers."""
        names = self.values.get("names", ())
        if isinstance(names, dict):
            numbers = {_whole(key): name for key, name in names.items()}
            if None in numbers or len(numbers) != len(names):
                raise self._wrong("names", names, "class names by their number")
            names = [name for _, name in sorted(numbers.items())]  # type: ignore
        if not isinstance(names, (list, tuple)) or len(names) > MOST_NAMES:
            raise self._wrong("names", names, f"at most {MOST_NAMES:,} class names")
        if not all(isinstance(name, (str, int, float)) and len(str(name)) <= LONGEST_NAME for name in names):
            raise self._wrong("names", names, f"texts of at most {LONGEST_NAME} characters")
        return tuple(map(str, names))

    def size(self, key: str, default: tuple[int, int]) -> tuple[int, int]:
        """Height and width, of which one number is both."""
        value = self.values.get(key, default)
        sides = [_whole(side) for side in (value if isinstance(value, (list, tuple)) else (value, value))]
        if len(sides) != 2 or sides[0] is None or sides[1] is None:
            raise self._wrong(key, value, "height and width in px")
        return sides[0], sides[1]

    def whole(self, key: str, default: int, *, least: int = 1) -> int:
        value = _whole(self.values.get(key, default))
        if value is None or not least <= value <= LARGEST[key]:
            raise self._wrong(key, self.values[key], f"a whole number from {least} to {LARGEST[key]}")
        return value

    def part(self, key: str) -> float:
        value = self.values.get(key, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise self._wrong(key, value, "a number from 0 to 1")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.values.get(key, False)
        value = {"true": True, "false": False, 1: True, 0: False}.get(value.lower() if isinstance(value, str) else _whole(value))
        if value is None:
            raise self._wrong(key, self.values[key], "True or False")
        return value

    def text(self, key: str, default: str) -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str) or len(value) > LONGEST_NAME:
            raise self._wrong(key, value, "a word")
        return value

    def _wrong(self, key: str, value: Any, expected: str) -> UserError:
        return UserError(f"{self.source}: its {key} is {_shown(value)}, expected {expected}; {AGAIN}")


def _whole(value: Any) -> int | None:
    """A whole number, written as one, as a text or as ``32.0``; None for anything else."""
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdigit() and len(value) < 20 else None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) else None


def _shown(value: Any) -> str:
    """A value as a message quotes it: short, and without descending into it."""
    if isinstance(value, (list, tuple, dict)) and len(value) > 4:
        return f"a {type(value).__name__} of {len(value):,}"
    if isinstance(value, (list, tuple, dict)) and any(isinstance(part, (list, tuple, dict)) for part in value):
        return f"a nested {type(value).__name__}"
    if isinstance(value, int) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _literal(value: Any) -> Any:
    """A Python literal as its value; any other text, and what is no text, as it is."""
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        return value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in class names
            return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return value
