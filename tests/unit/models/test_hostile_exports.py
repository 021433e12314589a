"""Exported files that others made: opening and running one computes and does nothing else, and a damaged one ends in one line."""

from __future__ import annotations

import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from models.analysis.catalogue import build_same_width, same_width_names
from models.export.archive import MOST_CODE_BYTES, copy_checked
from models.export.archive_code import check_code
from models.export.exporting import ExportOptions, export_model
from models.export.model import load_exported
from models.layers.attention.ops.shared import window_means
from tests.tiny import tiny_model
from utils.errors import UserError

pytestmark = pytest.mark.filterwarnings(r"ignore:`?torch\.jit\.:FutureWarning", r"ignore:`?torch\.jit\.:DeprecationWarning")
NAMES = {"names": "{0: 'a', 1: 'b'}", "stride": "32", "imgsz": "[64, 64]"}
WRITTEN = "/nonexistent/written by a model"  # by tests that only read code


class Network(torch.nn.Module):
    """Six numbers for each of ten places, whatever the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images).flatten(2)[:, :, :10].abs()


class SavesInForward(Network):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        torch.save(images, "TARGET")
        return self.conv(images).flatten(2)[:, :, :10]


class SavesWhileLoading(torch.nn.Module):
    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return torch.zeros(1), self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        self.training = state[1]
        torch.save(torch.ones(1), "TARGET")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat((images, images), 1).flatten(2)[:, :, :10]


def traced(path: Path, config: object = NAMES, *, module: torch.nn.Module | None = None, channels: int = 3, side: int = 64) -> Path:
    """An archive as export.py writes them, with any metadata."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        script = torch.jit.trace(module or Network(), torch.rand(1, channels, side, side), check_trace=False)
        text = config if isinstance(config, str) else json.dumps(config)
        torch.jit.save(script, str(path), _extra_files={"config.txt": text})
    return path


def rewritten(path: Path, change: Callable[[str, bytes], bytes | None]) -> Path:
    """The archive with members changed, or left out where None is returned."""
    with zipfile.ZipFile(path) as source:
        members = {info.filename: source.read(info) for info in source.infolist()}
    with zipfile.ZipFile(path, "w") as target:
        for name, data in members.items():
            if (changed := change(name.partition("/")[2], data)) is not None:
                target.writestr(name, changed)
    return path


def refusal(path: Path, **options: bool) -> str:
    with pytest.raises(UserError) as caught:
        load_exported(path, **options).predict(torch.rand(1, 3, 64, 64))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    return str(caught.value)


@pytest.mark.parametrize(("module", "named"), [(SavesInForward, "torch.save"), (SavesWhileLoading, "def __getstate__")])
def test_a_file_cannot_write_files_unless_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: type[Network], named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.jit.save(torch.jit.script(module()), "x.torchscript", _extra_files={"config.txt": json.dumps(NAMES)})
    assert named in refusal(Path("x.torchscript"))
    assert "--trust" in refusal(Path("x.torchscript"))
    assert not Path("TARGET").exists()
    load_exported("x.torchscript", trust=True).predict(torch.rand(1, 3, 64, 64))
    assert Path("TARGET").exists()


