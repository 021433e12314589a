"""Dataset YAMLs that are damaged, hostile or easily misread: names stay as written, everything else is one line."""

import os
import resource

import pytest

from data.dataset_spec import MAX_CHANNELS, MAX_CLASSES, load_dataset_spec
from data.sources.streams import listed_streams
from models.spec.parser import load_spec
from utils.errors import UserError
from utils.hyperparameters import Hyperparameters

BODY = "train: images/train\nval: images/val\n"


@pytest.fixture
def write(tmp_path):
    """A function that writes a dataset YAML beside images and returns its path."""
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        (tmp_path / "images" / split / "a.jpg").write_bytes(b"x")

    def write_text(text):
        path = tmp_path / "set.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_text


def refusal(path) -> str:
    with pytest.raises(UserError) as caught:
        load_dataset_spec(path)
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) < 900
    assert path.name in said
    return said


@pytest.mark.parametrize(
    ("names", "read"),
    [
        ("[yes, no]", ("yes", "no")), ("{0: on, 1: off}", ("on", "off")), ("[cat, null]", ("cat", "null")),
        ("[010, 020, 08]", ("010", "020", "08")),
        ("[12:30, 2020-01-01, 1_000]", ("12:30", "2020-01-01", "1_000")), ("[1e3, 0x1F, .5]", ("1e3", "0x1F", ".5")),
        ("{1: b, 0: a}", ("a", "b")),
        ("['猫，狗', 猫]", ("猫，狗", "猫")), ("\n- true\n- 2020-13-45", ("true", "2020-13-45")),
    ],
)  # fmt: skip
def test_names_are_kept_as_written(write, names, read):
    assert load_dataset_spec(write(f"{BODY}names: {names}\n")).names == read


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("names:\n  0: cat\n  1:\n", "names: class 1 has no name"),
        ("names: [cat, '']\n", "names: class 1 has no name"),
        ("names: [[a, b]]\n", "names: class 0: a name is expected, not ['a', 'b']"),
        ("names:\n- 0: a\n- 1: b\n", "names: class 0: a name is expected, not {'0': 'a'}"),
        ("names: [person, car, person]\n", "names: class 2 is called 'person' like class 0"),
        ("names: person car\n", "names: a list or a mapping from class number to name is expected, not 'person car'"),
        ("names: {chair: 0, sofa: 1}\n", "keys must be class numbers 0, 1, 2 …, not 'chair'"),
        ("names: {0: a, 99999999999999999999: b}\n", "keys must be class numbers"),
        ("x: &n [yes]\nnames: *n\n", "names: class 0: a name is expected, not True"),
        ('names: ["a\\nb"]\n', "names: class 0: one line"),
        (f"names: [{'a' * 300}]\n", "names: class 0: one line of at most 200 characters"),
        ("names: [a]\nnames: [b]\n", "line 4: the key 'names' stands in line 3 already"),
        ("names: [猫， 狗]\n", "line 3: '，' (U+FF0C) stands where ',' is expected"),
        (f"{BODY}names: [猫, 狗]\n".encode("gbk"), "is not UTF-8 text (GBK or another code page?); save the file as UTF-8"),
        ("nc: 1000000000\n", f"nc: 1000000000, a whole number from 1 to {MAX_CLASSES} is expected"),
        ("nc: '2'\n", "nc: '2', a whole number"),
        ("nc: 2\nch: 1000000000\n", f"ch: 1000000000, the number of image channels is expected, from 1 to {MAX_CHANNELS}"),
        ("names: [a]\nbits: 8.0\n", "bits: 8.0"),
        ("names: [a]\npath: 1.10\n", "path: a folder is expected, not 1.1; put a name that looks like a number in quotes"),
        ("names: [a]\npath: " + "a" * 300, "path: the name aaa"),
        ("names: [a]\npath: ~nouser-here/x", "path: ~nouser-here/x: there is no user"),
        ('names: [a]\npath: "a\\tb"', "write / for \\, which is an escape in double quotes"),
        ("names: [a]\nannotations: {train: " + "a/" * 3000 + "}", "annotations: train: the path a/"),
        ("names: [a]\nannotations: {train: " + "a" * 300 + "}", "annotations: train: the name aaa"),
    ],
)  # fmt: skip
def test_what_is_no_data_set_is_refused_in_one_line(write, text, said):
    assert said in refusal(write(text if isinstance(text, bytes) else BODY + text))


@pytest.mark.parametrize("split", ["'~nouser-here/x'", '"a\\0b"', "b" * 300, "*a", "[[images]]", "no", "!!int x", "2020-13-45", "9" * 5000])
def test_a_source_that_cannot_exist_is_refused_in_one_line(write, split):
    refusal(write(f"names: [a]\ntrain: {split}\nval: images/val\n"))


def test_pipes_and_folders_are_not_opened(write, tmp_path):
    path = write("")
    path.unlink()
    os.mkfifo(path)
    assert "this is a device or pipe" in refusal(path)
    path.unlink()
    path.mkdir()
    assert "no folder 'train'; a data set that is a folder has one for each class" in refusal(path)
    for read in (load_spec, Hyperparameters.from_yaml):
        with pytest.raises(UserError, match=r"folder|no such"):
            read(path)


BOMB = "a: &a [x,x,x,x,x,x,x,x]\n" + "".join(f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefghij", "bcdefghijk"))


@pytest.mark.parametrize("text", [BOMB, "[" * 10**6, "lr0: " + "9" * 5000, "lr0: !!int x", "lr0: {1: 2}"], ids=range(5))
def test_hyp_and_model_yamls_go_through_the_same_reader(tmp_path, text):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = tmp_path / "x.yaml"
    path.write_text(text)
    for read in (load_spec, Hyperparameters.from_yaml):
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


def test_gbk_in_a_model_yaml_is_named(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_bytes("nc: 2\nactivation: 激活\n".encode("gbk"))
    with pytest.raises(UserError, match=r"m\.yaml.*line 2.*save the file as UTF-8"):
        load_spec(path)


def test_a_list_of_streams_that_never_ends_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "cams.streams")
    with pytest.raises(UserError, match=r"cams\.streams: a list of streams is expected, this is a device, pipe"):
        listed_streams(tmp_path / "cams.streams")
