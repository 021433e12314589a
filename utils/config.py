"""What a run is configured by: hyper-parameters (a YAML file that users know) and the flags of train.py, both frozen and validated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from utils.errors import UserError, nearest
from utils.rates import multipliers_text

# Keys of published files that mean something elsewhere and nothing here; they are accepted with one line.
UNUSED_KEYS = frozenset(
    ("anchors", "angle", "auto_augment", "bgr", "copy_paste_mode", "crop_fraction", "cutmix", "dropout", "erasing", "kobj", "mask_ratio")
    + ("overlap_mask", "paste_in", "pose", "rle")
)
_SIMILARITIES = ("IoU", "GIoU", "DIoU", "CIoU", "EIoU", "SIoU", "MDPIoU")
IOU_LOSSES = (*_SIMILARITIES, "NWD", "WIoU", "WIoU-v1", "WIoU-v2", "WIoU-v3") + tuple(
    f"{variant}-{name}" for variant in ("alpha", "Inner", "Focaler") for name in _SIMILARITIES
)
NAMES = {"iou_loss": IOU_LOSSES, "cls_loss": ("BCE", "focal", "QFL", "VFL")}  # keys whose values are names
OPTIMIZERS = ("SGD", "Adam", "AdamW", "LION")
PRECISIONS = ("auto", "off", "fp16", "bf16")
LEAST = {
    "epochs": 1,
    "batch_size": 1,
    "imgsz": 32,
    **dict.fromkeys(("workers", "patience", "min_items", "seed", "save_steps", "nan_patience", "evolve"), 0),
}
FIND_BATCH_SIZE = -1  # the largest that fits
CACHES = ("", "ram", "disk")
RECOMPUTED = ("off", "attention", "all")
TEXTS = ("weights", "backbone_weights", "weights_report", "cfg", "data", "resume", "project", "name", "cache")  # paths are understood
PRETRAINED = "pretrained"  # of --freeze
ATTENTION_INITS = ("", "identity")
LOGGERS = ("mlflow", "wandb")
CHOICES = {
    "optimizer": OPTIMIZERS, "amp": PRECISIONS, "cache": CACHES, "attention_init": ATTENTION_INITS, "checkpoint_activations": RECOMPUTED,
}  # fmt: skip

INF = math.inf
# key -> (least, greatest) allowed value, both inclusive; a key that is not here may be any finite number from 0 on.
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("momentum", "warmup_momentum", "iou_t", "label_smoothing"), (0.0, 1.0)),
    **dict.fromkeys(("hsv_h", "hsv_s", "hsv_v", "flipud", "fliplr", "mosaic", "mixup", "copy_paste"), (0.0, 1.0)),
    **dict.fromkeys(("translate", "scale"), (0.0, 1.0)),
    "lr0": (1e-9, 10.0),
    "lrf": (0.0, 1.0),
    "degrees": (0.0, 180.0),
    "shear": (0.0, 90.0),
    "perspective": (0.0, 0.01),
    "anchor_t": (1.0, INF),
    **dict.fromkeys(("loss_ota", "lr_reaches_lrf"), (0, 1)),
    "nbs": (1, INF),
    "tal_topk": (1, INF),
}


@dataclass(frozen=True)
class Hyperparameters:
    """The recipe: optimizer, warm-up, gains, augmentation. Names are the keys of YOLO's hyp files; defaults are YOLOv9's scratch-high.

    ``source`` is where the values came from; it is not a key.
    """

    # Optimizer and schedule
    lr0: float = 0.01  # learning rate after warm-up
    lrf: float = 0.01  # last learning rate as a fraction of lr0
    lr_reaches_lrf: int = 0  # 1: the linear schedule reaches lr0 * lrf in the last epoch (v7), 0: one epoch later
    momentum: float = 0.937  # SGD momentum, Adam beta1
    weight_decay: float = 0.0005  # at the nominal batch
    warmup_epochs: float = 3.0
    warmup_momentum: float = 0.8
    warmup_bias_lr: float = 0.1
    warmup_min_iters: int = 100  # warm-up lasts at least this many iterations: 100 in v5 and v9, 1000 in v7, 0 in v8
    nbs: int = 64  # nominal batch: gradients are accumulated and weight decay is scaled to it
    clip_norm: float = 10.0  # largest norm of the gradient; 0 = no clipping
    # Loss
    box: float = 7.5
    cls: float = 0.5
    obj: float = 0.7
    dfl: float = 1.5
    cls_pw: float = 1.0
    obj_pw: float = 1.0
    iou_t: float = 0.2
    anchor_t: float = 5.0
    fl_gamma: float = 0.0
    label_smoothing: float = 0.0
    loss_ota: int = 1
    iou_loss: str = "CIoU"
    cls_loss: str = "BCE"
    tal_topk: int = 10
    tal_alpha: float = 0.5
    tal_beta: float = 6.0
    # Augmentation
    hsv_h: float = 0.015
    hsv_s: float = 0.7
    hsv_v: float = 0.4
    degrees: float = 0.0
    translate: float = 0.1  # fraction of the image
    scale: float = 0.9  # gain 1 +- scale
    shear: float = 0.0  # degrees
    perspective: float = 0.0
    flipud: float = 0.0
    fliplr: float = 0.5
    mosaic: float = 1.0
    mixup: float = 0.15
    copy_paste: float = 0.3
    close_mosaic: int = 0  # the last epochs run without mosaic and mixup
    source: str = ""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for key in (f.name for f in fields(self) if f.name != "source"):
            value = _checked(key, getattr(self, key), hints[key], self.source or "hyper-parameters")
            object.__setattr__(self, key, value)

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """Every key a hyp file may set and this project uses."""
        return tuple(f.name for f in fields(cls) if f.name != "source")

    @classmethod
    def from_yaml(cls, path: str | Path) -> Hyperparameters:
        """Reads a hyp file; keys that are not in it keep their defaults.

        Raises:
            UserError: the file is missing or no YAML mapping, a key is unknown (the nearest is named), or a value is out of range.
        """
        return cls.from_dict(read_yaml_mapping(path), source=str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "hyper-parameters") -> Hyperparameters:
        """The same from a mapping, as a checkpoint holds it."""
        known = cls.keys()
        unused = [k for k in values if k in UNUSED_KEYS]
        for key in values:
            if key not in known and key not in UNUSED_KEYS:
                hint = nearest(str(key), known)
                raise UserError(f"{source}: unknown hyper-parameter {key!r}" + (f", {hint}" if hint else f"; known are {', '.join(known)}"))
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


@dataclass(frozen=True)
class TrainConfig:
    """The flags of train.py. ``hyp`` may also be Hyperparameters; empty means the recipe of the model's family."""

    weights: str = ""
    backbone_weights: str = ""  # a published classifier's, for the backbone alone
    weights_report: str = ""  # .md, .csv or .json: what became of the weights
    cfg: str = ""
    data: str = ""
    hyp: str | Hyperparameters = ""
    epochs: int = 100
    batch_size: int = 16  # over all processes; -1 = the largest that fits
    imgsz: int = 640  # px, square
    val_imgsz: int | None = None  # px; None = imgsz
    device: str = ""
    workers: int = 8
    project: str = "runs/train"
    name: str = "exp"
    exist_ok: bool = False
    seed: int = 0
    optimizer: str = "SGD"
    cos_lr: bool = False
    flat_cos_lr: bool = False
    fixed_lr: bool = False
    label_smoothing: float | None = None  # None = what the hyp file says
    patience: int = 100  # epochs without a better fitness; 0 = never stop early
    attention: tuple[str, ...] = ()  # modules to insert, such as FocalModulation@9
    attention_init: str = ""  # "identity": inserted modules start as exact no-ops
    lr_mult: str = ""  # factors of the learning rate by part, such as attention=2,backbone=0.1; a mapping is understood
    freeze: tuple[int | str, ...] = (0,)  # one number: the first n layers; several: these layers; "pretrained": what was carried over
    evolve: int = 0  # generations of a search for hyper-parameters, each a whole training; 0 = none, just train
    image_weights: bool = False  # draw images of rare and badly found classes more often
    rect: bool = False
    multi_scale: bool = False
    single_cls: bool = False
    noautoanchor: bool = False
    close_mosaic: int | None = None  # None = what the hyp file says
    min_items: int = 0
    resume: str = ""  # a checkpoint, or "newest"
    cache: str = ""  # "", "ram" or "disk"
    save_period: int = -1
    save_steps: int = 0  # optimizer steps between saves within an epoch; 0 = none
    nosave: bool = False
    noval: bool = False
    noplots: bool = False
    logger: tuple[str, ...] = ()  # beside results.csv and TensorBoard: mlflow, wandb
    amp: str = "auto"
    compile: bool = False
    checkpoint_activations: str = "off"  # or "attention", "all": what is computed again in the backward pass
    sync_bn: bool = False  # batch statistics over all processes
    accumulate: int | None = None  # None = nominal batch / batch size
    deterministic: bool = False
    download: bool = False
    nan_patience: int = 5  # steps in a row whose loss or gradient is not finite; 0 = never stop
    skip_nan: bool = False
    plugins: tuple[str, ...] = ()
    given: tuple[str, ...] = field(default=(), compare=False)  # names that the command line set, also to their defaults; not saved

    def __post_init__(self) -> None:
        self._normalise()
        for name, least in LEAST.items():
            value = getattr(self, name)
            if name == "batch_size" and value == FIND_BATCH_SIZE:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                other = f", or {FIND_BATCH_SIZE} for the largest that fits," if name == "batch_size" else ""
                raise UserError(f"--{name.replace('_', '-')} {value!r}: a whole number of at least {least}{other} is needed")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f"--{name.replace('_', '-')} {value!r}: one of {', '.join(c for c in choices if c)} is needed")
        if sum((self.cos_lr, self.flat_cos_lr, self.fixed_lr)) > 1:
            raise UserError("--cos-lr, --flat-cos-lr and --fixed-lr exclude one another: give one of them")
        if self.accumulate is not None and self.accumulate < 1:
            raise UserError(f"--accumulate {self.accumulate}: at least 1 is needed")
        if self.label_smoothing is not None and not 0 <= self.label_smoothing < 1:
            raise UserError(f"--label-smoothing {self.label_smoothing}: a number in 0-1 is needed")
        if self.attention_init and not (self.attention or self.resume):
            raise UserError("--attention-init is about inserted modules: give them with --attention, such as --attention FocalModulation@9")
        if not self.freeze_pretrained and any(not isinstance(i, int) or i < 0 for i in self.freeze):
            raise UserError(f"--freeze {' '.join(map(str, self.freeze))}: layer indices count from 0; or {PRETRAINED!r} alone")
        for name in (n for n in self.logger if n not in LOGGERS):
            raise UserError(f"--logger {name}: {', '.join(LOGGERS)} are known; results.csv and TensorBoard are always written")
        if self.image_weights and self.rect:
            raise UserError("--image-weights with --rect: they exclude one another, as drawn images come in any shape; give one of them")
        if self.evolve and self.resume:
            raise UserError("--evolve with --resume: leave --resume out, the same command resumes a search by itself")
        if self.save_steps and self.nosave:
            raise UserError("--save-steps with --nosave: they exclude one another")

    def _normalise(self) -> None:
        """Accepts what Python users naturally pass: paths, lists, an int where one of several is meant, lower-case optimizer names."""
        by_lower = {o.lower(): o for o in OPTIMIZERS}
        freeze = self.freeze if isinstance(self.freeze, (tuple, list)) else (self.freeze,)
        plugins = (self.plugins,) if isinstance(self.plugins, (str, Path)) else self.plugins
        changes: dict[str, Any] = {
            **{k: str(getattr(self, k) or "") for k in TEXTS},
            "hyp": self.hyp if isinstance(self.hyp, Hyperparameters) else str(self.hyp or ""),
            "device": "" if self.device is None else str(self.device),
            "attention": (self.attention,) if isinstance(self.attention, str) else tuple(self.attention),
            "attention_init": str(self.attention_init or ""),
            "lr_mult": multipliers_text(self.lr_mult),
            "freeze": tuple(int(i) if str(i).lstrip("-").isdecimal() else str(i) for i in freeze) or (0,),
            "plugins": tuple(str(p) for p in plugins),
            "logger": tuple(dict.fromkeys(name.lower() for name in ((self.logger,) if isinstance(self.logger, str) else self.logger))),
            "optimizer": by_lower.get(str(self.optimizer).lower(), self.optimizer),
        }
        for name, value in changes.items():
            object.__setattr__(self, name, value)

    @property
    def frozen_layers(self) -> tuple[int, ...]:
        """Indices of the layers that are not trained: ``--freeze 10`` means the first ten, ``--freeze 0 1 2`` these three."""
        numbers = tuple(i for i in self.freeze if isinstance(i, int))
        return tuple(range(numbers[0])) if len(numbers) == 1 else numbers

    @property
    def freeze_pretrained(self) -> bool:
        """Whether all that was carried over stays as it is."""
        return self.freeze == (PRETRAINED,)

    @property
    def schedule(self) -> str:
        return "cosine" if self.cos_lr else "flat-cosine" if self.flat_cos_lr else "fixed" if self.fixed_lr else "linear"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The config as a checkpoint or opt.yaml holds it; keys of other versions are left out."""
        known = {f.name for f in fields(cls)} - {"given"}
        return cls(**{k: v for k, v in values.items() if k in known})

    def to_dict(self) -> dict[str, Any]:
        """Plain values only; hyper-parameters given as an object are saved on their own and leave their source here."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "given"}
        if isinstance(self.hyp, Hyperparameters):
            values["hyp"] = self.hyp.source
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def to_yaml(self, path: str | Path) -> None:
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    def replace(self, **changes: Any) -> TrainConfig:
        return replace(self, **changes)


