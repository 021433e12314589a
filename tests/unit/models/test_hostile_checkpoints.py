"""Checkpoints that want to run code: none does, and each is refused in one line that names what it asked for.

The pickles are written opcode by opcode, so that they hold what no honest pickler would write.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models.checkpoints.checkpoint import load_checkpoint
from models.checkpoints.torch_files import STREAM_MAGIC, STREAM_PROTOCOL
from utils.errors import UserError

SENTINEL = "ran-something"  # a file that the payloads would make, in the folder of the checkpoint


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def glob(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def stacked(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def call(function: bytes, *args: bytes) -> bytes:
    return function + tuple_of(*args) + b"R"


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def entry(value: bytes, *, key: str = "model") -> bytes:
    """A whole pickle: a checkpoint's dictionary with one entry."""
    return b"\x80\x04}(" + text(key) + value + b"u."


MODULE = b"cmodels.yolo\nDetectionModel\n)\x81"  # an object of an allowed class
TOUCH = text(f"touch {SENTINEL}")
STORAGE = tuple_of(text("storage"), glob("torch", "FloatStorage"), text("0"), text("cpu"), number(4)) + b"Q"


def tensor(*, storage: bytes = STORAGE, rest: bytes = b"", shape: bytes = b"", strides: bytes = b"", offset: bytes = b"") -> bytes:
    return call(
        glob("torch._utils", "_rebuild_tensor_v2"),
        storage,
        offset or number(0),
        shape or tuple_of(number(4)),
        strides or tuple_of(number(1)),
        rest or b"\x89" + call(glob("collections", "OrderedDict")),
    )


