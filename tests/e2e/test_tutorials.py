"""docs/tutorials and docs/zh/tutorials: every command runs, at small size, and both languages have the same commands."""

from __future__ import annotations

import importlib
import re
import shlex
from functools import reduce
from pathlib import Path

import pytest

from models import build_model
from models.checkpoints.checkpoint import Checkpoint, save_checkpoint
from tests.tiny_training import make_world

ROOT = Path(__file__).parents[2]
ENGLISH, CHINESE = ROOT / "docs" / "tutorials", ROOT / "docs" / "zh" / "tutorials"
PAGES = sorted(page.name for page in ENGLISH.glob("*.md") if page.name != "README.md")
SMALLER = {"yolov9-c": "yolov9-t", "yolov5s": "yolov5n"}  # the same network in a size that trains in seconds
SMALL = {"--imgsz": "64", "--epochs": "1", "--batch-size": "4", "--slice": "64"}
TRAINING = ["--imgsz", "64", "--batch-size", "4", "--workers", "0", "--noplots", "--device", "cpu", "--exist-ok"]
ADDED = {
    "train": TRAINING, "val": ["--workers", "0", "--imgsz", "64"], "detect": ["--imgsz", "64"], "export": ["--imgsz", "64"],
    "models.edit": ["--imgsz", "64"], "models.profiling": ["--imgsz", "64"], "doctor": [],
}  # fmt: skip


def commands(page: Path) -> list[str]:
    """The lines of a page's shell blocks."""
    return [line for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S) for line in block.splitlines()]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins for published files."""
    folder = tmp_path_factory.mktemp("weights")
    for name in ("yolov8n", "yolov5n", "yolov9-t"):
        model = build_model(f"{name}.yaml")
        names = tuple(str(number) for number in range(model.nc))
        save_checkpoint(folder / f"{name}.pt", Checkpoint(model.spec.to_dict(), f"{name}.yaml", names, model.state_dict()))
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_page_run(page, weights, tmp_path, monkeypatch, capsys):
    world = make_world(tmp_path, train=4, val=2)
    (world / "data.yaml").rename(world / "mydata.yaml")
    for file in weights.iterdir():
        (world / file.name).symlink_to(file)
    for image in (world / "images" / "val").iterdir():
        (world / "images" / image.name).symlink_to(image)
    monkeypatch.chdir(world)
    lines = dict.fromkeys(reduce(lambda text, sizes: text.replace(*sizes), SMALLER.items(), line) for line in commands(ENGLISH / page))
    assert lines
    for line in lines:
        python, *words = shlex.split(line)
        assert python == "python"
        name, given = (words[1], words[2:]) if words[0] == "-m" else (words[0].removesuffix(".py"), words[1:])
        given = [SMALL.get(before, word) for before, word in zip(["", *given], given)]
        entry = f"{name}.__main__" if (ROOT / name.replace(".", "/") / "__main__.py").exists() else name
        status = importlib.import_module(entry).main([*given, *ADDED[name]])
        assert status == 0, f"{line}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_have_the_same_commands_and_sections(page):
    english, chinese = ENGLISH / page, CHINESE / page
    assert commands(chinese) == commands(english)
    assert chinese.read_text(encoding="utf-8").count("\n## ") == english.read_text(encoding="utf-8").count("\n## ")


@pytest.mark.parametrize("folder", [ENGLISH, CHINESE])
def test_links_of_the_pages_lead_somewhere(folder):
    for page in folder.glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
