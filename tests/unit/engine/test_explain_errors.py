"""explain.py --errors compares as val.py does, and says which flags it cannot follow."""

from __future__ import annotations

from pathlib import Path

import pytest

import detect
from engine.explain.error_panels import error_section
from engine.explain.run import open_network
from models import build_model
from models.checkpoints.checkpoint import Checkpoint, save_checkpoint
from tests.golden import fill_
from tests.image_files import write_images
from tests.tiny import tiny_cfg, tiny_checkpoint
from utils.cli.explain_arguments import ExplainConfig
from utils.distributed import select_device
from utils.errors import UserError

NAMES, OTHER_ORDER = ("red", "blue", "green"), ("green", "red", "blue")


def grey_checkpoint(path: Path) -> Path:
    cfg = {**tiny_cfg(), "ch": 1}
    weights = fill_(build_model(cfg, names=NAMES), 1.35).state_dict()
    save_checkpoint(path, Checkpoint(cfg=cfg, cfg_name="grey.yaml", names=NAMES, weights=weights, config={}))
    return path


def costs(weights: Path, data: Path, folder: Path, **flags: object) -> tuple[list[list[str]], list[str]]:
    """Rows of the table, and lines."""
    config = ExplainConfig(weights=str(weights), imgsz=(64, 64), errors=True, device="cpu", panels=1, conf_thres=0.1, **flags)
    model = open_network(weights, select_device("cpu"), config)
    folder.mkdir(exist_ok=True)
    section, _ = error_section(model, config, folder, data=str(data), weights=str(weights))
    return [list(row) for row in section.table], section.lines


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images labelled with the best detections of a network, in two data sets with its names in two orders."""
    root = tmp_path_factory.mktemp("errors")
    tiny_checkpoint(root / "a.pt", NAMES)
    write_images(root / "same", {"val": [[], []]}, names=NAMES)
    flags = ["--img", "64", "--conf", "0.1", "--max-det", "9", "--save-txt", "--nosave", "--project", str(root), "--name", "found"]
    assert detect.main(["--weights", str(root / "a.pt"), "--source", str(root / "same/images/val"), *flags]) == 0
    write_images(root / "other", {"val": [[], []]}, names=OTHER_ORDER)
    for path in (root / "found/labels").glob("*.txt"):
        rows = [row.split(" ", 1) for row in path.read_text().splitlines()]
        (root / "same/labels/val" / path.name).write_text("".join(f"{label} {rest}\n" for label, rest in rows))
        text = "".join(f"{OTHER_ORDER.index(NAMES[int(label)])} {rest}\n" for label, rest in rows)
        (root / "other/labels/val" / path.name).write_text(text)
    return root


def test_classes_in_another_order_are_matched_by_name(labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, lines = costs(labelled / "a.pt", labelled / "same/data.yaml", tmp_path / "same")
    other_table, other_lines = costs(labelled / "a.pt", labelled / "other/data.yaml", tmp_path / "other")
    assert "in another order; they are matched by name" in capsys.readouterr().out
    assert other_table == table
    assert other_lines[0] == lines[0]
    assert sorted(other_lines) == sorted(lines)
    assert int(table[-1][2]) > 0


def test_grey_network_reads_a_data_set_that_says_nothing_of_channels(tmp_path: Path) -> None:
    data = write_images(tmp_path / "data", {"val": [[(0, 0.5, 0.5, 0.3, 0.3)]]}, names=NAMES)
    weights = grey_checkpoint(tmp_path / "grey.pt")
    table, _ = costs(weights, data, tmp_path / "figures")
    assert len(table) == 8
    data.write_text(data.read_text() + "ch: 3\n")
    with pytest.raises(UserError, match=r"ch: 3, but .*grey\.pt takes 1 channels"):
        costs(weights, data, tmp_path / "figures")
