"""What is inside a file of torch or safetensors, read without running anything: containers, records and tensors that are read when wanted.

Three layouts: torch's zip archive, torch's older stream (pickles, then raw storages), and safetensors (a JSON table, then raw tensors).
"""

from __future__ import annotations

import io
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoints.safe_pickle import Global, Maker, PickleReader, Record, as_key
from utils.errors import UserError
from utils.reading.limits import LARGEST_PICKLE, LARGEST_SIZE, LARGEST_TABLE, MOST_DIMENSIONS, brief

STREAM_MAGIC, STREAM_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
LOCAL_HEADER = 30  # bytes before the name of a zip member
STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "DoubleStorage": torch.float64,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# Packages whose classes become records. Nothing of them is imported; they are only names.
INERT_PACKAGES = (
    "models", "ultralytics", "utils", "yolov5", "torch.nn", "torchvision.models", "torchvision.ops", "torchvision.transforms", "timm",
    "einops.layers",
)  # fmt: skip
INERT_PACKAGE_STARTS = tuple(f"{package}." for package in INERT_PACKAGES)
BUILTINS = ("builtins", "__builtin__")  # the latter in protocols up to 2
INERT = frozenset(
    Global(module, name)
    for module, names in {
        "argparse": ("Namespace",),
        "types": ("SimpleNamespace",),
        "datetime": ("date", "datetime", "timedelta", "timezone"),
        "numpy": ("ndarray",),
        "numpy.core.multiarray": ("_reconstruct",),
        "numpy._core.multiarray": ("_reconstruct",),
        "torch": (
            "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64",
            "strided", "contiguous_format", "channels_last", *STORAGES,
        ),
        "torch.cuda": tuple(STORAGES),
        "torch._dynamo.eval_frame": ("OptimizedModule",),
        **dict.fromkeys(BUILTINS, ("slice", "object", "list", "dict", "tuple", "int", "float", "str", "bool")),
    }.items()
    for name in names
)  # fmt: skip
NUMPY_SCALARS = {"f2": "e", "f4": "f", "f8": "d", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u4": "I", "u8": "Q", "b1": "?"}


@dataclass(frozen=True)
class Storage:
    """A block of numbers in a file, read when wanted."""

    dtype: torch.dtype
    count: int
    read: Callable[[], bytearray]  # of exactly the bytes that count and dtype imply


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in its file: a view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def load(self) -> Tensor:
        """A tensor of its own, contiguous, in the type of the file.

        Raises:
            UserError: the view reaches beyond its storage, or the storage is not all there.
        """
        empty = math.prod(self.shape) == 0
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides))
        if not empty and (last >= self.storage.count or math.prod(self.shape) > self.storage.count):
            raise UserError(f"a tensor of shape {list(self.shape)} is larger than its storage of {self.storage.count} values")
        if empty:
            return torch.empty(self.shape, dtype=self.storage.dtype)
        flat = torch.frombuffer(self.storage.read(), dtype=self.storage.dtype)
        return flat.as_strided(self.shape, self.strides, self.offset).contiguous().clone()


def read_torch_file(path: Path) -> Any:
    """The object in a file that ``torch.save`` wrote, as records, plain containers and :class:`StoredTensor`.

    Raises:
        UserError: what the file is instead, what is wrong with it, or which global in it is refused.
    """
    with open(path, "rb") as file:
        head = file.read(4)
    if head[:2] == b"PK":
        return _read_archive(path)
    return _read_stream(path)


def read_safetensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors by name, and the file's own notes.

    Raises:
        UserError: a damaged file; every bound is checked.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, LARGEST_TABLE):
                raise ValueError(f"a table of {length} bytes in a file of {size}")
            table = json.loads(file.read(length).decode("utf-8"))
        notes = table.pop("__metadata__", {})
        if not all(isinstance(k, str) and isinstance(v, str) for k, v in notes.items()):
            raise ValueError("notes that are no text")
        start, end = 8 + length, 0
        tensors: dict[str, StoredTensor] = {}
        for name, entry in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
            tensors[name] = _safetensor(path, entry, start, expected=end)
            end = entry["data_offsets"][1]
        if start + end != size:
            raise ValueError(f"{size - start - end} bytes that no tensor claims")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise UserError(f"{path}: a damaged safetensors file ({' '.join(str(error).split())[:120]})") from None
    return {name: tensors[name] for name in table}, notes


