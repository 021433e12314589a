"""The command line as YOLO users type it."""

from __future__ import annotations

import pytest

from utils.cli.train_arguments import COMMAND, parse_arguments
from utils.config import TrainConfig
from utils.errors import UserError


def parsed(line: str) -> TrainConfig:
    return parse_arguments(line.split())


def test_no_flag_sets_no_field():
    assert parsed("") == TrainConfig()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--batch 8 --img 320 --cfg yolov9-t.yaml", {"batch_size": 8, "imgsz": 320, "cfg": "yolov9-t.yaml"}),
        ("--img-size 640 640", {"imgsz": 640}),
        ("--img 640 320", {"imgsz": 640, "val_imgsz": 320}),
        ("--device 0,1 --local_rank 1", {"device": "0,1"}),
        ("--local-rank 1", {}),
        ("--notest --adam", {"noval": True, "optimizer": "Adam"}),
        ("--adam --optimizer SGD", {"optimizer": "SGD"}),
        ("--freeze 10", {"freeze": (10,)}),
        ("--freeze pretrained", {"freeze": ("pretrained",)}),
        ("--backbone-weights f.pth --weights-report r.csv", {"backbone_weights": "f.pth", "weights_report": "r.csv"}),
        ("--freeze 0 1 2", {"freeze": (0, 1, 2)}),
        ("--attention FocalModulation@9 EMA@4,6 --attention-init identity --lr-mult attention=2,backbone=0.1", {
            "attention": ("FocalModulation@9", "EMA@4,6"), "attention_init": "identity", "lr_mult": "attention=2,backbone=0.1",
        }),
        ("--resume", {"resume": "newest"}),
        ("--resume a/last.pt", {"resume": "a/last.pt"}),
        ("--cache", {"cache": "ram"}),
        ("--cache disk", {"cache": "disk"}),
        ("--linear-lr --noautoanchor --save_period 5", {"noautoanchor": True, "save_period": 5}),
        ("--multi-scale --rect --single-cls --cos-lr --label-smoothing 0.1 --close-mosaic 15 --min-items 0 --patience 50 --amp bf16", {
            "multi_scale": True, "rect": True, "single_cls": True, "cos_lr": True, "label_smoothing": 0.1, "close_mosaic": 15,
            "patience": 50, "amp": "bf16",
        }),
    ],
)  # fmt: skip
def test_flags_become_config(line, expected):
    assert parsed(line) == TrainConfig(**expected)


def test_empty_weights_mean_from_scratch():
    assert parse_arguments(["--weights", "", "--cfg", "a.yaml"]) == TrainConfig(cfg="a.yaml")


@pytest.mark.parametrize("flag", COMMAND.refused)
@pytest.mark.parametrize("value", ["", " 300"])
def test_unsupported_flags_are_refused_by_name(flag, value):
    with pytest.raises(UserError, match=f"^{flag}: not "):
        parsed(f"{flag}{value} --cfg a.yaml")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--attention-init identity", "--attention FocalModulation@9"),
        ("--attention EMA@9 --attention-init zero", "--attention-init 'zero': one of identity"),
        ("--batch-size -2", r"--batch-size -2: a whole number of at least 1, or -1"),
        ("--img 1 2 3", "--imgsz 1 2 3"),
        ("--opt sgdm", "--optimizer 'sgdm'"),
    ],
)
def test_values_are_validated(line, says):
    with pytest.raises(UserError, match=says):
        parsed(line)


def test_every_flag_is_a_field_and_every_field_a_flag():
    understood = {"shorthands", "ignored", "refused", "help"}
    flags = {action.dest for action in COMMAND.build_parser()._actions} - understood
    fields = set(TrainConfig.__dataclass_fields__) - {"val_imgsz", "given"}
    assert flags == fields
