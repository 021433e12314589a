"""The pickles of a TorchScript archive: modules of the archive and tensors, nothing else, and each tensor inside its member of the archive.

torch's own reader takes the number of elements from the pickle and trusts it: a larger number than the member holds reads beyond its end.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from models.checkpoints.safe_pickle import Global, PickleReader
from utils.errors import UserError

ITEM_BYTES = {
    "BoolStorage": 1, "ByteStorage": 1, "CharStorage": 1, "ShortStorage": 2, "HalfStorage": 2, "BFloat16Storage": 2, "IntStorage": 4,
    "FloatStorage": 4, "LongStorage": 8, "DoubleStorage": 8,
}  # fmt: skip
_STORAGES = {Global("torch", name): size for name, size in ITEM_BYTES.items()}
_TENSOR, _ORDERED = Global("torch._utils", "_rebuild_tensor_v2"), Global("collections", "OrderedDict")
_LISTS = tuple(Global("torch.jit._pickle", f"build_{kind}list") for kind in ("int", "tensor", "double", "bool"))
_TAG = Global("torch.jit._pickle", "restore_type_tag")
_MODULE = re.compile(r"__torch__(?!\.torch\.classes)(\.[A-Za-z0-9_]+)+")
_USED = """
    PROTO STOP MARK GLOBAL REDUCE NEWOBJ BUILD BINPERSID NONE NEWTRUE NEWFALSE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND
    APPENDS EMPTY_DICT SETITEM SETITEMS BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE BINPUT LONG_BINPUT BINGET LONG_BINGET
"""
_OPCODES = frozenset(_USED.split())


class Storage(NamedTuple):
    """A member of the archive that holds numbers."""

    elements: int


def check_pickle(data: bytes, *, where: str, sizes: Mapping[str, int]) -> None:
    """Reads a pickle without running it.

    Args:
        sizes: bytes of the members that its tensors may name, by their name.
        where: begins the messages.

    Raises:
        UserError: it names anything but modules and tensors, or a tensor is larger than its member.
    """
    try:
        unknown = next((op.name for op, _, _ in pickletools.genops(data) if op.name not in _OPCODES), None)
    except (ValueError, OverflowError):
        raise UserError(f"{where}: a damaged pickle") from None
    if unknown:
        raise UserError(f"{where}: uses the pickle opcode {unknown}, which no exported network needs")
    reader = PickleReader(
        where,
        makers={_TENSOR: _tensor, _ORDERED: lambda _: {}, _TAG: lambda args: args[0]} | dict.fromkeys(_LISTS, lambda args: args[0]),
        inert=lambda wanted: wanted in _STORAGES or _MODULE.fullmatch(f"{wanted.module}.{wanted.name}") is not None,
        persistent=lambda key: _storage(key, sizes=sizes, where=where),
    )
    reader.read(io.BytesIO(data))  # it bounds depth and number, too: torch walks the values by recursion


def _storage(key: Any, *, sizes: Mapping[str, int], where: str) -> Storage:
    if isinstance(key, tuple) and len(key) == 5 and key[0] == "storage" and isinstance(key[1], Global):
        _, kind, name, device, elements = key
        texts = isinstance(name, str) and isinstance(device, str)
        if kind in _STORAGES and texts and isinstance(elements, int) and 0 <= elements * _STORAGES[kind] <= sizes.get(name, -1):
            return Storage(elements)
    raise UserError(f"{where}: a tensor that its archive does not hold")


def _tensor(args: tuple[Any, ...]) -> None:
    """Checks offset, shape and strides of a tensor; the value itself is of no interest."""
    storage, offset, shape, strides = args[:4]
    whole = all(isinstance(sides, tuple) and all(type(side) is int and side >= 0 for side in sides) for sides in (shape, strides))
    if not (isinstance(storage, Storage) and type(offset) is int and offset >= 0 and whole and len(shape) == len(strides)):
        raise UserError("a damaged tensor")
    end = offset + 1 + sum((side - 1) * stride for side, stride in zip(shape, strides))
    if all(shape) and end > storage.elements:
        raise UserError("a tensor that is larger than its numbers")
