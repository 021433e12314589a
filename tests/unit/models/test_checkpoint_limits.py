"""Small files that name large, deep or wrong things end in one line; so do a thousand damaged ones, drawn with a seed."""

from __future__ import annotations

import json
import pickle
import random
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch

from models import build_model
from models.checkpoints import checkpoint as checkpoint_module
from models.checkpoints.checkpoint import Checkpoint, load_checkpoint, load_model, save_checkpoint
from tests.unit.models.test_hostile_checkpoints import call, entry, glob, text, tuple_of, zipped
from utils.errors import UserError, printable
from utils.reading.limits import DEEPEST, MOST_DIMENSIONS, MOST_VALUES, brief, measure

HOSTILE = sorted((Path(__file__).parents[2] / "goldens" / "hostile").iterdir())
LAUGHS = b"N" + b"2\x86" * 60  # a tuple that holds the one before it twice: 2^60 values if it were written out
FUZZ_SECONDS, FUZZ_FILES = 20, 400
TINY = {
    "nc": 2,
    "backbone": [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [16, 3, 2]]],
    "head": [[[1, 2], 1, "Detect", ["nc"]]],
}


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert path.name in message
    return message


@pytest.mark.parametrize("path", HOSTILE, ids=lambda p: p.name)
def test_small_hostile_files_end_in_one_line(path):
    assert refused(path).isprintable()


@pytest.mark.parametrize(
    "value",
    [
        LAUGHS,
        call(glob("torch", "Size"), LAUGHS),
        call(glob("torch", "device"), LAUGHS),
        call(glob("numpy", "dtype"), LAUGHS),
        call(glob("collections", "OrderedDict"), tuple_of(tuple_of(LAUGHS, text("x")))),
        call(glob("collections", "deque"), LAUGHS),
        call(glob("torch._utils", "_rebuild_tensor_v2"), LAUGHS, LAUGHS, LAUGHS, LAUGHS),
        call(glob("pathlib", "PosixPath"), LAUGHS),
        b"}(" + LAUGHS + text("x") + b"u",
        LAUGHS + b"Q",
    ],
    ids=["value", "size", "device", "dtype", "ordered", "deque", "tensor", "path", "key", "persistent"],
)
def test_nested_tuples_are_never_hashed_or_printed(tmp_path, value):
    zipped(tmp_path / "laughs.pt", entry(value))
    refused(tmp_path / "laughs.pt")


def test_values_are_measured_as_if_written_out():
    shared = [0]
    measure([shared] * 1000)
    for wrong in (nested(DEEPEST + 1), doubled(23)):
        with pytest.raises(UserError, match=r"nested more than|holds more than"):
            measure(wrong)
    measure(nested(DEEPEST - 1))
    measure(doubled(20))
    assert MOST_VALUES < 2**23
    shared.append(shared)
    with pytest.raises(UserError, match="holds itself"):
        measure([shared])


def nested(depth: int) -> list:
    value: list = [0]
    for _ in range(depth - 1):
        value = [value]
    return value


def doubled(times: int) -> tuple:
    value: tuple = (0,)
    for _ in range(times):
        value = (value, value)
    return value


def test_many_tensors_of_one_storage_are_refused(tmp_path):
    storage = torch.zeros(1 << 20)
    torch.save({f"model.{i}.conv.weight": storage for i in range(300)}, tmp_path / "many.pt")
    assert "MiB in the file" in refused(tmp_path / "many.pt")


@pytest.mark.parametrize(("field", "value"), [("shape", [1] * 100_000), ("shape", [2**62, 0]), ("dtype", [[]]), ("data_offsets", [0, {}])])
def test_safetensors_tables_are_checked_before_they_are_used(tmp_path, field, value):
    table = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | {field: value}}
    header = json.dumps(table).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    refused(tmp_path / "x.safetensors")
    assert MOST_DIMENSIONS < 100


def test_two_parts_of_one_name_are_refused(tmp_path, recwarn):
    zipped(tmp_path / "two.pt", entry(b"N"))
    with zipfile.ZipFile(tmp_path / "two.pt", "a") as archive:
        archive.writestr("archive/data.pkl", entry(b"]"))
    assert "two parts of one name" in refused(tmp_path / "two.pt")