BODY = """class Network(Module):
  __parameters__ = ["weight", ]
  __buffers__ = []
  weight : Tensor
  __annotations__["0"] = __torch__.torch.nn.modules.conv.Conv2d
  def forward(self: __torch__.m.Network,
    images: Tensor) -> Tensor:
    _0 = getattr(self, "0")
    _1 = torch.add((_0).forward(images, ), CONSTANTS.c0, alpha=-1.5e-05)
    _2 = annotate(List[int], [1, int(torch.size(_1, 2)), -1])
    STATEMENT
    return torch.to(_1, torch.device("cpu"), 6)
"""
REFUSED = {
    "save": f'_3 = torch.save(_1, "{WRITTEN}")',
    "from_file": f'_3 = torch.from_file("{WRITTEN}", True, 1)',
    "an operator without a call": "_3 = torch.save",
    "an operator over two words": "_3 = torch . save(_1)",
    "brackets around the place": f'_3 = torch.add((torch\n  .save)(_1, "{WRITTEN}"), 1)',
    "a namespace": "_3 = torch",
    "the other namespace": f'_3 = ops.aten.save(_1, "{WRITTEN}")',
    "another package's operator": '_3 = ops.image.write_file("x", _1)',
    "a method": f'(_1).save("{WRITTEN}")',
    "a method of a text": f'("{WRITTEN}").save(_1)',
    "a method of a name": f'_1.save("{WRITTEN}")',
    "getattr and a call": f'getattr(_1, "save")("{WRITTEN}")',
    "getattr and an alias": f'_3 = getattr(_1, "save")\n    _4 = _3("{WRITTEN}")',
    "an alias of an allowed name": f'int = getattr(_1, "save")\n    _4 = int("{WRITTEN}")',
    "an alias in a tuple": f'(int, _4) = (getattr(_1, "save"), 1)\n    _4 = int("{WRITTEN}")',
    "a list and a call": f'[_1.save][0]("{WRITTEN}")',
    "print": '_3 = print("x")',
    "a class of C++": "_3 = __torch__.torch.classes.dist_rpc.X",
    "a class made": "_3 = __torch__.m.Network()",
    "a comment": "# a comment",
    "an escape": '_3 = "\\x41"',
    "a long text": '_3 = """a"""',
    "another quote": "_3 = 'a'",
    "a carriage return": "_3 = 1\r    _4 = 2",
    "a tab": "\t_3 = 1",
    "two statements": "_3 = 1; _4 = 2",
    "a loop": "while True:\n      _3 = 1",
    "a condition": "if True:\n      _3 = 1",
    "a comprehension": "_3 = [x for x in _2]",
    "a context": "with _1:\n      _3 = 1",
    "raise": 'raise Exception("x")',
    "letters of no alphabet": "_3 = é",
    "a nesting": f"_3 = {'(' * 1000}1{')' * 1000}",
    "a chain": f"_3 = _1{'.T' * 5000}",
    "indices": f"_3 = _1{'[0]' * 5000}",
    "signs": f"_3 = {'-' * 5000}1",
    "an unmatched bracket": "_3 = (1",
    "another unmatched bracket": "_3 = (1]",
}


def test_the_code_of_a_trace_is_accepted() -> None:
    check_code(BODY.replace("STATEMENT", "_3 = torch.cat([_1, _1], 1)"), where="here")


@pytest.mark.parametrize("name", REFUSED)
def test_other_code_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^here holds .*, which no exported network needs$"):
        check_code(BODY.replace("STATEMENT", REFUSED[name]), where="here")


@pytest.mark.parametrize(
    "text",
    [
        "class X(NamedTuple):\n",
        "class X(Enum):\n",
        "class X(Module):\n  def __setstate__(self: X) -> None:\n",
        "def helper(x: Tensor) -> Tensor:\n",
    ],
)
def test_other_classes_and_functions_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="which no exported network needs"):
        check_code(text, where="here")


def test_the_code_of_every_attention_module_is_accepted(tmp_path: Path) -> None:
    """Otherwise export.py would write files that detect.py refuses."""
    path = tmp_path / "x.torchscript"
    for name in same_width_names():
        traced(path, module=build_same_width(name, 32).eval(), channels=32, side=7)
        assert copy_checked(path, tmp_path / "copy.torchscript", extra="config.txt"), name


def _with_code(text: bytes) -> Callable[[str, bytes], bytes]:
    return lambda name, data: data + text if name.endswith(".py") else data


def test_every_member_with_code_is_read_whatever_its_name(tmp_path: Path) -> None:
    evil = b'\ndef forward9(x: Tensor) -> Tensor:\n  return torch.save(x, "y")\n'
    assert "torch.save" in refusal(rewritten(traced(tmp_path / "a.torchscript"), _with_code(evil)))
    path = traced(tmp_path / "b.torchscript")
    for name in ("b/code/__torch__/x.PY", "b/code/x", "b/model.json", "b/bytecode.pkl", "c/code/__torch__/x.py", "b/../x.py"):
        with zipfile.ZipFile(traced(path), "a") as archive:
            archive.writestr(name, evil)
        assert "holds the member" in refusal(path)
    with zipfile.ZipFile(traced(path), "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("b/DATA.pkl", b"")
    assert "holds the member" in refusal(path) or "two members" in refusal(path)


def test_only_the_members_that_were_read_are_opened(tmp_path: Path) -> None:
    path = traced(tmp_path / "a.torchscript")
    path.write_bytes(b"not of the archive" + path.read_bytes())  # zip archives may have anything in front
    assert copy_checked(path, tmp_path / "copy.torchscript", extra="config.txt") == json.dumps(NAMES)
    assert (tmp_path / "copy.torchscript").read_bytes().startswith(b"PK")
    assert not any("extra" in name or "debug" in name for name in zipfile.ZipFile(tmp_path / "copy.torchscript").namelist())
    assert load_exported(path).predict(torch.rand(1, 3, 64, 64)).boxes.shape == (1, 10, 4)


def test_sizes_are_bounded(tmp_path: Path) -> None:
    path = traced(tmp_path / "a.torchscript")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/code/__torch__/long.py", b" " * (MOST_CODE_BYTES + 1))
    assert "bytes of code; at most" in refusal(path)
    path = traced(tmp_path / "b.torchscript")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b/data/99", bytes(10_000_000))
    assert "holds the member 'b/data/99'" in refusal(path)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 1 << 30, 0, 0)
    path.write_bytes(b"PK\3\4" + bytes(1000) + end)
    assert "a table of contents of 1,073,741,824 bytes" in refusal(path)


