"""Dataset YAML in every form that users have."""

import dataclasses

import pytest

from data.dataset_spec import EMBEDDED, load_dataset_spec
from data.labels.files import list_images
from utils.errors import UserError


@pytest.fixture
def root(tmp_path):
    for split in ("train", "val"):
        folder = tmp_path / "set" / "images" / split
        folder.mkdir(parents=True)
        (folder / "a.jpg").write_bytes(b"x")
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


BODY = "train: images/train\nval: images/val\n"


def test_path_is_relative_to_the_yaml(root):
    spec = load_dataset_spec(write(root / "set.yaml", "path: set\n" + BODY + "names: {0: cat, 1: dog}\nnc: 2\n"))
    assert spec.names == ("cat", "dog")
    assert (spec.nc, spec.label_nc, spec.ch) == (2, 2, 3)
    assert spec.train == ((root / "set/images/train").resolve(),)
    assert spec.root == (root / "set").resolve()
    assert spec.test == ()


def test_path_falls_back_to_the_working_directory(root, monkeypatch):
    monkeypatch.chdir(root)
    spec = load_dataset_spec(write(root / "deep/er/set.yaml", "path: set\n" + BODY + "names: [cat]\n"))
    assert spec.val == ((root / "set/images/val").resolve(),)


def test_absolute_path_and_no_path(root):
    by_path = load_dataset_spec(write(root / "a.yaml", f"path: {root / 'set'}\n" + BODY + "names: [cat]\n"))
    without = load_dataset_spec(write(root / "set/b.yaml", BODY + "names: [cat]\n"))
    assert by_path.train == without.train


@pytest.mark.parametrize("place", ["set", "set/sub"])
def test_roboflow_paths_with_and_without_dots(root, place):
    text = "train: ../images/train\nval: ../images/val\nnc: 1\nnames: ['cat']\n"
    spec = load_dataset_spec(write(root / place / "data.yaml", text))
    assert spec.sources("train") == ((root / "set/images/train").resolve(),)


def test_lists_of_folders_and_text_lists(root):
    write(root / "set/lists/val.txt", "./../images/val/a.jpg\n\n# a comment\n")
    text = "path: set\ntrain: [images/train, images/val]\nval: lists/val.txt\nnames: [cat]\n"
    spec = load_dataset_spec(write(root / "set.yaml", text))
    assert len(list_images(spec.sources("train"))) == 2
    assert list_images(spec.sources("val")) == [str((root / "set/images/val/a.jpg").resolve())]


def test_nc_alone_gives_names(root):
    assert load_dataset_spec(write(root / "s.yaml", "path: set\n" + BODY + "nc: 2\n")).names == ("class0", "class1")


def test_names_are_what_is_written(root):
    assert load_dataset_spec(write(root / "s.yaml", "path: set\n" + BODY + "names: [1, yes]\n")).names == ("1", "yes")


def test_single_cls(root):
    spec = load_dataset_spec(write(root / "s.yaml", "path: set\n" + BODY + "names: [a, b]\n"), single_cls=True)
    assert (spec.names, spec.nc, spec.label_nc, spec.single_cls) == (("item",), 1, 2, True)


def test_embedded_yaml_by_bare_name(monkeypatch):
    asked = []
    monkeypatch.setitem(EMBEDDED, "shapes.yaml", asked.append)
    spec = load_dataset_spec("shapes", need=())
    assert spec.nc == 6
    assert spec.names[0] == "disc"
    assert len(asked) == 1
    assert len(load_dataset_spec("coco.yaml", need=()).names) == 80


def test_spec_is_frozen(root):
    spec = load_dataset_spec(write(root / "s.yaml", "path: set\n" + BODY + "nc: 2\n"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.nc = 3


def test_annotations_json_is_found(root):
    spec = load_dataset_spec(write(root / "s.yaml", "path: set\n" + BODY + "nc: 2\n"))
    assert spec.annotations_json("val") is None
    path = write(root / "set/annotations/instances_val.json", "{}")
    assert spec.annotations_json("val") == path.resolve()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BODY + "names: [a, b]\nnc: 3\n", "nc: 3 but names has 2"),
        (BODY + "names: {0: a, 2: b}\n", "no entry for class 1"),
        (BODY + "names: {cat: 0}\n", "class numbers"),
        (BODY, "neither 'names' nor 'nc'"),
        (BODY + "nc: 0\n", "nc: 0"),
        ("names: [a]\n", "neither 'train' nor 'val'"),
        ("train: [3]\nnames: [a]\n", "not 3"),
        ("- a\n", "mapping"),
        ("a: [\n", "not valid YAML"),
        (BODY + "names: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_bad_files_are_refused_in_one_line(root, text, said):
    with pytest.raises(UserError) as error:
        load_dataset_spec(write(root / "set/bad.yaml", text))
    assert said in str(error.value)
    assert "bad.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_images_name_every_path_tried_and_show_the_download(root):
    text = "path: nowhere\n" + BODY + "names: [a]\ndownload: |\n  touch ran\n"
    with pytest.raises(UserError) as error:
        load_dataset_spec(write(root / "gone.yaml", text))
    assert str(root / "nowhere/images/train") in str(error.value)
    assert "touch ran" in str(error.value)
    assert not list(root.rglob("ran"))


def test_unneeded_split_may_be_missing(root):
    path = write(root / "s.yaml", "path: set\ntrain: gone\nval: images/val\nnames: [a]\n")
    with pytest.raises(UserError, match="'train'"):
        load_dataset_spec(path)
    spec = load_dataset_spec(path, need=("val",))
    with pytest.raises(UserError, match="gone"):
        spec.sources("train")
    with pytest.raises(UserError, match="no 'test' entry"):
        spec.sources("test")


def test_a_misspelt_split_is_guessed(root, caplog):
    path = write(root / "s.yaml", "path: set\ntrian: images/train\nval: images/val\nnames: [a]\n")
    with pytest.raises(UserError, match=r"no 'train' entry, is it 'trian'\?"):
        load_dataset_spec(path, need=("train", "val"))
    assert "the key 'trian' is not read; did you mean 'train'?" in caplog.text


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match=r"did you mean 'shapes\.yaml'"):
        load_dataset_spec("shape.yaml")