def _safetensor(path: Path, entry: dict[str, Any], start: int, *, expected: int) -> StoredTensor:
    begin, end = (_natural(v) for v in entry["data_offsets"])
    dtype, shape = entry["dtype"], _sizes(entry["shape"])
    if not isinstance(dtype, str) or dtype not in SAFETENSORS:
        raise ValueError(f"values of type {brief(dtype)}")
    count = math.prod(shape)
    if begin != expected or end - begin != count * SAFETENSORS[dtype].itemsize:
        raise ValueError(f"a tensor of shape {list(shape)} at bytes {begin} to {end}")
    storage = Storage(SAFETENSORS[dtype], count, lambda: _bytes_of(path, start + begin, end - begin))
    return StoredTensor(storage, 0, shape, _contiguous(shape))


def _read_archive(path: Path) -> Any:
    """The zip layout: ``<root>/data.pkl`` and ``<root>/data/<key>``, none of them compressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            if len(members) != len(archive.infolist()):
                raise UserError(f"{path}: holds two parts of one name; torch.save writes no such file")
            root = _archive_root(path, members)
            pickled = archive.read(f"{root}/data.pkl")
            order = members.get(f"{root}/byteorder")
            if order is not None and archive.read(order) != b"little":
                raise UserError(f"{path}: was written on a big-endian machine; save it again on another")
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: a damaged checkpoint (cut short, or partly overwritten)") from None

    def storage(dtype: torch.dtype, key: str, count: int) -> Storage:
        member = members.get(f"{root}/data/{key}")
        if member is None or member.file_size != count * dtype.itemsize:
            raise UserError(f"{path}: a damaged checkpoint (storage {brief(key)} is missing, or of another size than declared)")
        return Storage(dtype, count, lambda: _member_bytes(path, member))

    return _reader(path, _storage_ids(path, storage)).read(io.BytesIO(pickled))


def _archive_root(path: Path, members: dict[str, zipfile.ZipInfo]) -> str:
    """The folder in which everything lies; refuses archives that torch.save does not write."""
    roots = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl")]
    if any(name.endswith("/constants.pkl") for name in members):
        what = "a TorchScript export, not a checkpoint; detect.py and val.py run on it, training and export need the .pt file"
        raise UserError(f"{path}: {what}")
    if len(roots) != 1:
        raise UserError(f"{path}: a zip file, not a checkpoint")
    for name, info in members.items():
        if not name.startswith(f"{roots[0]}/") or ".." in name.split("/"):
            raise UserError(f"{path}: holds {brief(name, longest=60)} outside its own folder; torch.save writes no such file")
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path}: holds compressed parts; torch.save writes none: unpack and save it again")
    if sum(info.file_size for info in members.values()) > path.stat().st_size:
        raise UserError(f"{path}: declares more bytes than it has; a damaged checkpoint")
    if members[f"{roots[0]}/data.pkl"].file_size > LARGEST_PICKLE:
        raise UserError(f"{path}: its pickle alone is larger than {LARGEST_PICKLE >> 20} MiB; no checkpoint needs that")
    return roots[0]


def _read_stream(path: Path) -> Any:
    """The older layout: magic number, protocol, system, the object, the keys of its storages; then, a key each, a count and the values."""
    positions: dict[str, int] = {}
    kinds: dict[str, tuple[torch.dtype, int]] = {}

    def storage(dtype: torch.dtype, key: str, count: int) -> Storage:
        if kinds.setdefault(key, (dtype, count)) != (dtype, count):
            raise UserError(f"{path}: a damaged checkpoint (storage {brief(key)} is declared twice)")
        return Storage(dtype, count, lambda: _bytes_of(path, positions[key], count * dtype.itemsize))

    reader = _reader(path, _storage_ids(path, storage))
    with open(path, "rb") as file:
        if reader.read(file) != STREAM_MAGIC:  # type: ignore[arg-type]
            raise UserError(f"{path}: a pickle, but not one that torch.save wrote")
        if reader.read(file) != STREAM_PROTOCOL:
            raise UserError(f"{path}: a version of torch's older layout that is not known")
        reader.read(file)  # about the machine
        content, keys = reader.read(file), reader.read(file)
        position = file.tell()
        for key in keys if isinstance(keys, list) else ():
            dtype, count = kinds.get(key, (None, 0)) if isinstance(key, str) else (None, 0)
            file.seek(position)
            stored = file.read(8)
            if dtype is None or stored != struct.pack("<q", count):
                raise UserError(f"{path}: a damaged checkpoint (its storages are not as declared)")
            positions[key] = position + 8
            position += 8 + count * dtype.itemsize
    if set(kinds) - set(positions) or position > path.stat().st_size:
        raise UserError(f"{path}: a damaged checkpoint (cut short, or partly overwritten)")
    return content


def _reader(path: Path, persistent: Callable[[Any], Any]) -> PickleReader:
    return PickleReader(str(path), makers=MAKERS, inert=_is_inert, persistent=persistent)


def _is_inert(wanted: Global) -> bool:
    """Whether a global may become a record: listed, or a plain name within a package of network classes."""
    return wanted in INERT or (
        f"{wanted.module}.".startswith(INERT_PACKAGE_STARTS)
        and wanted.name.isidentifier()
        and all(part.isidentifier() for part in wanted.module.split("."))
    )


def _storage_ids(path: Path, storage: Callable[[torch.dtype, str, int], Storage]) -> Callable[[Any], Any]:
    """Understands torch's two persistent ids: storages, and (older layout) classes that are saved with their source."""

    def resolve(identity: Any) -> Any:
        if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module" and isinstance(identity[1], Global):
            return identity[1]
        match identity:
            case ("storage", Global(module="torch" | "torch.cuda", name=kind), str(key), str(), int(count), *rest) if (
                kind in STORAGES and count >= 0 and rest in ([], [None])
            ):
                return storage(STORAGES[kind], key, count)
        raise UserError(f"{path}: refers to a storage in a way that torch.save does not; refused, nothing of it was run")

    return resolve


