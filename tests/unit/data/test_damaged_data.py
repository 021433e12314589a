"""250 damaged files of 25 kinds, and files with one faulty row: each is reported once, and the valid ones are used."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data.dataset_spec import load_dataset_spec
from data.loader import LoaderOptions, build_loader
from tests.damaged_files import IMAGE_SKIPPED, ROW_DROPPED, UNUSUAL, write_damaged
from utils.config import Hyperparameters

EACH, GOOD = 10, 120


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_damaged(tmp_path_factory.mktemp("damaged"), each=EACH, good=GOOD)


def loader_of(yaml_path, **changes):
    given = {"imgsz": 64, "batch_size": 16, "hyp": Hyperparameters(), "augment": True, "workers": 0, **changes}
    return build_loader(load_dataset_spec(yaml_path), "train", LoaderOptions(**given))


def test_every_damaged_file_is_reported_once_and_valid_ones_are_used(world, capsys):
    yaml_path, kinds = world
    loader = loader_of(yaml_path)
    usable = EACH * (len(ROW_DROPPED) + len(UNUSUAL)) + GOOD
    assert len(IMAGE_SKIPPED) >= 20
    assert f"{usable} images" in (said := capsys.readouterr().out)
    assert f"{EACH * len(IMAGE_SKIPPED)} images left out" in said
    assert "more problems" in said
    stems = {Path(f).stem for f in loader.dataset.image_files}
    for stem, kind in kinds.items():
        named = [p for p in loader.dataset.problems if Path(p.path).stem == stem]
        assert len(named) == (0 if kind in UNUSUAL else 1), (kind, named)
        assert (stem in stems) == (kind not in IMAGE_SKIPPED), kind
        assert all(p.skips == (kind in IMAGE_SKIPPED) and p.kind and p.message for p in named), kind
    batches = list(loader)
    assert sum(len(b.paths) for b in batches) == usable
    assert not any(b.unreadable for b in batches)


def test_cached_labels_report_the_same_problems(world):
    first, second = loader_of(world[0]).dataset.problems, loader_of(world[0]).dataset.problems
    assert first == second


def test_training_continues_with_the_valid_images(tmp_path, capsys):
    import train
    from tests.tiny_training import TINY, config

    yaml_path, kinds = write_damaged(tmp_path / "world", each=1, good=20)
    (tmp_path / "tiny-v9.yaml").write_text(TINY.format(block="Conv, [16, 1, 1]"))
    train.train(config(tmp_path, tmp_path / "runs", data=str(yaml_path), cfg=str(tmp_path / "tiny-v9.yaml"), epochs=1, batch_size=8))
    out = capsys.readouterr().out
    problems = (tmp_path / "runs/exp/data_problems.txt").read_text()
    for stem, kind in kinds.items():
        assert len(re.findall(rf"/{stem}\.", problems)) == (0 if kind in UNUSUAL else 1), kind
    assert "data_problems.txt" in out
    assert re.search(r"no object to train on for other", out)
    assert (tmp_path / "runs/exp/weights/last.pt").is_file()