def own_checkpoint(path: Path, **changes: object) -> Path:
    model = build_model(TINY)
    held = Checkpoint(cfg=model.spec.to_dict(), cfg_name="tiny.yaml", names=("a", "b"), weights=model.state_dict())
    save_checkpoint(path, held)
    if changes:
        torch.save({**torch.load(path, weights_only=True), **changes}, path)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"cfg": "x"}, {"cfg": ["x"]}, {"cfg": {}}, {"names": 3}, {"names": [1, 2]}, {"names": ["a"]}, {"weights": []},
        {"weights": {"a": 1}},
        {"plugins": 5}, {"plugins": [{"name": "x"}]}, {"epoch": "1"}, {"epoch": -1}, {"fitness": "best"}, {"training": 7}, {"hyp": []},
        {"config": None}, {"cfg_name": b"x"}, {"metrics": {"a": "b"}}, {"format_version": "1"},
        {"cfg": {"nc": 10**9, "backbone": [], "head": []}}, {"cfg": {**TINY, "backbone": [[-1, 1, "Conv", [10**9, 3, 2]]]}},
        {"cfg": {**TINY, "backbone": [[-1, 10**9, "Conv", [8, 3, 2]]]}}, {"cfg": {**TINY, "width_multiple": float("inf")}},
        {"cfg": {**TINY, "depth_multiple": 10**9}}, {"cfg": {**TINY, "ch": 10**12}},
        {"cfg": {**TINY, "backbone": [[-1, 1, "Conv", [60000, 99]]]}},
    ],
    ids=lambda c: "-".join(f"{k}-{brief(v)}"[:30] for k, v in c.items()),
)  # fmt: skip
def test_fields_of_another_type_or_size_are_named(tmp_path, changes):
    if changes in ({"cfg": {}}, {"names": ["a"]}):
        refused(own_checkpoint(tmp_path / "x.pt", **changes))
        return
    key = next(iter(changes))
    assert key in refused(own_checkpoint(tmp_path / "x.pt", **changes)) or key == "cfg"


def test_text_from_files_is_printable():
    assert printable("ab\nc\x1b[31m\ud800") == "ab\\nc\\x1b[31m\\ud800"
    assert printable("猫 é") == "猫 é"
    model = brief("x" * 100)
    assert len(model) < 50
    assert brief(doubled(50)) == "a tuple"
    assert brief(10**5000).startswith("a whole number of")


def test_class_names_from_a_file_cannot_reach_the_terminal_raw(tmp_path):
    path = own_checkpoint(tmp_path / "x.pt", names=["\x1b[31mred", "b\nc"])
    assert load_checkpoint(path).names == ("\\x1b[31mred", "b\\nc")


def mutated(data: bytes, draw: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        place = draw.randrange(len(out))
        kind = draw.randrange(4)
        if kind == 0:
            out[place] = draw.randrange(256)
        elif kind == 1:
            del out[place : place + draw.randrange(1, 64)]
        elif kind == 2:
            out[place:place] = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 9)))
        else:
            end = place + draw.randrange(1, 32)
            out[place:place] = out[place:end]
        if not out:
            return bytes([0])
    return bytes(out)


@pytest.mark.parametrize("kind", ["own", "pickle", "stream", "safetensors"])
def test_damaged_files_end_in_one_line_or_load(tmp_path, kind):
    """Bytes are changed, cut, doubled; in pickles, where a checksum would hide the change from the reader, before the file is made."""
    draw, until = random.Random(f"fuzz {kind}"), time.monotonic() + FUZZ_SECONDS / 4
    whole = own_checkpoint(tmp_path / "own.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "own.pt") as archive:
        pickled = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    torch.save({"model.0.conv.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "stream.pt", _use_new_zipfile_serialization=False)
    stream = (tmp_path / "stream.pt").read_bytes()
    table = json.dumps({"__metadata__": {"a": "b"}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    safe = struct.pack("<Q", len(table)) + table + b"\0" * 4
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pt")
    for _ in range(FUZZ_FILES):
        if kind == "pickle":
            zipped(path, mutated(pickled, draw))
        else:
            path.write_bytes(mutated({"own": whole, "stream": stream, "safetensors": safe}[kind], draw))
        try:
            load_checkpoint(path)
        except UserError as error:
            assert len(str(error)) < 1000  # noqa: PT017 - loading is right, too
        if time.monotonic() > until:
            break


def test_pickles_of_python_objects_are_refused(tmp_path):
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"model": Path("x")}))
    refused(tmp_path / "x.pt")


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    """A training replaces last.pt whole; its tensors are never those of two saves."""
    path, other = own_checkpoint(tmp_path / "last.pt"), own_checkpoint(tmp_path / "next.pt", epoch=7)
    read, calls = checkpoint_module.read_torch_file, []

    def replaced(file: Path) -> object:
        content = read(file)
        if not calls:
            calls.append(other.replace(path))
        return content

    monkeypatch.setattr(checkpoint_module, "read_torch_file", replaced)
    assert load_checkpoint(path).epoch == 7
    assert len(calls) == 1
