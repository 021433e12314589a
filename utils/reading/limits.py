"""The limits of everything that is read from a file, and how values from files are measured and printed.

A file may name any number; what it costs to hold, hash or print it is known only after its type and its size are. Readers check both here
first, so that a small file can never make a program slow or large.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from utils.errors import UserError, printable

MIB = 1 << 20
# Files, in bytes
MAX_IMAGE_BYTES = 2**31  # of an image file
MAX_PAGE_BYTES = 2**30  # of a TIFF page, decoded
MAX_LABEL_BYTES = 2**26  # of a label file: half a million rows of polygons of six points
MAX_LIST_BYTES = 2**28  # of a list of images: two million paths of 128 characters
MAX_XML_BYTES = 2**26  # of a VOC annotation
MAX_JSON_BYTES = 2**32  # of a COCO file; that of COCO's training set has half a gigabyte
MAX_YAML_BYTES = MIB
MAX_TEXT_BYTES = 64 * MIB  # of any other text
LARGEST_PICKLE = 512 * MIB  # of the pickle within a checkpoint
LARGEST_TABLE = 16 * MIB  # of the table of a safetensors file
# Text
MAX_YAML_DEPTH = 32  # lists and mappings inside one another
MAX_YAML_VALUES = 200_000  # in all, aliases with what they stand for
MAX_YAML_DIGITS = 100  # of a number
MAX_YAML_TEXT = 1 << 16  # characters of one value
MAX_NAME_BYTES = 255  # of a file or folder, on every common file system
MAX_PATH_CHARS = 4096
# Checkpoints
DEEPEST = 120  # containers within containers
MOST_VALUES = 4_000_000  # shared ones counted wherever they are met
MOST_DIMENSIONS = 16  # of a tensor
LARGEST_SIZE = 1 << 48  # elements along, or between, the dimensions of a tensor
REPEATED_STORAGE = 4  # times that the values of a file may become tensors of their own
# Data sets and networks
MAX_CLASSES = 100_000
MAX_CHANNELS = 1024  # of an image
MAX_NAME_CHARS = 200  # of a class
MAX_KEYPOINTS = 10_000  # of an object
MOST_ROWS = 5000  # of a model YAML
MOST_REPEATS = 1000  # of a row of a model YAML
MOST_CHANNELS = 1 << 20  # of a network's input
LARGEST_MULTIPLE = 1000.0  # of depth or width
LARGEST_NETWORK = 8_000_000_000  # values that are made while a network is built


def measure(value: Any, *, inside: Mapping[type, Any] | None = None) -> None:
    """Refuses values that are nested too deeply, that hold themselves, or that are more than ``MOST_VALUES`` if written out.

    Each container is visited once, however often it is shared, so measuring takes time in proportion to the file.

    Args:
        inside: type -> function that lists the values within one, for types that are no containers of Python's own.

    Raises:
        UserError: what is too much.
    """
    sizes: dict[int, tuple[int, int]] = {}  # id -> values if written out, depth below
    open_: set[int] = set()
    stack: list[tuple[Any, list[Any] | None]] = [(value, None)]
    while stack:
        current, members = stack.pop()
        key = id(current)
        if members is None:
            members = list(_within(current, inside or {}))
            if key in sizes or not members:
                continue
            if key in open_:
                raise UserError("holds itself")
            open_.add(key)
            stack.append((current, members))
            for member in members:
                if id(member) in open_:
                    raise UserError("holds itself")
                if id(member) not in sizes and _is_container(member, inside or {}):
                    stack.append((member, None))
            continue
        open_.discard(key)
        below = [sizes.get(id(member), (1, 0)) for member in members]
        count, depth = 1 + sum(n for n, _ in below), 1 + max(d for _, d in below)
        if count > MOST_VALUES or depth > DEEPEST:
            raise UserError(f"holds more than {MOST_VALUES} values" if count > MOST_VALUES else f"is nested more than {DEEPEST} deep")
        sizes[key] = count, depth


def _is_container(value: Any, inside: Mapping[type, Any]) -> bool:
    return isinstance(value, (dict, list, tuple, set, frozenset)) or type(value) in inside


def _within(value: Any, inside: Mapping[type, Any]) -> Iterator[Any]:
    if type(value) in inside:
        yield from inside[type(value)](value)
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield key
            yield entry
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value


def brief(value: Any, *, longest: int = 40) -> str:
    """A value for a message: plain ones as they are, cut; containers and everything else by the name of their type."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return str(value) if value.bit_length() < 200 else f"a whole number of {value.bit_length()} bits"
    if isinstance(value, float):
        return str(value)
    if isinstance(value, str):
        return repr(printable(value if len(value) <= longest else value[:longest] + "…"))
    return f"a {type(value).__name__}"