def read_yaml_mapping(path: str | Path) -> dict[str, Any]:
    """A YAML file whose top level is a mapping; an empty file is an empty mapping. Never runs anything.

    Raises:
        UserError: missing, unreadable, no YAML, or no mapping.
    """
    path = Path(path)
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: a mapping of keys to values is needed, not {type(loaded).__name__}")
    return loaded


def _checked(key: str, value: Any, kind: type, source: str) -> Any:
    """The value as ``kind``, in its range. YAML 1.1 reads ``1e-3`` as text, so numbers in text are numbers here."""
    if kind is str:
        return _checked_name(key, value, source)
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"{source}: {key}: {value!r} is not a number") from None
    least, greatest = RANGES.get(key, (0.0, INF))
    if not math.isfinite(number) or not least <= number <= greatest:
        upper = f" to {greatest:g}" if math.isfinite(greatest) else " up"
        raise UserError(f"{source}: {key}: {value!r} is out of range, {least:g}{upper} is allowed")
    if kind is int:
        if number != int(number):
            raise UserError(f"{source}: {key}: {value!r} is not a whole number")
        return int(number)
    return number


def _checked_name(key: str, value: Any, source: str) -> str:
    by_lower = {n.lower(): n for n in NAMES[key]}
    name = by_lower.get(str(value).lower())
    if name is None:
        raise UserError(f"{source}: {key}: {value!r} is unknown, one of {', '.join(NAMES[key])} is needed")
    return name
