"""Hyper-parameters: a YAML file that users know, frozen and validated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from utils.cli.flags import Flag, flag, flags_of
from utils.errors import UserError, nearest
from utils.reading.yaml_text import read_yaml, shown

# Keys of published files that mean something elsewhere and nothing here; they are accepted with one line.
UNUSED_KEYS = frozenset(("anchors", "bgr", "copy_paste_mode", "crop_fraction", "cutmix", "dropout", "paste_in"))
_SIMILARITIES = ("IoU", "GIoU", "DIoU", "CIoU", "EIoU", "SIoU", "MDPIoU")
IOU_LOSSES = (*_SIMILARITIES, "NWD", "WIoU", "WIoU-v1", "WIoU-v2", "WIoU-v3") + tuple(
    f"{variant}-{name}" for variant in ("alpha", "Inner", "Focaler") for name in _SIMILARITIES
)
CLS_LOSSES = ("BCE", "focal", "QFL", "VFL")
POLICIES = ("none", "randaugment", "autoaugment", "augmix")
OPTIMIZERS = ("SGD", "Adam", "AdamW", "LION", "MuSGD")


def _key(
    default: float | str | tuple[float, ...], help: str, *, least: float = 0, most: float | None = None, choices: tuple[str, ...] = ()
) -> Any:
    """A key of a hyp file: a number in ``least`` to ``most``, both included, a list of them, or one of ``choices``."""
    return flag(default, help, **({"choices": choices} if choices else {"least": least, "most": most}))


@dataclass(frozen=True)
class Hyperparameters:
    """The recipe: optimizer, warm-up, gains, augmentation. Names are the keys of YOLO's hyp files; defaults are YOLOv9's scratch-high.

    ``source`` is where the values came from; it is not a key.
    """

    # Optimizer and schedule
    optimizer: str = _key("SGD", "what --optimizer auto, the default, takes", choices=OPTIMIZERS)
    lr0: float = _key(0.01, "learning rate after warm-up", least=1e-9, most=10)
    lrf: float = _key(0.01, "last learning rate as a fraction of lr0", most=1)
    lr_reaches_lrf: int = _key(0, "1: the linear schedule reaches lr0 * lrf in the last epoch (YOLOv7), 0: one epoch later", most=1)
    momentum: float = _key(0.937, "momentum of SGD, first beta of the other optimizers", most=1)
    weight_decay: float = _key(0.0005, "weight decay at the nominal batch")
    warmup_epochs: float = _key(3.0, "epochs of warm-up")
    warmup_momentum: float = _key(0.8, "momentum at the start of warm-up (SGD)", most=1)
    warmup_bias_lr: float = _key(0.1, "learning rate of biases at the start of warm-up")
    warmup_min_iters: int = _key(100, "warm-up lasts at least this many iterations: 100 in YOLOv5 and v9, 1000 in v7, 0 in v8")
    nbs: int = _key(64, "nominal batch: gradients are accumulated, and weight decay is scaled, to it", least=1)
    clip_norm: float = _key(10.0, "largest norm of the gradient; 0: no clipping")
    # Loss
    box: float = _key(7.5, "gain of the box loss")
    cls: float = _key(0.5, "gain of the class loss")
    obj: float = _key(0.7, "gain of the objectness loss of anchor-based heads")
    dfl: float = _key(1.5, "gain of the distribution focal loss of anchor-free heads")
    pose: float = _key(12.0, "gain of the keypoint loss (OKS)")
    kobj: float = _key(1.0, "gain of the keypoints' visibility loss")
    rle: float = _key(1.0, "gain of the likelihood of keypoint errors (YOLO26)")
    angle: float = _key(1.0, "gain of the angle loss of rotated boxes")
    cls_pw: float = _key(1.0, "weight of positives in the class loss")
    cls_weights: tuple[float, ...] = _key((), "weight of each class in the class loss, in the order of names; empty: all 1")
    obj_pw: float = _key(1.0, "weight of positives in the objectness loss")
    iou_t: float = _key(0.2, "read and not used: anchors are assigned by anchor_t", most=1)
    anchor_t: float = _key(5.0, "largest ratio of the sides of an object and its anchor", least=1)
    fl_gamma: float = _key(0.0, "gamma of the focal loss; 0: none")
    label_smoothing: float = _key(0.0, "label smoothing", most=1)
    loss_ota: int = _key(1, "YOLOv7's heads: 1 assigns by SimOTA, 0 by anchor ratio alone", most=1)
    iou_loss: str = _key("CIoU", "box loss", choices=IOU_LOSSES)
    cls_loss: str = _key("BCE", "class loss", choices=CLS_LOSSES)
    tal_topk: int = _key(10, "task-aligned assignment: candidates of an object", least=1)
    tal_alpha: float = _key(0.5, "task-aligned assignment: exponent of the score")
    tal_beta: float = _key(6.0, "task-aligned assignment: exponent of the IoU")
    mask_ratio: int = _key(4, "segmentation: px of the image for each cell of a target's mask", least=1, most=32)
    overlap_mask: int = _key(1, "segmentation: 1: where masks overlap a pixel belongs to the smallest object, 0: to all", most=1)
    # Augmentation
    hsv_h: float = _key(0.015, "largest change of hue, a fraction", most=1)
    hsv_s: float = _key(0.7, "largest change of saturation, a fraction", most=1)
    hsv_v: float = _key(0.4, "largest change of value, a fraction", most=1)
    degrees: float = _key(0.0, "largest rotation, degrees", most=180)
    translate: float = _key(0.1, "largest shift, a fraction of the image", most=1)
    scale: float = _key(0.9, "zoom by 1 +- scale", most=1)
    shear: float = _key(0.0, "largest shear, degrees", most=90)
    perspective: float = _key(0.0, "largest perspective coefficient", most=0.01)
    flipud: float = _key(0.0, "probability of a vertical flip", most=1)
    fliplr: float = _key(0.5, "probability of a horizontal flip", most=1)
    mosaic: float = _key(1.0, "probability of a mosaic", most=1)
    mixup: float = _key(0.15, "probability of mixup", most=1)
    copy_paste: float = _key(0.3, "probability of copy-paste", most=1)
    close_mosaic: int = _key(0, "last epochs without mosaic and mixup")
    auto_augment: str = _key("none", "classification: policy in place of hsv_h, hsv_s and hsv_v", choices=POLICIES)
    erasing: float = _key(0.0, "classification: probability that a rectangle of the image is erased", most=1)
    source: str = ""

    def __post_init__(self) -> None:
        for key in flags_of(type(self)):
            check = _checked_list if key.many else _checked
            object.__setattr__(self, key.name, check(key, getattr(self, key.name), self.source or "hyper-parameters"))

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """Every key a hyp file may set and this project uses."""
        return tuple(key.name for key in flags_of(cls))

    @classmethod
    def from_yaml(cls, path: str | Path) -> Hyperparameters:
        """Reads a hyp file; keys that are not in it keep their defaults.

        Raises:
            UserError: the file is missing or no YAML mapping, a key is unknown (the nearest is named), or a value is out of range.
        """
        return cls.from_dict(read_yaml(path, expected="keys to values"), source=str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "hyper-parameters") -> Hyperparameters:
        """The same from a mapping, as a checkpoint holds it."""
        known = cls.keys()
        unused = [k for k in values if k in UNUSED_KEYS]
        for key in values:
            if key not in known and key not in UNUSED_KEYS:
                hint = nearest(str(key)[:80], known)
                meant = f", {hint}" if hint else f"; known are {', '.join(known)}"
                raise UserError(f"{source}: unknown hyper-parameter {shown(key)}{meant}")
        if unused:
            print(f"{source}: {', '.join(unused)} accepted, not used by this project")
        return cls(**{k: v for k, v in values.items() if k in known}, source=source)

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        del values["source"]
        return values

    def to_yaml(self, path: str | Path) -> None:
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    def replace(self, **changes: Any) -> Hyperparameters:
        return replace(self, **changes)


def _checked(key: Flag, value: Any, source: str) -> Any:
    """The value as the key's type, in its range. YAML 1.1 reads ``1e-3`` as text, so numbers in text are numbers here."""
    if key.choices:
        return _checked_name(key, value, source)
    try:
        if isinstance(value, bool) and (key.scalar, key.most) != (int, 1):  # a switch may be written as true or false
            raise ValueError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{source}: {key.name}: {shown(value)} is not a number") from None
    least, most = key.least or 0, key.most if key.most is not None else math.inf
    if not math.isfinite(number) or not least <= number <= most:
        upper = f" to {most:g}" if math.isfinite(most) else " up"
        raise UserError(f"{source}: {key.name}: {shown(value)} is out of range, {least:g}{upper} is allowed")
    if key.scalar is int:
        if number != int(number):
            raise UserError(f"{source}: {key.name}: {value!r} is not a whole number")
        return int(number)
    return number


def _checked_list(key: Flag, values: Any, source: str) -> tuple[Any, ...]:
    if not isinstance(values, (list, tuple)):
        raise UserError(f"{source}: {key.name}: {values!r} is not a list of numbers such as [0.5, 1, 2]")
    return tuple(_checked(key, value, source) for value in values)


def _checked_name(key: Flag, value: Any, source: str) -> str:
    by_lower = {n.lower(): n for n in key.choices}
    name = by_lower.get(str(value).lower())
    if name is None:
        hint = nearest(str(value), key.choices) or f"one of {', '.join(key.choices)} is needed"
        raise UserError(f"{source}: {key.name}: {shown(value)} is unknown, {hint}")
    return name
