"""The one reader of YAML: plain types, limits, and the line that is wrong."""

import os
import random
from pathlib import Path

import pytest
import yaml

from utils.errors import UserError
from utils.reading import yaml_text
from utils.reading.text_files import MAX_NAME_BYTES, read_bytes, user_path
from utils.reading.yaml_scalars import MAX_YAML_DIGITS
from utils.reading.yaml_text import MAX_YAML_BYTES, MAX_YAML_DEPTH, parse_yaml, read_yaml, shown

ROOT = Path(__file__).parents[3]
FAST_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
OURS = sorted(p for folder in ("models/configs", "data") for p in (ROOT / folder).rglob("*.yaml"))


def refusal(text: str | bytes, tmp_path: Path, **options) -> str:
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        read_yaml(path, **options)
    said = str(caught.value)
    assert said.startswith(f"{path}: ")
    assert said.isprintable()
    assert len(said) < 400
    return said.removeprefix(f"{path}: ")


def with_text_keys(value):
    """What PyYAML read, as the reader gives it: keys are text."""
    if isinstance(value, dict):
        return {str(k): with_text_keys(v) for k, v in value.items()}
    return [with_text_keys(v) for v in value] if isinstance(value, list) else value


def test_every_yaml_of_this_project_reads_as_before():
    assert len(OURS) > 200
    for path in OURS:
        assert read_yaml(path) == with_text_keys(yaml.load(path.read_bytes(), Loader=FAST_LOADER)), path


WRITTEN = ["1e-3", "010", "12:30", "2020-01-01", "no", "null", "0x1F", "~", "1_000", ".5", "", "a: b", "- x", 1e-5, 3, None, True]


@pytest.mark.parametrize("value", WRITTEN)
def test_what_pyyaml_writes_is_read_back(value):
    assert parse_yaml(yaml.safe_dump({"k": [value], "l": {"m": value}}), source="x") == {"k": [value], "l": {"m": value}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2020-13-45", "2020-13-45"), ("2020-01-01 99:99:99", "2020-01-01 99:99:99"), ("010", "010"), ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("+3", 3), ("-0x1F", -31), ("1.0e+3", 1000.0), ("1.", 1.0), (".inf", float("inf")), ("off", False), ("~", None), ("'no'", "no"),
        ("!!str no", "no"), ("!!int '3'", 3), ("!!float 3", 3.0), ("! 3", "3"), ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}),
        ("{a: &x {b: 1, c: 2}, d: {<<: *x, c: 3}}", {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}),
        ("{no: 1, 010: 2}", {"no": 1, "010": 2}),
    ],
)  # fmt: skip
def test_values_are_plain_types(text, value):
    assert parse_yaml(f"k: {text}", source="x") == {"k": value}