def _tensor(*, elements: int = 1, shape: tuple[int, ...] = (1,), strides: tuple[int, ...] = (1,)) -> bytes:
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpu" + _number(elements) + b"tQ"
    sides = b"".join(b"(" + b"".join(map(_number, numbers)) + b"t" for numbers in (shape, strides))
    return b"\x80\2ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + sides + b"\x89ccollections\nOrderedDict\n)RtR."


def _number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


PICKLES = {
    "a class of C++": b"\x80\2c__torch__.torch.classes.dist_rpc\nX\n)\x81.",
    "another class": b"\x80\2cos\nsystem\n.",
    "a class by two texts": b"\x80\4X\2\0\0\0osX\6\0\0\0system\x93.",
    "another object": pickle.dumps(Path("x")),
    "more numbers than the member has": _tensor(elements=1 << 20),
    "a shape beyond the numbers": _tensor(shape=(1 << 20,)),
    "strides beyond the numbers": _tensor(shape=(2,), strides=(1 << 20,)),
    "a negative side": _tensor(shape=(-1,)),
    "sides without strides": _tensor(shape=(1, 1)),
    "nested tuples": b"\x80\2)" + b"\x85" * 100_000 + b".",
    "a list in itself": b"\x80\2]q\0h\0a.",
    "cut off": b"\x80\2(",
    "nothing": b"",
}


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("member", ["data.pkl", "constants.pkl"])
def test_pickles_that_are_no_network_are_refused(tmp_path: Path, name: str, member: str) -> None:
    path = rewritten(traced(tmp_path / "a.torchscript"), lambda at, data: PICKLES[name] if at == member else data)
    refusal(path)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.6, 0.9, 0.99])
def test_a_file_cut_off_is_one_line(tmp_path: Path, part: float) -> None:
    path = traced(tmp_path / "a.torchscript")
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    assert "damaged" in refusal(path)


ENTRIES: Mapping[str, tuple[str, str]] = {
    "stride 0": ("stride", "0"),
    "a negative stride": ("stride", "-32"),
    "a huge stride": ("stride", "1e9"),
    "a stride that is a list": ("stride", "[32]"),
    "no stride": ("stride", "None"),
    "batch 0": ("batch", "0"),
    "a negative batch": ("batch", "-1"),
    "half a batch": ("batch", "0.5"),
    "an infinite size": ("imgsz", "[1e999, 64]"),
    "size NaN": ("imgsz", "nan"),
    "a huge size": ("imgsz", "[1000000, 1000000]"),
    "a size for a terabyte": ("imgsz", "[65536, 65536]"),
    "a size of 0": ("imgsz", "0"),
    "three sides": ("imgsz", "[64, 64, 64]"),
    "a nested size": ("imgsz", "[[64], [64]]"),
    "a size of many digits": ("imgsz", "[" + "9" * 4000 + ", 64]"),
    "a size of too many digits": ("imgsz", "[" + "9" * 5000 + ", 64]"),
    "names that are a number": ("names", "5"),
    "names that are a word": ("names", "ab"),
    "names that are nested": ("names", "[['a'], 'b']"),
    "names without numbers": ("names", "{'x': 'a'}"),
    "a name too long": ("names", "['a', '" + "b" * 2000 + "']"),
    "an end that is a number": ("end2end", "7"),
    "dynamic that is a word": ("dynamic", "maybe"),
    "a deep nesting": ("names", "[" * 5000),
    "many signs": ("stride", "-" * 100_000 + "1"),
    "a task that is a list": ("task", "[1]"),
    "a threshold of 5": ("iou", "5"),
    "an infinite threshold": ("conf", "1e999"),
    "detections without end": ("topk", "10000000000"),
}


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "x.onnx"
    export_model(tiny_model(), "onnx", path, ExportOptions(imgsz=(64, 64), dynamic=True))
    return path


