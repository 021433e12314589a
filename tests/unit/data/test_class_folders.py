"""Data sets with a folder for each class: what is read, what is one line, and that the samples depend on their keys alone."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from data.dataset_spec import load_dataset_spec
from data.loader import LoaderOptions, build_loader
from tasks import CLASSIFY, DETECT
from utils.config import Hyperparameters
from utils.errors import UserError

HYP = Hyperparameters(auto_augment="randaugment", erasing=0.5, scale=0.5, mosaic=0, mixup=0, copy_paste=0, translate=0)


def write(path: Path, *, hw: tuple[int, int] = (40, 60), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.random.default_rng(seed).integers(0, 255, (*hw, 3)).astype(np.uint8)
    path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("ant", "bee")):
            for i in range(count):
                write(tmp_path / "set" / split / name / f"{i}.png", seed=10 * label + i)
    return tmp_path / "set"


def loader(root: Path | str, split: str = "train", *, task=CLASSIFY, **options):
    given = {"imgsz": 32, "batch_size": 3, "hyp": HYP, "augment": split == "train", "workers": 0} | options
    return build_loader(load_dataset_spec(root), split, LoaderOptions(**given), task=task)


def classes(root: Path | str, split: str = "train") -> dict[str, int]:
    dataset = loader(root, split).dataset
    return {os.path.relpath(f, root): int(dataset.table.classes[i]) for i, f in enumerate(dataset.image_files)}


def test_the_folders_are_the_classes(root):
    spec = load_dataset_spec(root)
    assert spec.names == ("ant", "bee")
    assert classes(root) == {f"train/{name}/{i}.png": label for label, name in enumerate(spec.names) for i in range(4)}
    (batch,) = loader(root, "val", batch_size=4)
    assert batch.images.shape == (4, 3, 32, 32)
    assert batch.targets.classes.tolist() == [0, 0, 1, 1]
    assert batch.targets.image.tolist() == [0, 1, 2, 3]


def test_a_file_may_name_the_classes_in_another_order_or_not_at_all(root, tmp_path):
    (tmp_path / "a.yaml").write_text(f"path: {root}\ntrain: train\nval: val\nnames: [bee, ant]\n")
    assert loader(tmp_path / "a.yaml").dataset.table.classes.tolist() == [1] * 4 + [0] * 4
    (tmp_path / "b.yaml").write_text(f"path: {root}\ntrain: train\nval: val\n")
    assert load_dataset_spec(tmp_path / "b.yaml").names == ("ant", "bee")
    (tmp_path / "c.yaml").write_text(f"path: {root}\ntrain: train\nval: val\nnames: [Formica, Apis]\n")
    assert loader(tmp_path / "c.yaml", "val").dataset.table.classes.tolist() == [0, 0, 1, 1]


def test_names_in_folder_order_are_said(root, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(f"path: {root}\ntrain: train\nval: val\nnames: [Formica, Apis]\n")
    loader(tmp_path / "c.yaml")
    assert "in order, ant is Formica, bee is Apis" in capsys.readouterr().out


def test_what_is_odd_is_one_line_each(root, capsys):
    write(root / "train/loose.png")
    write(root / "val/bea/9.png")
    write(root / "train/bee/inner/deeper/8.png")
    (root / "train/empty").mkdir()
    (root / "train/.hidden").mkdir()
    (root / "train/ant/note.txt").write_text("no image")
    (root / "train/ant/broken.png").write_bytes(b"\x89PNG broken")
    found = classes(root)
    assert found["train/bee/inner/deeper/8.png"] == 1
    assert "train/loose.png" not in found
    out = capsys.readouterr().out
    assert "class folder 'empty' of 'train' has no image" in out
    assert "loose.png: lies in no class folder" in out
    assert "broken.png" in out
    assert ".hidden" not in out
    classes(root, "val")
    out = capsys.readouterr().out
    assert "class folder 'bea' of 'val': train has no such folder, 1 images left out; did you mean 'bee'?" in out
    assert "'val' has no folder of class 'empty'" in out


def test_links_are_followed_and_keep_their_own_class(root, tmp_path):
    write(tmp_path / "elsewhere/x.png")
    (root / "train/cow").symlink_to(tmp_path / "elsewhere")
    (root / "train/bee/9.png").symlink_to(root / "train/ant/0.png")
    found = classes(root)
    assert found["train/cow/x.png"] == 2
    assert found["train/bee/9.png"] == 1


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda root: (root / "train").rename(root / "other"), "no folder 'train'"),
        (lambda root: [(root / s).rename(root / f"x{s}") for s in ("train", "val")], "has one for each class under train/ and val/"),
    ],
)
def test_a_folder_that_is_no_data_set_is_one_line(root, broken, message):
    broken(root)
    with pytest.raises(UserError, match=message):
        load_dataset_spec(root)


def test_test_images_validate_where_there_is_no_val(root):
    (root / "val").rename(root / "test")
    assert load_dataset_spec(root).val == (root / "test",)


def test_a_set_of_class_folders_has_no_boxes_and_a_set_of_boxes_no_class_folders(root, tmp_path):
    with pytest.raises(UserError, match="a folder for each class, without places of objects; the model's task is detect"):
        loader(root, task=DETECT)
    (tmp_path / "named.yaml").write_text(f"path: {root}\ntrain: train\nval: val\nnames: [ant, bee]\n")
    with pytest.raises(UserError, match=r"no labels at all for the \d+ images of 'train', which lie in a folder for each class"):
        loader(tmp_path / "named.yaml", task=DETECT)
    write(tmp_path / "plain/images/0.png")
    (tmp_path / "plain.yaml").write_text(f"path: {tmp_path}/plain\ntrain: images\nval: images\nnames: [ant, bee]\n")
    with pytest.raises(UserError, match="none of the 1 images of 'train' lies in a folder of a class"):
        loader(tmp_path / "plain.yaml")


def test_samples_depend_on_seed_epoch_and_index_alone(root):
    """Whatever was drawn before, and from whichever generator."""
    one, other = loader(root), loader(root)
    torch.manual_seed(1)
    one.set_epoch(1)
    before = torch.get_rng_state()
    first = [batch.images for batch in one]
    assert torch.equal(before, torch.get_rng_state())
    list(other)
    other.set_epoch(1, start_batch=1)
    torch.manual_seed(2)
    assert all(torch.equal(a, b.images) for a, b in zip(first[1:], other, strict=True))
    other.set_epoch(2)
    assert not torch.equal(first[0], next(iter(other)).images)
    rebuilt = torch.cat([batch.images for batch in loader(root, seed=5)])
    assert not torch.equal(rebuilt, torch.cat(first))


def test_several_processes_see_the_images_of_one(root):
    whole = [batch.images for batch in loader(root, batch_size=4)]
    parts = [[batch.images for batch in loader(root, batch_size=4, rank=rank, world_size=2)] for rank in (0, 1)]
    for step, images in enumerate(whole):
        assert torch.equal(torch.cat([part[step] for part in parts]), images)


def test_the_cache_changes_the_time_and_never_the_images(root):
    plain, cached = ([b.images for b in loader(root, cache=cache)] for cache in (None, "ram"))
    assert all(torch.equal(a, b) for a, b in zip(plain, cached, strict=True))
    disk = [b.images for b in loader(root, cache="disk")]
    assert all(torch.equal(a, b) for a, b in zip(plain, disk, strict=True))
    assert len(loader(root).dataset) == 8  # the stored arrays are no images


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (3, np.uint16), (4, np.uint8)])
def test_other_channels_and_depths_are_augmented_too(channels, dtype):
    from data.augment.random_crop import RandomCrop

    image = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (50, 40, channels)).astype(dtype)
    crop = RandomCrop(HYP, 32, channels=channels, dtype=dtype)
    out = crop(image, np.random.default_rng(1))
    assert (out.shape, out.dtype) == ((32, 32, channels), image.dtype)
    assert np.array_equal(out, crop(image, np.random.default_rng(1)))


@pytest.mark.parametrize("policy", ["randaugment", "autoaugment", "augmix"])
def test_policies_are_bilinear_like_those_of_ultralytics(policy):
    from data.augment.random_crop import colour_transform

    assert colour_transform(Hyperparameters(auto_augment=policy)).interpolation.value == "bilinear"


def test_hyper_parameters_without_a_meaning_are_named(root, capsys):
    loader(root, hyp=Hyperparameters())
    assert "translate, mosaic, mixup, copy_paste of the hyper-parameters: not for images with one class" in capsys.readouterr().out
    loader(root)
    assert "hyper-parameters" not in capsys.readouterr().out


@pytest.mark.parametrize("hw", [(48, 96), (96, 48), (20, 31), (32, 32)])
def test_the_centre_crop_is_the_published_transform(hw):
    from torchvision.transforms import v2

    from data.augment.centre_crop import centre_crop

    image = np.random.default_rng(0).integers(0, 255, (*hw, 3)).astype(np.uint8)
    planes = torch.from_numpy(image).permute(2, 0, 1)
    published = v2.Compose([v2.Resize(32, antialias=True), v2.CenterCrop(32)])(planes).permute(1, 2, 0).numpy()
    cropped = centre_crop(image, (32, 32))
    assert np.array_equal(cropped.image, published)
    x = np.array((hw[1] / 2, hw[0] / 2)) * cropped.scale_xy + cropped.pad_xy
    assert np.abs(x - 16).max() <= 0.51


def test_data_check_looks_at_class_folders_too(root, tmp_path, capsys, monkeypatch):
    from data.tools import check

    write(root / "val/bee/copy.png", seed=0)  # the content of train/ant/0.png
    monkeypatch.chdir(tmp_path)
    assert check.main([str(root), "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "in two splits" in out
    assert "no label file" not in out
    assert check.main([str(root), "--fix", "--out", str(tmp_path / "clean")]) == 2
    assert "has a folder for each class" in capsys.readouterr().err
