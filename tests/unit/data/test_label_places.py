"""Where label files are looked for: by the path as it is written, whatever links lead to, and beside the image where nothing is there."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from data.dataset_spec import load_dataset_spec
from data.labels.cache import content_key
from data.labels.files import find_label_file, find_label_files, has_label_files, label_path, list_images
from data.labels.paths import as_written
from data.labels.source import split_labels
from data.labels.tree import walk_tree
from data.sources.files import find_files
from data.tools.check import main as check
from tests.image_files import write_images

BOX, WHOLE = (1, 0.5, 0.5, 0.25, 0.25), "0 0.5 0.5 1 1"


def read(yaml_path, split="train"):
    """Image files, labels and remarks of a split."""
    spec = load_dataset_spec(yaml_path)
    files = list_images(spec.sources(split))
    return files, *split_labels(spec, split, files, progress=False)


@pytest.fixture
def pool(tmp_path):
    """A set with labels of its own, whose images others link to."""
    write_images(tmp_path / "pool", {"train": [[BOX]] * 3, "val": [[BOX]] * 2}, names=("whole", "spare"))
    return tmp_path / "pool"


@pytest.mark.parametrize("source", ["images/train", "list.txt", "./images/../images/train", "images"])
def test_linked_image_folder_has_the_labels_of_the_link(tmp_path, pool, source):
    task = tmp_path / "task"
    (task / "labels/train").mkdir(parents=True)
    os.symlink("../pool/images", task / "images")
    for i in range(3):
        (task / f"labels/train/{i}.txt").write_text(WHOLE)
    (task / "list.txt").write_text("".join(f"./images/train/{i}.png\n" for i in range(3)))
    (task / "data.yaml").write_text(f"path: {task}\ntrain: {source}\nval: images/val\nnames: [whole, spare]\n")
    files, table, _ = read(task / "data.yaml")
    assert table.classes.tolist() == [0, 0, 0]
    assert all(str(task) in f for f in files)
    assert read(pool / "data.yaml")[1].classes.tolist() == [1, 1, 1]


def test_link_for_one_split_alone(tmp_path, pool):
    os.rename(pool / "images/val", tmp_path / "shots")
    os.symlink(tmp_path / "shots", pool / "images/val")
    assert read(pool / "data.yaml", "val")[1].classes.tolist() == [1, 1]


def test_linked_dataset_file_finds_the_images_of_its_target(tmp_path, pool):
    (tmp_path / "elsewhere").mkdir()
    os.symlink(pool / "data.yaml", tmp_path / "elsewhere/data.yaml")
    assert len(read(tmp_path / "elsewhere/data.yaml")[1].classes) == 3


def test_dots_are_removed_and_links_are_kept(tmp_path, monkeypatch):
    (tmp_path / "real/deep").mkdir(parents=True)
    (tmp_path / "real/side").mkdir()
    (tmp_path / "real/real").mkdir()
    os.symlink(tmp_path / "real/deep", tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    assert as_written("./link/x/../y") == tmp_path / "link/y"
    assert as_written(tmp_path / "link/../side") == tmp_path / "real/side"  # as for the operating system, since nothing else is there
    assert as_written(tmp_path / "link/../real") == tmp_path / "real"  # not real/real, where the link leads
    assert as_written("/../a") == Path("/a")


def test_label_rule_ignores_dots_and_takes_relative_paths(tmp_path, monkeypatch):
    assert label_path("/a/images/../b/x.png") == "/a/b/x.txt"
    assert label_path("/a/images/./b/x.png") == "/a/labels/b/x.txt"
    monkeypatch.chdir(tmp_path)
    assert label_path("images/x.png") == "labels/x.txt"
    assert label_path("x.png") == "x.txt"


@pytest.fixture
def beside(tmp_path):
    """Two images with labels under labels/, two with labels beside them, one without."""
    path = write_images(tmp_path / "set", {"train": [[BOX]] * 5, "val": [[BOX]]}, names=("a", "b"))
    for i in (2, 3):
        os.rename(tmp_path / f"set/labels/train/{i}.txt", tmp_path / f"set/images/train/{i}.txt")
    os.remove(tmp_path / "set/labels/train/4.txt")
    return path


def test_labels_beside_images_in_an_images_folder_are_read_and_counted(beside, capsys):
    files, table, remarks = read(beside)
    assert table.counts.tolist() == [1, 1, 1, 1, 0]
    assert table.has_label_file.tolist() == [True] * 4 + [False]
    assert len(remarks) == 1
    assert "2 of 5 images have their labels beside them, first: " in remarks[0]
    assert find_label_files(files) == [find_label_file(f) for f in files]
    assert read(beside)[2] == remarks  # from the cache too
    assert check([str(beside), "--project", str(beside.parent / "c")]) == 0
    assert "2 of 5 images have their labels beside them" in capsys.readouterr().out
    assert has_label_files(files[2:3])
    assert not has_label_files(files[4:])


def test_labels_beside_images_are_in_the_key_of_the_cache(beside):
    files, key = read(beside)[0], content_key(read(beside)[0])
    os.utime(files[2].replace(".png", ".txt"), ns=(1, 1))
    assert content_key(files) != key
    path = Path(files[3].replace(".png", ".txt"))
    path.rename(label_path(files[3]))
    assert len(read(beside)[1].classes) == 4


def test_all_labels_beside_images_are_cached_beside_them(tmp_path):
    path = write_images(tmp_path / "set", {"train": [[BOX]] * 2, "val": [[BOX]]}, names=("a", "b"))
    for file in [*(tmp_path / "set/labels").rglob("*.txt")]:
        os.rename(file, str(file).replace("set/labels", "set/images"))
    for folder in ("labels/train", "labels/val", "labels"):
        os.rmdir(tmp_path / "set" / folder)
    assert len(read(path)[1].classes) == 2
    assert (tmp_path / "set/images/train.cache.npz").is_file()


@pytest.fixture
def loops(tmp_path):
    """A set of six images, with links to its own folder, to the root of the disk, to each other and to nothing."""
    write_images(tmp_path / "set", {"train": [[BOX]] * 6, "val": [[BOX]]}, names=("a", "b"))
    train = tmp_path / "set/images/train"
    for name, target in {"a": ".", "b": ".", "root": "/", "up": "..", "self": "self", "gone": "/nowhere/x"}.items():
        os.symlink(target, train / name)
    return train


def test_links_that_lead_back_are_not_followed(loops):
    names = [str(loops / f"{i}.png") for i in range(6)]
    assert list_images([loops]) == names
    assert find_files(f"{loops}/**/*.png") == names
    assert find_files(f"{loops}/**") == names
    assert find_files(f"{loops.parent}/**/train/*.png") == names
    assert check([str(loops.parents[1] / "data.yaml"), "--project", str(loops.parents[1] / "c")]) in (0, 1)


def test_links_to_other_folders_are_followed_once_and_real_names_win(tmp_path):
    for name in ("set/a", "set/z", "pool/deep"):
        (tmp_path / name).mkdir(parents=True)
        np.save(tmp_path / name / "x.npy", np.zeros((20, 20), np.uint8))
    os.symlink("../z", tmp_path / "set/a/first")
    for name in ("pool", "pool2"):
        os.symlink("../pool", tmp_path / "set" / name)
    found = [os.path.relpath(f, tmp_path) for f in list_images([tmp_path / "set"])]
    assert found == ["set/a/x.npy", "set/pool/deep/x.npy", "set/z/x.npy"]
    assert [os.path.relpath(f.path, tmp_path) for f in walk_tree(tmp_path / "set")][:3] == ["set", "set/a", "set/z"]


def test_recursive_globs_match_as_those_of_the_standard_library_do(tmp_path, monkeypatch):
    import glob

    for name in ("a.png", "d/b.png", "d/e/c.png", "d/e/c.jpg", ".hidden/h.png", "d/.h.png", "d/[x]/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    for pattern in ("**/*.png", "**", "d/**", "d/**/*.png", "**/e/*", "**/*.jpg", "*/**/c.*", "**/d/**/*", "**/.hidden/*.png",
                    "**/[[]x]/**", "**/**/*.png", "./**/*.png", f"{tmp_path}/**/c.png", "nothing/**/*.png", "**/[!d]/*"):  # fmt: skip
        expected = sorted({f for f in glob.glob(pattern, recursive=True) if os.path.isfile(f)})
        if expected:
            assert find_files(pattern) == expected, pattern
        else:
            with pytest.raises(ValueError, match="no image and no video"):
                find_files(pattern)
