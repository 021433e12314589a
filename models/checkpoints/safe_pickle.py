"""Reads pickles as records: every opcode is interpreted here, and nothing that a file names is ever looked up, imported or called.

``pickletools`` only splits the bytes into opcodes. A global is a pair of words that is compared with a list; what the file would build from
it becomes a :class:`Record` of the class's name, its arguments and its attributes. Anything off the list ends the reading in one line.

A restricted ``pickle.Unpickler`` (``find_class`` returning inert stubs) would be shorter, but it cannot refuse what this reader refuses:
its memo is an array, so that a pickle of 8 bytes with the memo number 2^31 - 1 makes it reserve 32 GiB; a deeply nested tuple as a
dictionary key is hashed by recursion and ends the process with a segmentation fault; and BUILD writes attributes to whatever is on the
stack, classes included. tests/unit/models/test_hostile_checkpoints.py has all three.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NamedTuple

from utils.errors import UserError, printable
from utils.reading.limits import MOST_VALUES, brief, measure

HIGHEST_PROTOCOL = 5
LONGEST_NAME = 100  # characters of a global that a message quotes
_MARK = object()
_PUSHED = frozenset(
    ["INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING"]
    + ["UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"]
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_KEYS = (str, int, float, bool, bytes, type(None))


class Global(NamedTuple):
    """A class or function as a file names it: two words."""

    module: str
    name: str

    def __str__(self) -> str:
        text = printable(f"{self.module}.{self.name}")
        return text if len(text) <= LONGEST_NAME else text[:LONGEST_NAME] + "…"


class Record:
    """What a file would build: the class by name, the arguments, and what was set on it since.

    Attributes:
        cls: class or function.
        args: of the call; empty where it was made without.
        state: attributes.
        other_state: a state that is no dictionary, as arrays and dates have.
        elements, entries: what was appended, and what was set by key, for classes that are lists or dictionaries.
    """

    __slots__ = ("args", "cls", "elements", "entries", "other_state", "state")

    def __init__(self, cls: Global, args: tuple[Any, ...] = ()) -> None:
        self.cls, self.args = cls, args
        self.state: dict[str, Any] = {}
        self.other_state: Any = None
        self.elements: list[Any] = []
        self.entries: dict[Any, Any] = {}


def _within(record: Record) -> Iterator[Any]:
    """What a record holds, its class's name apart; a method refers back to its owner, which is no part of it."""
    yield from (record.state, record.other_state, record.elements, record.entries)
    if record.cls.name != "getattr":
        yield record.args


Maker = Callable[[tuple[Any, ...]], Any]