def test_values_below_a_key_are_text_as_written():
    text = "names:\n  0: no\n  1: 010\n  2: null\n  3: 2020-01-01\n  4: 'x'\n  5:\n  6: ~\nother: [no, 1]\n"
    read = parse_yaml(text, source="x", as_written=("names",))
    assert list(read["names"].values()) == ["no", "010", "null", "2020-01-01", "x", None, "~"]
    assert read["other"] == [False, 1]


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(f"{c}: &{c} [{','.join([f'*{p}'] * 10)}]\n" for p, c in zip("abcdefgh", "bcdefghi"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "line 6: more than 200,000 values"),
        ("a: &a [*a]", "line 1: the alias *a stands for nothing"),
        ("[" * 900, f"line 1: more than {MAX_YAML_DEPTH} lists"),
        ("[" * 100_000, "line 1"),
        ("{a: " * 100_000, f"line 1: more than {MAX_YAML_DEPTH} lists"),
        ("- " * 100_000, f"line 1: more than {MAX_YAML_DEPTH} lists"),
        ("x: " + "9" * 5000, f"line 1: a number of 5,000 digits, at most {MAX_YAML_DIGITS}"),
        ("x: 0x" + "f" * 5000, "line 1: a number of 5,002 digits"),
        ("x: '" + "y" * 100_000 + "'", "line 1: a text of 100,000 characters"),
        ("#" * (MAX_YAML_BYTES + 1), "a YAML file of more than 1,048,576 bytes"),
        ("x: !!int x", "line 1: 'x' is no int, which its tag !!int asks for"),
        ("x: !!bool 1", "line 1: '1' is no bool"),
        ("x: !!timestamp 2020-13-45", "line 1: the tag !!timestamp is not read here"),
        ("x: !!binary aGk=", "line 1: the tag !!binary"),
        ("x: !!python/object/apply:os.system ['true']", "line 1: the tag !!python/object/apply:os.system"),
        ("x: !!set {a}", "line 1: the tag !!set"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "line 4: the key 'c' stands in line 3 already"),
        ("? [a, b]\n: 1\n", "line 1: a key is a text"),
        ("a: 1\n---\nb: 2\n", "line 2: a second document begins"),
        ("- a\n", "a mapping of keys and values is expected, not list ['a']"),
        ('a: "x\\0y"', "line 1: holds the control character U+0000"),
        ('a: "x\\e[31my"', "line 1: holds the control character U+001B"),
        ("a: 1\nb: \x1b[31m\n", "line 2: holds the control character U+001B"),
        ('a: "\\ud800"', "line 1"),
        ("a: 1".encode("utf-16-le"), "line 1: holds the control character U+0000 (UTF-16"),
        ("a: 1\nb: 狗\n".encode("gbk"), "line 2: is not UTF-8 text (GBK or another code page?); save the file as UTF-8"),
        ("a: 1\nb: caf\u00e9\n".encode("latin-1"), "line 2: is not UTF-8 text"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_in_one_line(tmp_path, text, said):
    assert said in refusal(text, tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train： images/train\nval： images/val\n", "line 1: '：' (U+FF1A) stands where ':' is expected"),
        ("a: 1\nnc： 2\n", "line 2: '：' (U+FF1A)"),
        ("a: [x， y]\n", "line 1: '，' (U+FF0C) stands where ',' is expected"),
        ("a: 1\nb: ［x, y］\nc： 2\n", "line 2: '［' (U+FF3B) stands where '[' is expected"),
        ("names:\n- 猫，狗\n", "line 2: '，' (U+FF0C)"),
        ("a: 1\nnc:\u30002\n", "line 2: a space of another kind (U+3000)"),
        ("nc:2\nnames: [a]\n", "line 1: nc:2 needs a space after the colon"),
        ("names: [a]\nnc:2\n", "line 2: nc:2 needs a space after the colon"),
        ("nc:2\n", "line 1: nc:2 needs a space after the colon"),
        ("train:images/train\nval:images/val\n", "line 1: train:images/train needs a space after the colon"),
        ("names: {0:cat, 1:dog}\n", "line 1: 0:cat needs a space after the colon"),
        ("names:\n  0:cat\n  1:dog\n", "line 2: 0:cat needs a space after the colon"),
        ("names:\n-crack\n- patch\n", "line 2: -crack needs a space after the dash"),
        ("names:\n\t0: a\n", "line 2: begins with a tab; YAML is indented with spaces"),
        ("a: 1\nb:\n  - c\n\t- d\n", "line 4: begins with a tab"),
        ("a: [1, 2\nb: 3\n", "line 2, column "),
    ],
)  # fmt: skip
def test_the_line_and_the_character_that_are_wrong_are_named(tmp_path, text, said):
    refused = refusal(text, tmp_path, as_written=("names",))
    assert refused.startswith("not valid YAML: ")
    assert said in refused


LOOKS_WRONG = ["d: 说明，见 https://x.y：z", "names: ['猫，狗']", "path: C:/data", "# a： b，\n\na: 1", "u: [http://x, 'a:b']", "a:\n"]


@pytest.mark.parametrize("text", LOOKS_WRONG)
def test_what_only_looks_wrong_is_read(text):
    assert parse_yaml(text, source="x", as_written=("names",))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path, encoding):
    (tmp_path / "x.yaml").write_bytes("names: [猫]\r\n".encode(encoding))
    assert read_yaml(tmp_path / "x.yaml") == {"names": ["猫"]}


