"""Lists of images as CVAT, Windows, PowerShell and people write them."""

from __future__ import annotations

import os

import pytest

from data.dataset_spec import load_dataset_spec
from data.labels.files import list_images
from data.labels.lists import read_list
from data.labels.source import split_labels
from data.sources.files import find_files
from data.tools.check import main as check
from tests.image_files import write_images
from utils.errors import UserError

BOX = (0, 0.5, 0.5, 0.25, 0.25)


@pytest.fixture
def root(tmp_path):
    write_images(tmp_path / "set", {"train": [[BOX]] * 3, "val": [[BOX]]})
    return tmp_path / "set"


def names(root, form):
    return [form.format(f"images/train/{i}.png") for i in range(3)]


def windows(root, form):
    return [entry.replace("/", "\\") for entry in names(root, form)]


FORMS = {
    "plain": names("", "{}"), "dots": names("", "./{}"), "data in front": names("", "data/{}"), "and dots": names("", "./data/{}"),
    "backslashes": windows("", "{}"), "backslashes and dots": windows("", "./{}"), "backslashes and data": windows("", "data/{}"),
    "mixed": [names("", "{}")[0], windows("", "data/{}")[1], names("", "./{}")[2]],
}  # fmt: skip


@pytest.mark.parametrize("folder", [".", "splits", "splits/deep"])
@pytest.mark.parametrize("form", FORMS)
def test_entries_are_found_from_the_list_or_above_it(root, form, folder):
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / "train.txt").write_text("\n".join(FORMS[form]))
    (root / "data.yaml").write_text(f"train: {folder}/train.txt\nval: images/val\nnames: [thing]\n")
    spec = load_dataset_spec(root / "data.yaml")
    files = list_images(spec.sources("train"))
    assert files == [str(root / f"images/train/{i}.png") for i in range(3)]
    assert len(split_labels(spec, "train", files, progress=False)[0].classes) == 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lists_in_any_unicode_are_read(root, encoding, end):
    os.rename(root / "images/train/1.png", root / "images/train/кот 猫.png")
    path = root / "train.txt"
    path.write_bytes(end.join(["# images", "images/train/0.png", "", "images/train/кот 猫.png  "]).encode(encoding))
    expected = [str(root / "images/train/0.png"), str(root / "images/train/кот 猫.png")]
    assert list_images([path]) == find_files(str(path)) == expected


@pytest.mark.parametrize("data", ["a.png\n".encode("utf-16-le"), b"a\0b.png\n", b"\xff\xfea", b"\xff\xfe\x00\xd8a\x00"])
def test_lists_that_are_not_text_are_refused_in_one_line(root, data, capsys):
    path = root / "train.txt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train\.txt: the list is not .*save it as UTF-8"):
        read_list(path)
    (root / "data.yaml").write_text("train: train.txt\nval: images/val\nnames: [thing]\n")
    assert check([str(root / "data.yaml"), "--project", str(root / "c")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_base_is_chosen_by_all_entries(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = root / "train.txt"
    path.write_text("set/images/train/gone.png\nset/images/train/0.png\nset/images/train/1.png\n")
    assert read_list(path) == [str(root / f"images/train/{n}.png") for n in ("gone", 0, 1)]
    copy = tmp_path / "images/train"
    copy.mkdir(parents=True)
    for i in range(3):
        (copy / f"{i}.png").write_bytes(b"")
    path.write_text("images/train/0.png\nimages/train/gone.png\nimages/train/1.png\n")
    assert read_list(path) == [str(root / f"images/train/{n}.png") for n in (0, "gone", 1)]  # not from the working directory


def test_names_with_backslashes_and_a_folder_called_data_are_kept_where_they_exist(root):
    for name in ("a\\b.png", "data/images/train/0.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    (root / "train.txt").write_text("a\\b.png\ndata/images/train/0.png\n")
    assert read_list(root / "train.txt") == [str(root / "a\\b.png"), str(root / "data/images/train/0.png")]


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no such device")
def test_lists_that_never_end_are_refused(root, monkeypatch):
    os.mkfifo(root / "pipe.txt")
    os.symlink("/dev/zero", root / "zero.txt")
    for name in ("pipe.txt", "zero.txt"):
        with pytest.raises(UserError, match=f"{name}: the list cannot be read: not a file"):
            list_images([root / name])
        with pytest.raises(UserError, match=name):
            find_files(str(root / name))
    (root / "long.txt").write_text("a.png\n" * 10)
    monkeypatch.setattr("data.labels.lists.MAX_LIST_BYTES", 20)
    with pytest.raises(UserError, match=r"long\.txt: the list cannot be read: larger than"):
        list_images([root / "long.txt"])
