"""Hyper-parameters and flags: what is accepted, what is refused, and with which words."""

from __future__ import annotations

import pytest
import yaml

from utils.config import Hyperparameters, TrainConfig
from utils.errors import UserError


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_missing_hyp_keys_take_defaults(tmp_path):
    hyp = Hyperparameters.from_yaml(write(tmp_path / "h.yaml", "lr0: 1e-3\nmosaic: 0\niou_loss: siou\ntal_topk: 13\n"))
    assert (hyp.lr0, hyp.mosaic, hyp.iou_loss, hyp.tal_topk, hyp.momentum) == (0.001, 0.0, "SIoU", 13, 0.937)
    assert Hyperparameters.from_yaml(write(tmp_path / "empty.yaml", "")) == Hyperparameters(source=str(tmp_path / "empty.yaml"))


def test_round_trip(tmp_path):
    hyp = Hyperparameters(lr0=0.02, close_mosaic=7)
    hyp.to_yaml(tmp_path / "h.yaml")
    assert Hyperparameters.from_yaml(tmp_path / "h.yaml").replace(source="") == hyp


def test_unused_published_keys_are_reported_once(tmp_path, capsys):
    Hyperparameters.from_yaml(write(tmp_path / "h.yaml", "paste_in: 0.15\nanchors: 3\n"))
    assert capsys.readouterr().out.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mosiac: 1", r"h\.yaml: unknown hyper-parameter 'mosiac', did you mean 'mosaic'\?"),
        ("zzz: 1", "unknown hyper-parameter 'zzz'; known are optimizer, lr0"),
        ("lr0: fast", "lr0: 'fast' is not a number"),
        ("lr0: true", "lr0: True is not a number"),
        ("lr0: .nan", "lr0: nan is out of range"),
        ("box: -1", "box: -1 is out of range, 0 up is allowed"),
        ("fliplr: 1.5", "fliplr: 1.5 is out of range, 0 to 1 is allowed"),
        ("tal_topk: 2.5", "tal_topk: 2.5 is not a whole number"),
        ("iou_loss: SIUO", r"iou_loss: 'SIUO' is unknown, did you mean 'SIoU'\?"),
        ("iou_loss: zzz", "iou_loss: 'zzz' is unknown, one of .* is needed"),
        ("- lr0", "a mapping of keys to values is expected, not list"),
        ("lr0: [", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_invalid_hyperparameters_are_refused(tmp_path, text, says):
    with pytest.raises(UserError, match=says) as caught:
        Hyperparameters.from_yaml(write(tmp_path / "h.yaml", text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        Hyperparameters.from_yaml(tmp_path / "none.yaml")


def test_freeze_means_a_count_or_a_list():
    assert TrainConfig().frozen_layers == ()
    assert TrainConfig(freeze=3).frozen_layers == (0, 1, 2)
    assert TrainConfig(freeze=[0, 4]).frozen_layers == (0, 4)
    assert TrainConfig(freeze=["0", "4"]).frozen_layers == (0, 4)
    assert TrainConfig(freeze="pretrained").freeze_pretrained
    assert TrainConfig(freeze="pretrained").frozen_layers == ()


def test_schedule_flags_change_the_hyperparameters():
    assert [TrainConfig(**kw).schedule for kw in ({}, {"cos_lr": True}, {"flat_cos_lr": True}, {"fixed_lr": True})] == [
        "linear",
        "cosine",
        "flat-cosine",
        "fixed",
    ]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"epochs": 0}, "--epochs 0: a whole number of at least 1"),
        ({"batch_size": -2}, "--batch-size -2"),
        ({"imgsz": 16}, "--imgsz 16"),
        ({"imgsz": 320.5}, "--imgsz 320.5"),
        ({"optimizer": "sgdd"}, "--optimizer 'sgdd': one of auto, SGD, Adam, AdamW, LION, MuSGD"),
        ({"amp": "fp8"}, "--amp 'fp8'"),
        ({"cache": "gpu"}, "--cache 'gpu': one of ram, disk"),
        ({"cos_lr": True, "fixed_lr": True}, "exclude one another"),
        ({"accumulate": 0}, "--accumulate 0"),
        ({"label_smoothing": 1.0}, "--label-smoothing"),
        ({"freeze": (-1,)}, "--freeze -1"),
        ({"freeze": ("pretrained", 3)}, "--freeze pretrained 3: layer indices count from 0; or 'pretrained' alone"),
        ({"freeze": "backbone"}, "--freeze backbone"),
    ],
)
def test_invalid_flags_are_refused(flags, says):
    with pytest.raises(UserError, match=says):
        TrainConfig(**flags)


def test_config_round_trips_through_plain_values(tmp_path):
    config = TrainConfig(cfg="a.yaml", optimizer="adamw", freeze=[1, 2], plugins="mine.py", hyp=Hyperparameters(source="own"))
    config.to_yaml(tmp_path / "opt.yaml")
    loaded = TrainConfig.from_dict(yaml.safe_load((tmp_path / "opt.yaml").read_text()))
    assert loaded == config.replace(hyp="own")
    assert (loaded.optimizer, loaded.plugins) == ("AdamW", ("mine.py",))
