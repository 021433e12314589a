"""Images that vanish: replaced in the same way whoever draws them, and counted."""

from __future__ import annotations

import pytest
import torch

from data.dataset_spec import load_dataset_spec
from data.images.unreadable import UnreadableImages
from data.loader import LoaderOptions, build_loader
from tests.tiny_training import HYP, make_world
from utils.errors import UserError


def test_replacement_images_do_not_depend_on_worker_count(tmp_path, capsys):
    spec = load_dataset_spec(str(make_world(tmp_path) / "data.yaml"))
    loaders = [build_loader(spec, "train", LoaderOptions(imgsz=64, batch_size=4, hyp=HYP, augment=True, workers=w)) for w in (0, 1, 2)]
    for i in (2, 7):
        (tmp_path / "images" / "train" / f"{i}.png").unlink()
    first, *others = [list(loader) for loader in loaders]
    assert capsys.readouterr().err.count("2 image(s) replaced by grey") == 3
    for batches in others:
        for a, b in zip(first, batches, strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.targets.rows(), b.targets.rows())
            assert a.paths == b.paths


def test_a_few_unreadable_images_give_one_warning(tmp_path, capsys):
    account = UnreadableImages(100, prefix="train: ")
    found = [(str(tmp_path / f"{i}.png"), f"{i}.png: gone") for i in range(11)]
    account.add(found[:10])
    account.add(found[:10])
    account.report()
    account.report()
    said = capsys.readouterr().err
    assert said.startswith("warning: train: 10 image(s) replaced by grey: 0.png: gone; ")
    assert said.count("\n") == 1
    with pytest.raises(UserError, match=r"11 of 100 images cannot be read any more \(at most 10 may\), first: 0\.png: gone"):
        account.add(found)


def test_missing_folder_is_reported_immediately(tmp_path):
    with pytest.raises(UserError, match=r"images: the folder of a\.png and others is gone"):
        UnreadableImages(100_000).add([(str(tmp_path / "images" / "a.png"), "gone")])