def _tensor(args: tuple[Any, ...]) -> StoredTensor:
    """``_rebuild_tensor(storage, offset, size, stride, …)``; hooks and the like are left where they are."""
    storage, offset, shape, strides = args[:4]
    sizes, steps = _sizes(shape), _steps(strides)
    if not isinstance(storage, Storage) or len(sizes) != len(steps):
        raise UserError("a tensor that is not made of a storage, an offset, a shape and strides")
    return StoredTensor(storage, _natural(offset), sizes, steps)


def _parameter(args: tuple[Any, ...]) -> StoredTensor:
    if not args or not isinstance(args[0], StoredTensor):
        raise UserError("a parameter that is not made of a tensor")
    return args[0]


def _attribute(args: tuple[Any, ...]) -> Record:
    """A method of a module, or of a class of network layers, that is kept as an attribute: a note of both, nothing else.

    Fused models keep a module's method, YOLOv5's and YOLOv9's heads of other tasks ``Detect.forward``.
    """
    match args:
        case (Record() as owner, str(name)) if not name.startswith("__"):
            return Record(Global("builtins", "getattr"), (owner, name))
        case (Global() as owner, str(name)) if name == "forward" and f"{owner.module}.".startswith(INERT_PACKAGE_STARTS):
            return Record(Global("builtins", "getattr"), (owner, name))
    raise UserError("is allowed for a method of a module only")


def _dictionary(args: tuple[Any, ...]) -> dict[Any, Any]:
    pairs = args[0] if args and isinstance(args[0], (list, tuple)) else ()
    return {as_key(key): value for key, value in pairs}


def _collection(kind: Callable[..., Any]) -> Maker:
    def make(args: tuple[Any, ...]) -> Any:
        elements = args[0] if args and isinstance(args[0], (list, tuple)) else ()
        return kind(e for e in elements if not isinstance(e, (list, dict, set, tuple)))

    return make


def _list(args: tuple[Any, ...]) -> list[Any]:
    return list(args[0]) if args and isinstance(args[0], (list, tuple)) else []


def _tuple(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_list(args))


def _path(args: tuple[Any, ...]) -> str:
    return "/".join(str(part) for part in args if isinstance(part, str)).replace("//", "/")


def _encoded(args: tuple[Any, ...]) -> bytes:
    """Protocol 2 writes bytes as text in Latin-1."""
    match args:
        case (str(text), "latin1" | "latin-1"):
            return text.encode("latin-1")
    raise UserError("is allowed for bytes in Latin-1 only")