OS = call(glob("os", "system"), TOUCH)
# Name -> (the value of the checkpoint's model entry, what the message must name).
HOSTILE: dict[str, tuple[bytes, str]] = {
    "os.system": (OS, "os.system"),
    "posix.system": (call(glob("posix", "system"), TOUCH), "posix.system"),
    "nt.system": (call(glob("nt", "system"), TOUCH), "nt.system"),
    "subprocess": (call(glob("subprocess", "Popen"), TOUCH), "subprocess.Popen"),
    "subprocess.call": (call(stacked("subprocess", "check_output"), TOUCH), "subprocess.check_output"),
    "builtins.eval": (call(glob("builtins", "eval"), text(f"open('{SENTINEL}', 'w')")), "builtins.eval"),
    "builtins.exec": (call(glob("builtins", "exec"), text(f"open('{SENTINEL}', 'w')")), "builtins.exec"),
    "python2-eval": (call(glob("__builtin__", "eval"), text("1")), "__builtin__.eval"),
    "builtins.__import__": (call(glob("builtins", "__import__"), text("os")), "builtins.__import__"),
    "builtins.open": (call(glob("builtins", "open"), text(SENTINEL), text("w")), "builtins.open"),
    "builtins.compile": (call(glob("builtins", "compile"), text("1"), text("x"), text("eval")), "builtins.compile"),
    "getattr-of-a-class": (call(glob("builtins", "getattr"), glob("models.yolo", "Model"), text("__class__")), "builtins.getattr"),
    "getattr-of-a-dictionary": (call(glob("builtins", "getattr"), b"}", text("pop")), "builtins.getattr"),
    "getattr-dunder": (call(glob("builtins", "getattr"), MODULE, text("__reduce__")), "builtins.getattr"),
    "getattr-chain": (
        call(call(glob("builtins", "getattr"), call(glob("builtins", "__import__"), text("os")), text("system")), TOUCH),
        "builtins.__import__",
    ),
    "builtins.globals": (call(glob("builtins", "globals")), "builtins.globals"),
    "builtins.vars": (call(glob("builtins", "vars")), "builtins.vars"),
    "map": (call(glob("builtins", "map"), glob("os", "system"), tuple_of(TOUCH)), "builtins.map"),
    "functools.partial": (call(call(glob("functools", "partial"), glob("os", "system")), TOUCH), "functools.partial"),
    "functools.reduce": (call(glob("functools", "reduce"), glob("os", "system"), tuple_of(TOUCH)), "functools.reduce"),
    "operator.attrgetter": (call(call(glob("operator", "attrgetter"), text("system")), b"N"), "operator.attrgetter"),
    "operator.methodcaller": (call(call(glob("operator", "methodcaller"), text("system"), TOUCH), b"N"), "operator.methodcaller"),
    "types.FunctionType": (call(glob("types", "FunctionType"), b"N", b"}"), "types.FunctionType"),
    "types.CodeType": (call(glob("types", "CodeType"), number(0)), "types.CodeType"),
    "marshal.loads": (call(glob("marshal", "loads"), b"C\x01N"), "marshal.loads"),
    "runpy": (call(glob("runpy", "run_path"), text("x.py")), "runpy.run_path"),
    "importlib": (call(glob("importlib", "import_module"), text("os")), "importlib.import_module"),
    "pty.spawn": (call(glob("pty", "spawn"), TOUCH), "pty.spawn"),
    "shutil.rmtree": (call(glob("shutil", "rmtree"), text("/nowhere")), "shutil.rmtree"),
    "webbrowser": (call(glob("webbrowser", "open"), text("http://localhost")), "webbrowser.open"),
    "pickle.loads": (call(glob("pickle", "loads"), b"C" + bytes([len(pickle.dumps(1))]) + pickle.dumps(1)), "pickle.loads"),
    "_pickle.loads": (call(glob("_pickle", "loads"), b"C\x02N."), "_pickle.loads"),
    "copyreg": (call(glob("copyreg", "_reconstructor"), glob("os", "system"), glob("builtins", "object"), b"N"), "copyreg._reconstructor"),
    "copyreg.extension": (call(glob("copyreg", "add_extension"), text("os"), text("system"), number(1)), "copyreg.add_extension"),
    "codecs.decode": (call(glob("_codecs", "decode"), text("x"), text("rot13")), "_codecs.decode"),
    "codecs.encode-other": (call(glob("_codecs", "encode"), text("x"), text("rot13")), "_codecs.encode"),
    "pdb.run": (call(glob("pdb", "run"), text("1")), "pdb.run"),
    "timeit": (call(glob("timeit", "timeit"), text("1")), "timeit.timeit"),
    "ctypes": (call(glob("ctypes", "CDLL"), text("libc.so.6")), "ctypes.CDLL"),
    "socket": (call(glob("socket", "create_connection"), tuple_of(text("localhost"), number(1))), "socket.create_connection"),
    "site": (call(glob("site", "addsitedir"), text(".")), "site.addsitedir"),
    "sys.modules": (glob("sys", "modules"), "sys.modules"),
    "logging.config": (call(glob("logging.config", "dictConfig"), b"}"), "logging.config.dictConfig"),
    "multiprocessing": (call(glob("multiprocessing.util", "spawnv_passfds"), b"N"), "multiprocessing.util.spawnv_passfds"),
    # through torch
    "torch.load": (call(glob("torch", "load"), text("other.pt")), "torch.load"),
    "torch.storage": (call(glob("torch.storage", "_load_from_bytes"), b"C\x02N."), "torch.storage._load_from_bytes"),
    "torch.hub": (call(glob("torch.hub", "load"), text("a/b"), text("c")), "torch.hub.load"),
    "torch.jit": (call(glob("torch.jit", "load"), text("x")), "torch.jit.load"),
    "torch.jit._script": (call(glob("torch.jit._script", "unpackage_script_module"), b"N"), "torch.jit._script.unpackage_script_module"),
    "torch._inductor": (call(glob("torch._inductor.codecache", "compile_file"), b"N"), "torch._inductor.codecache.compile_file"),
    "torch.package": (call(glob("torch.package", "PackageImporter"), text("x")), "torch.package.PackageImporter"),
    "torch.ops": (call(glob("torch.ops", "load_library"), text("x.so")), "torch.ops.load_library"),
    "torch.classes": (call(glob("torch.classes", "load_library"), text("x.so")), "torch.classes.load_library"),
    "torch.utils.cpp": (call(glob("torch.utils.cpp_extension", "load"), text("x")), "torch.utils.cpp_extension.load"),
    "torch._utils-other": (
        call(glob("torch._utils", "_rebuild_wrapper_subclass"), glob("os", "system")), "torch._utils._rebuild_wrapper_subclass",
    ),
    "torch._tensor": (
        call(glob("torch._tensor", "_rebuild_from_type_v2"), glob("os", "system"), b"N", b")", b"}"), "torch._tensor._rebuild_from_type_v2",
    ),
    "rebuild-of-a-callable": (call(glob("torch._utils", "_rebuild_tensor_v2"), glob("os", "system"), number(0), b")", b")"), "os.system"),
    "parameter-of-a-callable": (call(glob("torch._utils", "_rebuild_parameter"), glob("models.a", "B"), b"\x88"), "_rebuild_parameter"),
    # within a tensor
    "backward-hooks": (tensor(rest=b"\x89" + call(glob("collections", "OrderedDict"), b"]" + tuple_of(number(0), OS) + b"a")), "os.system"),
    "requires-grad": (tensor(rest=OS + b"}"), "os.system"),
    "metadata": (tensor(rest=b"\x89}" + b"}(" + text("x") + OS + b"u"), "os.system"),
    "storage-type": (
        tensor(storage=tuple_of(text("storage"), glob("os", "system"), text("0"), text("cpu"), number(4)) + b"Q"), "os.system",
    ),
    "a-call-as-shape": (tensor(shape=OS), "os.system"),
    # through numpy
    "numpy.load": (call(glob("numpy", "load"), text("x.npy")), "numpy.load"),
    "numpy.f2py": (call(glob("numpy.f2py.crackfortran", "getlincoef"), text("1"), b"}"), "numpy.f2py.crackfortran.getlincoef"),
    "numpy-objects": (call(glob("numpy", "dtype"), text("O8"), b"\x89", b"\x88"), "numpy.dtype"),
    "numpy.testing": (call(glob("numpy.testing._private.utils", "runstring"), text("1"), b"}"), "numpy.testing._private.utils.runstring"),
    "numpy-reconstruct": (call(glob("numpy.core.multiarray", "_reconstruct"), glob("os", "system"), tuple_of(number(0))), "os.system"),
    # names that are put together
    "dotted-global": (call(glob("torch", "os.system"), TOUCH), "torch.os.system"),
    "dotted-stacked": (call(stacked("torch", "os.system"), TOUCH), "torch.os.system"),
    "dotted-in-an-allowed-package": (call(stacked("models.yolo", "os.system"), TOUCH), "models.yolo.os.system"),
    "allowed-package-by-letters": (call(stacked("models_evil", "run"), TOUCH), "models_evil.run"),
    "computed-name": (text("os") + call(glob("torch", "device"), text("system")) + b"\x93" + tuple_of(TOUCH) + b"R", "os.system"),
    "name-that-is-no-text": (number(3) + number(4) + b"\x93)R", "no text"),
    "lines-in-a-name": (call(stacked("os\nsystem", "a\nb"), TOUCH), r"os\nsystem.a\nb"),
    # other opcodes
    "inst": (b"(" + TOUCH + b"ios\nsystem\n", "os.system"),
    "obj": (b"(" + glob("os", "system") + TOUCH + b"o", "os.system"),
    "newobj": (glob("os", "system") + tuple_of(TOUCH) + b"\x81", "os.system"),
    "newobj-ex": (glob("os", "system") + tuple_of(TOUCH) + b"}\x92", "os.system"),
    "ext1": (b"\x82\x01", "extension 1"),
    "ext2": (b"\x83\x01\x01", "extension 257"),
    "ext4": (b"\x84\x01\0\0\0", "extension 1"),
    "call-of-a-record": (MODULE + tuple_of(TOUCH) + b"R", "no class"),
    "call-of-text": (text("os.system") + tuple_of(TOUCH) + b"R", "no class"),
    "args-that-are-no-tuple": (glob("models.yolo", "Model") + text("x") + b"R", "no class"),
    "build-setstate": (MODULE + b"}(" + text("__setstate__") + glob("os", "system") + b"ub", "os.system"),
    "build-setstate-harmless": (MODULE + b"}(" + text("__setstate__") + glob("models.a", "B") + b"ub", "__setstate__"),
    "build-class": (MODULE + b"}(" + text("__class__") + glob("models.a", "B") + b"ub", "__class__"),
    "build-dict": (MODULE + b"}(" + text("__dict__") + b"}ub", "__dict__"),
    "build-slots": (MODULE + b"N}(" + text("__reduce__") + b"Nu\x86b", "__reduce__"),
    "build-on-a-class": (glob("models.yolo", "Model") + b"}(" + text("forward") + b"Nub", "models.yolo.Model itself"),
    "nested": (MODULE + b"}(" + text("_modules") + b"}(" + text("0") + MODULE + b"}(" + text("act") + OS + b"ubuub", "os.system"),
    "in-the-yaml": (MODULE + b"}(" + text("yaml") + b"}(" + text("head") + b"](" + OS + b"euub", "os.system"),
    "as-a-key": (b"}(" + OS + b"Nu", "os.system"),
    "thrown-away": (OS + b"0" + MODULE, "os.system"),
    "as-a-persistent-id": (OS + b"Q", "os.system"),
    "persistent-id-module": (tuple_of(text("module"), glob("os", "system"), text("x.py"), text("x")) + b"Q", "os.system"),
    "defaultdict-factory": (call(glob("collections", "defaultdict"), glob("os", "system")), "os.system"),
    "out-of-band-buffer": (b"\x97", "NEXT_BUFFER"),
}  # fmt: skip