def with_metadata(source: Path, path: Path, entries: Mapping[str, str]) -> Path:
    onnx = pytest.importorskip("onnx")
    proto = onnx.load(source)
    kept = {p.key: p.value for p in proto.metadata_props} | entries
    del proto.metadata_props[:]
    for key, value in kept.items():
        proto.metadata_props.add(key=key, value=value)
    onnx.save(proto, path)
    return path


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("suffix", [".torchscript", ".onnx"])
def test_metadata_out_of_range_names_its_key(tmp_path: Path, onnx_file: Path, name: str, suffix: str) -> None:
    key, value = ENTRIES[name]
    path = tmp_path / f"x{suffix}"
    if suffix == ".onnx":
        with_metadata(onnx_file, path, {key: value})
    else:
        traced(path, {**NAMES, key: value})
    message = refusal(path)
    assert f"its {key} is" in message or "its height is" in message or "takes images of" in message


@pytest.mark.parametrize(
    "config", ["5", "null", "[]", '"text"', "{", "[" * 100_000, '{"stride": NaN}', '{"imgsz": [Infinity, 64]}', "\x00"]
)
def test_metadata_that_is_no_mapping_is_one_line(tmp_path: Path, config: str) -> None:
    assert "export it again" in refusal(traced(tmp_path / "x.torchscript", config))


class Answers(Network):
    """Runs, and gives something else than a detector."""

    def __init__(self, answer: str) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, images: torch.Tensor) -> object:
        found = super().forward(images)
        return {
            "too many images": lambda: torch.cat((found, found)),
            "one number": lambda: found.sum(),
            "two outputs": lambda: (found, found),
            "too few rows": lambda: found[:, :5],
            "nested": lambda: (found, (found, found)),
            "fails": lambda: found.reshape(1, 7, -1),
        }[self.answer]()


@pytest.mark.parametrize("answer", ["too many images", "one number", "two outputs", "too few rows", "nested"])
def test_other_outputs_are_one_line(tmp_path: Path, answer: str) -> None:
    refusal(traced(tmp_path / "x.torchscript", module=Answers(answer)))


def test_a_network_that_fails_is_one_line(tmp_path: Path) -> None:
    path = rewritten(
        traced(tmp_path / "x.torchscript"), lambda name, data: data.replace(b"torch.abs(", b"torch.view(") if name.endswith(".py") else data
    )
    refusal(path)


def test_a_network_for_other_channels_than_its_metadata_is_one_line(tmp_path: Path) -> None:
    path = traced(tmp_path / "x.torchscript", {**NAMES, "channels": "4"})
    with pytest.raises(UserError, match="cannot be run"):
        load_exported(path).predict(torch.rand(1, 4, 64, 64))


def test_an_operator_that_the_operator_set_lacks_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"^--opset 11: cannot hold this network \(.*unflatten.*\); give --opset 17, the default, or more$"):
        export_model(tiny_model(), "onnx", tmp_path / "x.onnx", ExportOptions(imgsz=(64, 64), opset=11))
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr().out == ""


def test_a_dynamic_file_states_the_sides_that_do_not_change(onnx_file: Path) -> None:
    onnx = pytest.importorskip("onnx")
    (output,) = onnx.load(onnx_file).graph.output
    assert [side.dim_param or side.dim_value for side in output.type.tensor_type.shape.dim] == ["batch", 4 + 3, "boxes"]


def test_exported_windows_are_means_without_a_pooling_that_rounds_up() -> None:
    """Runtimes refuse a pooling window that is larger than the map, or give an empty result for it."""

    class Pooled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return window_means(x, 7)

    script = torch.jit.trace(Pooled(), torch.rand(1, 2, 7, 7), check_trace=False)
    pools = script.graph.findAllNodes("aten::avg_pool2d")
    assert len(pools) == 2
    assert not any(list(pool.inputs())[4].toIValue() for pool in pools)  # ceil_mode
    for height, width in ((2, 2), (7, 14), (9, 5)):
        x = torch.rand(2, 2, height, width)
        torch.testing.assert_close(script(x), window_means(x, 7))