def test_comments_may_be_in_another_encoding(tmp_path):
    (tmp_path / "x.yaml").write_bytes("# 数据集配置\nnc: 2  # 类别\n".encode("gbk"))
    assert read_yaml(tmp_path / "x.yaml") == {"nc": 2}


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    for path, said in (
        (tmp_path / "pipe.yaml", "this is a device, pipe"), (Path("/dev/zero"), "this is a device, pipe"), (tmp_path, "this is a folder"),
        (tmp_path / "none.yaml", "no such file"), (tmp_path / "a.yaml\0", "cannot be read"), (tmp_path / ("a" * 300), "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said) as caught:
            read_yaml(path)
        assert str(caught.value).count(str(path).replace("\0", "")) <= 1 + str(path).count("\0")


def test_a_file_of_the_largest_size_is_read_whole(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert read_bytes(tmp_path / "x", most=3) == b"abc"
    with pytest.raises(UserError, match="of more than 2 bytes"):
        read_bytes(tmp_path / "x", most=2)


@pytest.mark.parametrize(
    ("text", "said"),
    [("a\0b", "NUL"), ("~nouser-here/x", "there is no user 'nouser-here' here"), ("x/" + "ü" * 200, "has 400 bytes"),
     ("a/" * 3000, "6000 char"), ("a\tb", "tab")],
)  # fmt: skip
def test_paths_that_cannot_exist_are_refused(text, said):
    with pytest.raises(UserError, match=said):
        user_path(text, "--data")


def test_paths_that_can_exist_are_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert user_path("./~odd/x", "--data") == Path("~odd/x")
    assert user_path("~/x", "--data") == Path.home() / "x"
    assert user_path("n" * MAX_NAME_BYTES, "--data").name == "n" * MAX_NAME_BYTES


def test_values_in_messages_are_short():
    assert shown("x" * 10**6) == "'" + "x" * 79 + "…"
    assert len(shown([["y" * 50] * 9] * 10**5)) <= 81
    assert shown({"a": [1, None]}) == "{'a': [1, None]}"


SEEDS = [
    "path: ../x\ntrain: images/train\nnames:\n  0: cat\n  1: 'dog'\nnc: 2\n",
    "a: &a {x: 1, y: [1.5, ~, no]}\nb: {<<: *a, z: *a}\nc: |\n  two\n  lines\n",
    "backbone:\n  [[-1, 1, Conv, [64, 3, 2]],\n   [-1, 3, C2f, [128, True]]]\nscales: {n: [0.33, 0.25, 1024]}\n",
    '# 注释\nnames: [猫, "d\\u00e9", !!str 1, !!int 2]\n---\n',
]
PIECES = ["&a ", "*a", "*b", "<<: ", "!!int ", "!!python/name:os.system ", "[", "]", "{", "}", ": ", ":", "- ", "\n", "\t", "：", "，"]
PIECES += ['"', "'", "|\n", "? ", "#", "%YAML 1.1\n", "---\n", "...\n", "\\x", "\x00", "\x85", "\u2028", "\ufeff", "\ufffd"]
PIECES += ["9" * 200, "a" * 300, "2020-13-45", "0x", "1:2", "~", "\U0001f431"]


def mutated(draw: random.Random) -> bytes:
    """A seed after a few insertions, deletions and flips of bytes."""
    content = bytearray(draw.choice(SEEDS).encode(draw.choice(["utf-8"] * 8 + ["gbk", "utf-16"]), errors="replace"))
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(content) + 1)
        kind = draw.random()
        if kind < 0.6:
            content[at:at] = draw.choice(PIECES).encode() * draw.choice([1, 1, 1, 2, 50])
        elif kind < 0.8:
            del content[at : at + draw.randint(1, 8)]
        elif at < len(content):
            content[at] = draw.randrange(256)
    return bytes(content)


def is_plain(value) -> bool:
    if isinstance(value, dict):
        return all(type(k) is str and is_plain(v) for k, v in value.items())
    return all(map(is_plain, value)) if type(value) is list else value is None or type(value) in (str, int, float, bool)


@pytest.mark.parametrize("parser", ["CBaseLoader", "BaseLoader"])
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path, monkeypatch, parser):
    monkeypatch.setattr(yaml_text, "_PARSER", getattr(yaml, parser, yaml.BaseLoader))
    draw, path, refused = random.Random(13), tmp_path / "x.yaml", 0
    for _ in range(500):
        content = mutated(draw)
        path.write_bytes(content)
        said = ""
        try:
            assert is_plain(read_yaml(path, as_written=draw.choice([(), ("names",)]))), content
        except UserError as error:
            said = str(error)
        refused += bool(said)
        assert said.isprintable(), (content, said)
        assert len(said) < len(str(path)) + 400, content
    assert 100 < refused < 490