def zipped(path: Path, pickled: bytes, *, storages: tuple[bytes, ...] = (b"\0" * 16,)) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, data in enumerate(storages):
            archive.writestr(f"archive/data/{key}", data)


def streamed(path: Path, pickled: bytes) -> None:
    """torch's older layout around the same pickle."""
    storages = pickle.dumps(["0"], 2) + struct.pack("<q", 4) + b"\0" * 16
    path.write_bytes(b"".join(pickle.dumps(v, 2) for v in (STREAM_MAGIC, STREAM_PROTOCOL, {"little_endian": True})) + pickled + storages)


@pytest.mark.parametrize("write", [zipped, streamed])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickle_is_refused_by_name_and_runs_nothing(tmp_path, monkeypatch, name, write: Callable[[Path, bytes], None]):
    monkeypatch.chdir(tmp_path)
    value, named = HOSTILE[name]
    path = tmp_path / "model.pt"
    write(path, entry(value))
    ran: list[object] = []
    monkeypatch.setattr(os, "system", ran.append)
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert named in message, message
    assert message.startswith(str(path)), message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 250
    assert not ran
    assert os.listdir(tmp_path) == ["model.pt"]


def test_hostile_pickles_do_run_under_the_standard_unpickler(tmp_path, monkeypatch):
    """The same bytes through the standard library's reader: the suite would notice."""
    monkeypatch.chdir(tmp_path)
    ran: list[object] = []
    monkeypatch.setattr(os, "system", ran.append)
    reader = pickle.Unpickler(io.BytesIO(entry(OS)))
    reader.load()
    assert ran == [f"touch {SENTINEL}"]