def _byte_string(args: tuple[Any, ...]) -> bytes:
    return bytes(args[0]) if args and isinstance(args[0], bytes) else b""


def _dtype(args: tuple[Any, ...]) -> Record:
    if not args or not isinstance(args[0], str) or args[0] not in NUMPY_SCALARS:
        raise UserError(f"arrays of type {brief(args[0] if args else None)} are not read")
    return Record(Global("numpy", "dtype"), args)


def _scalar(args: tuple[Any, ...]) -> float | int | bool:
    match args:
        case (Record(args=(str(kind), *_)), bytes(data)) if kind in NUMPY_SCALARS and len(data) == struct.calcsize(NUMPY_SCALARS[kind]):
            return struct.unpack(f"<{NUMPY_SCALARS[kind]}", data)[0]
    raise UserError("a number that is not made of its type and its bytes")


def _device(args: tuple[Any, ...]) -> str:
    if not all(isinstance(part, (str, int)) for part in args[:2]):
        raise UserError("a device that is not made of its type and its number")
    return ":".join(map(str, args[:2]))


_BUILTIN_MAKERS: dict[str, Maker] = {
    "set": _collection(set), "frozenset": _collection(frozenset), "getattr": _attribute, "bytes": _byte_string, "bytearray": _byte_string,
}  # fmt: skip
_TABLE: dict[str, dict[str, Maker]] = {
    "torch._utils": {
        "_rebuild_tensor": _tensor,
        "_rebuild_tensor_v2": _tensor,
        "_rebuild_parameter": _parameter,
        "_rebuild_parameter_with_state": _parameter,
    },
    "torch": {"Size": _tuple, "device": _device},
    "collections": {"OrderedDict": _dictionary, "defaultdict": lambda _: {}, "deque": _list},
    "_codecs": {"encode": _encoded},
    "numpy": {"dtype": _dtype},
    **dict.fromkeys(BUILTINS, _BUILTIN_MAKERS),
    **{module: {"scalar": _scalar} for module in ("numpy.core.multiarray", "numpy._core.multiarray")},
    **{
        module: {f"{pure}{kind}": _path for pure in ("", "Pure") for kind in ("Path", "PosixPath", "WindowsPath")}
        for module in ("pathlib", "pathlib._local")
    },
}
MAKERS = {Global(module, name): maker for module, makers in _TABLE.items() for name, maker in makers.items()}


def _natural(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UserError(f"{brief(value)} in place of a whole number")
    return value


def _sizes(shape: Any) -> tuple[int, ...]:
    """A shape whose number of elements can be reckoned with, empty axes counted as one."""
    sizes = _steps(shape)
    if math.prod(max(n, 1) for n in sizes) > LARGEST_SIZE:
        raise UserError(f"a tensor of more than {LARGEST_SIZE} elements")
    return sizes


def _steps(values: Any) -> tuple[int, ...]:
    """A few whole numbers, one a dimension."""
    if not isinstance(values, (list, tuple)) or len(values) > MOST_DIMENSIONS:
        raise UserError(f"{brief(values)} in place of at most {MOST_DIMENSIONS} sizes")
    steps = tuple(map(_natural, values))
    if any(step > LARGEST_SIZE for step in steps):
        raise UserError(f"a tensor with a size or stride beyond {LARGEST_SIZE}")
    return steps


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _member_bytes(path: Path, member: zipfile.ZipInfo) -> bytearray:
    """A stored member, without reading the archive's directory once more: its local header says where its bytes begin."""
    header = _bytes_of(path, member.header_offset, LOCAL_HEADER)
    name, extra = struct.unpack_from("<HH", header, LOCAL_HEADER - 4)
    data = _bytes_of(path, member.header_offset + LOCAL_HEADER + name + extra, member.file_size)
    if header[:4] != b"PK\3\4" or (member.CRC and zlib.crc32(data) != member.CRC):
        raise UserError(f"{path}: a damaged checkpoint (storage {brief(member.filename[-20:])} has other bytes than it should)")
    return data


def _bytes_of(path: Path, position: int, count: int) -> bytearray:
    with open(path, "rb") as file:
        file.seek(position)
        data = bytearray(file.read(count))
    if len(data) != count:
        raise UserError(f"{path}: a damaged checkpoint (cut short)")
    return data