class PickleReader:
    """An interpreter of pickle opcodes that builds plain containers and records.

    Args:
        origin: file name for messages.
        makers: global -> what replaces a call of it, given the arguments; they are this project's own functions.
        inert: whether a global may become a record.
        persistent: what replaces a persistent id.
    """

    def __init__(
        self, origin: str, *, makers: Mapping[Global, Maker], inert: Callable[[Global], bool], persistent: Callable[[Any], Any]
    ) -> None:
        self.origin, self.makers, self.inert, self.persistent = origin, makers, inert, persistent
        self._actions: dict[str, Callable[[Any], None]] = {
            name.removeprefix("_op_").upper(): getattr(self, name) for name in dir(self) if name.startswith("_op_")
        }

    def read(self, stream: IO[bytes]) -> Any:
        """The one object that the stream holds next; the stream is positioned behind it afterwards.

        Raises:
            UserError: a global that is not allowed, by name, or a damaged stream.
        """
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self._copied = 0
        try:
            for opcode, arg, _ in pickletools.genops(stream):
                name = opcode.name
                if name in _PUSHED:
                    self.stack.append(arg)
                elif name in _CONSTANTS:
                    self.stack.append(_CONSTANTS[name])
                elif name in _TUPLES:
                    self._collect_tuple(_TUPLES[name])
                elif name in self._actions:
                    self._actions[name](arg)
                elif name != "STOP":
                    raise UserError(f"{self.origin}: uses the pickle opcode {name}, which no checkpoint needs")
            content = self._pop()
            measure(content, inside={Record: _within})
            return content
        except UserError as error:
            if not str(error).startswith(self.origin):
                raise UserError(f"{self.origin}: {error}, as no file of a network does") from None
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError, EOFError, OSError):
            raise UserError(f"{self.origin}: a damaged checkpoint (its pickle cannot be followed)") from None

    def allowed(self, module: Any, name: Any) -> Global:
        """The pair as a global if it is on the list; nothing is looked up."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise UserError(f"{self.origin}: names a global by something that is no text; refused, nothing of it was run")
        wanted = Global(module, name)
        if wanted not in self.makers and not self.inert(wanted):
            raise refusal(self.origin, wanted)
        return wanted

    def _make(self, cls: Any, args: Any) -> Any:
        """The replacement of ``cls(*args)``."""
        if not isinstance(cls, Global) or not isinstance(args, tuple):
            raise UserError(f"{self.origin}: calls something that is no class ({type(cls).__name__}); refused, nothing of it was run")
        maker = self.makers.get(cls)
        self._count_copies(args[0] if args else ())
        if maker is None:
            return Record(cls, args)
        try:
            return maker(args)
        except UserError as error:
            raise UserError(f"{self.origin}: {cls}: {error}; refused, nothing of it was run") from None

    def _count_copies(self, values: Any) -> None:
        """Bounds what is copied out of containers, which a file may name again and again in a few bytes."""
        self._copied += len(values) if isinstance(values, (list, tuple, dict)) else 0
        if self._copied > 4 * MOST_VALUES:
            raise UserError(f"{self.origin}: copies more than {4 * MOST_VALUES} values; no checkpoint needs that")

    def _pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark in place of a value")
        return value

    def _pop_mark(self) -> list[Any]:
        start = len(self.stack) - 1
        while self.stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise IndexError("no mark")
        values = self.stack[start + 1 :]
        del self.stack[start:]
        return values

    def _top(self) -> Any:
        if self.stack[-1] is _MARK:
            raise ValueError("a mark in place of a value")
        return self.stack[-1]

    def _collect_tuple(self, count: int) -> None:
        values = tuple(self._pop() for _ in range(count))[::-1]
        self.stack.append(values)

    # Globals and what is made of them

    def _op_global(self, arg: str) -> None:
        module, _, name = arg.partition(" ")
        self.stack.append(self.allowed(module, name))

    def _op_stack_global(self, _: None) -> None:
        name, module = self._pop(), self._pop()
        self.stack.append(self.allowed(module, name))

    def _op_inst(self, arg: str) -> None:
        module, _, name = arg.partition(" ")
        cls = self.allowed(module, name)
        self.stack.append(self._make(cls, tuple(self._pop_mark())))

    def _op_obj(self, _: None) -> None:
        cls, *args = self._pop_mark()
        self.stack.append(self._make(cls, tuple(args)))

    def _op_reduce(self, _: None) -> None:
        args, cls = self._pop(), self._pop()
        self.stack.append(self._make(cls, args))

    _op_newobj = _op_reduce

    def _op_newobj_ex(self, _: None) -> None:
        self._pop()  # keyword arguments
        self._op_reduce(None)

    def _op_build(self, _: None) -> None:
        state, target = self._pop(), self._top()
        if not isinstance(target, Record):
            if isinstance(target, Global):
                raise UserError(f"{self.origin}: sets attributes of {target} itself; refused, nothing of it was run")
            return  # an OrderedDict's or a tensor's attributes say nothing about weights
        for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            if not isinstance(part, dict):
                target.other_state = state
                continue
            self._count_copies(part)
            for key, value in part.items():
                if not isinstance(key, str) or key.startswith("__"):
                    raise UserError(f"{self.origin}: sets {brief(key)} of a {target.cls}; refused, nothing of it was run")
                target.state[key] = value

    def _op_persid(self, arg: str) -> None:
        self.stack.append(self.persistent(arg))

    def _op_binpersid(self, _: None) -> None:
        self.stack.append(self.persistent(self._pop()))

    def _op_ext1(self, arg: int) -> None:
        raise UserError(f"{self.origin}: asks for the registered extension {arg}; refused, nothing of it was run")

    _op_ext2 = _op_ext4 = _op_ext1

    # Containers

    def _op_mark(self, _: None) -> None:
        self.stack.append(_MARK)

    def _op_tuple(self, _: None) -> None:
        self.stack.append(tuple(self._pop_mark()))

    def _op_list(self, _: None) -> None:
        self.stack.append(self._pop_mark())

    def _op_empty_list(self, _: None) -> None:
        self.stack.append([])

    def _op_empty_dict(self, _: None) -> None:
        self.stack.append({})

    def _op_empty_set(self, _: None) -> None:
        self.stack.append(set())

    def _op_frozenset(self, _: None) -> None:
        self.stack.append(frozenset(map(as_key, self._pop_mark())))

    def _op_dict(self, _: None) -> None:
        values = self._pop_mark()
        self.stack.append({})
        self._set_items(values)

    def _op_append(self, _: None) -> None:
        self._append([self._pop()])

    def _op_appends(self, _: None) -> None:
        self._append(self._pop_mark())

    def _op_additems(self, _: None) -> None:
        values = self._pop_mark()
        self._top().update(map(as_key, values))

    def _op_setitem(self, _: None) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _op_setitems(self, _: None) -> None:
        self._set_items(self._pop_mark())

    def _append(self, values: list[Any]) -> None:
        target = self._top()
        (target.elements if isinstance(target, Record) else target).extend(values)

    def _set_items(self, values: list[Any]) -> None:
        target = self._top()
        entries = target.entries if isinstance(target, Record) else target
        for key, value in zip(values[::2], values[1::2], strict=True):
            entries[as_key(key)] = value

    # Stack and memo

    def _op_pop(self, _: None) -> None:
        self.stack.pop()

    def _op_pop_mark(self, _: None) -> None:
        self._pop_mark()

    def _op_dup(self, _: None) -> None:
        self.stack.append(self._top())

    def _op_memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self._top()

    def _op_put(self, arg: int) -> None:
        self.memo[arg] = self._top()

    _op_binput = _op_long_binput = _op_put

    def _op_get(self, arg: int) -> None:
        self.stack.append(self.memo[arg])

    _op_binget = _op_long_binget = _op_get

    def _op_proto(self, arg: int) -> None:
        if arg > HIGHEST_PROTOCOL:
            raise UserError(f"{self.origin}: pickle protocol {arg} is newer than this program knows")

    def _op_frame(self, _: int) -> None:
        """Only a hint for readers that buffer."""


def refusal(origin: str, wanted: Global) -> UserError:
    """The error for a global that is not on the list."""
    return UserError(f"{origin}: asks for {wanted}, which no weights need; refused, nothing of it was run")


def as_key(key: Any) -> Any:
    """A dictionary key or set element whose hash runs nothing and is not deep."""
    if isinstance(key, (*_KEYS, Record)) or (isinstance(key, tuple) and all(isinstance(k, _KEYS) for k in key)):
        return key
    raise TypeError(f"a {type(key).__name__} as a key")