class Chain:
    """An object whose reduction is a chain of reductions."""

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def __reduce__(self):
        return (getattr, (Chain(self.depth - 1), "x")) if self.depth else (os.system, (f"touch {SENTINEL}",))


@pytest.mark.parametrize("older", [False, True])
def test_a_chain_of_reductions_is_refused(tmp_path, monkeypatch, older):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"w": torch.ones(2)}, "epoch": Chain(5)}, "chain.pt", _use_new_zipfile_serialization=not older)
    with pytest.raises(UserError, match=r"chain\.pt: asks for posix\.system|chain\.pt: asks for nt\.system"):
        load_checkpoint("chain.pt")
    assert not Path(SENTINEL).exists()


def deep(opcode: bytes, depth: int) -> bytes:
    return b"N" + opcode * depth


MODULES = b"}(" + text("_modules") + b"}(" + text("a")


def nested_modules(depth: int) -> bytes:
    return (MODULE + MODULES) * depth + MODULE + b"uub" * depth


WITHIN_ITSELF = MODULE + b"\x94}(" + text("_modules") + b"}(" + text("a") + b"h\0uub"
DAMAGED: dict[str, tuple[bytes, str]] = {
    "nested-tuples": (deep(b"\x85", 200_000), "nested more than"),
    "nested-tuple-as-a-key": (b"}(" + deep(b"\x85", 200_000) + b"Nu", "damaged"),
    "nested-lists": (b"]" * 100_000 + b"a" * 99_999, "nested more than"),
    "nested-modules": (nested_modules(3000), "nested|not rows"),
    "within-itself": (WITHIN_ITSELF, "holds itself"),
    "memo-that-is-not-there": (b"h\x07", "damaged"),
    "huge-memo-number": (b"Nr\xff\xff\xff\x7f", "not a network|no network|place"),
    "huge-string": (b"X\xff\xff\xff\x7f", "damaged"),
    "huge-bytes": (b"\x8e" + b"\xff" * 7 + b"\x0f", "damaged"),
    "no-mark": (b"t", "damaged"),
    "empty-stack": (b"R", "damaged"),
    "unknown-opcode": (b"\xff", "damaged"),
    "newer-protocol": (b"\x80\x09N", "protocol 9"),
    "tensor-larger-than-its-storage": (b"}(" + text("w") + tensor(shape=tuple_of(number(5))) + b"u", "w: a tensor of shape .5. is larger"),
    "tensor-behind-its-storage": (b"}(" + text("w") + tensor(offset=number(1)) + b"u", "larger"),
    "tensor-in-steps-of-0": (
        b"}(" + text("w") + tensor(shape=tuple_of(number(2**30), number(2**30)), strides=tuple_of(number(0), number(0))) + b"u",
        "more than .* elements",
    ),
    "negative-shape": (b"}(" + text("w") + tensor(shape=tuple_of(number(-4))) + b"u", "-4 in place of a whole number"),
    "storage-not-as-promised": (
        tensor(storage=tuple_of(text("storage"), glob("torch", "FloatStorage"), text("0"), text("cpu"), number(9)) + b"Q"), "damaged",
    ),
    "storage-outside": (
        tensor(storage=tuple_of(text("storage"), glob("torch", "FloatStorage"), text("../../x"), text("cpu"), number(4)) + b"Q"), "damaged",
    ),
    "odd-persistent-id": (tuple_of(text("storage"), number(3)) + b"Q", "refers to a storage"),
    "text-persistent-id": (b"P3\n", "refers to a storage"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_out_of_bounds_sizes_give_one_line(tmp_path, name):
    value, says = DAMAGED[name]
    zipped(tmp_path / "model.pt", entry(value))
    with pytest.raises(UserError, match=says) as caught:
        load_checkpoint(tmp_path / "model.pt")
    assert "\n" not in str(caught.value)


def archive_of(path: Path, members: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression=compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    ("members", "compression", "says"),
    [
        ({"a/data.pkl": entry(b"N"), "a/data/0": b"\0" * (64 << 20)}, zipfile.ZIP_DEFLATED, "compressed"),
        ({"a/data.pkl": entry(b"N"), "../evil": b""}, zipfile.ZIP_STORED, "outside its own folder"),
        ({"a/data.pkl": entry(b"N"), "a/../../evil": b""}, zipfile.ZIP_STORED, "outside its own folder"),
        ({"a/data.pkl": entry(b"N"), "b/data.pkl": entry(b"N")}, zipfile.ZIP_STORED, "not a checkpoint"),
        ({"a/data.pkl": entry(b"N"), "a/byteorder": b"big"}, zipfile.ZIP_STORED, "big-endian"),
    ],
    ids=["bomb", "traversal", "inner-traversal", "two-roots", "big-endian"],
)
def test_archives_unlike_those_of_torch_are_refused(tmp_path, members, compression, says):
    archive_of(tmp_path / "x.pt", members, compression=compression)
    with pytest.raises(UserError, match=says):
        load_checkpoint(tmp_path / "x.pt")


def test_overlapping_storages_larger_than_the_file_are_refused(tmp_path):
    """Every entry of the directory points at the same bytes."""
    path = tmp_path / "x.pt"
    archive_of(path, {"a/data.pkl": entry(b"N"), "a/data/0": b"\0" * 4096})
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\1\2", data.index(b"PK\1\2") + 1)
    end = data.index(b"PK\5\6")
    record, tail = bytes(data[start:end]), bytes(data[end:])
    copies = [record.replace(b"a/data/0", f"a/data/{i}".encode()) for i in range(10)]
    directory = bytes(data[data.index(b"PK\1\2") : start]) + b"".join(copies)
    tail = tail[:8] + struct.pack("<HHI", 11, 11, len(directory)) + tail[16:]
    path.write_bytes(bytes(data[: data.index(b"PK\1\2")]) + directory + tail)
    with pytest.raises(UserError, match=r"more bytes than it has|damaged"):
        load_checkpoint(path)


def test_storage_with_changed_bytes_is_detected(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a.weight": torch.arange(64.0)}, path)
    data = path.read_bytes()
    place = data.index(torch.arange(64.0).numpy().tobytes())
    path.write_bytes(data[:place] + b"\x01" + data[place + 1 :])
    with pytest.raises(UserError, match="has other bytes than it should"):
        load_checkpoint(path)
