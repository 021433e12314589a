"""The flags of train.py: frozen, validated, and saved with the run; argparse, resume rules and docs/flags.md are made from these fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from utils.cli.flags import flag, validate_flags
from utils.errors import UserError
from utils.hyperparameters import OPTIMIZERS, Hyperparameters
from utils.lr_multipliers import format_lr_multipliers
from utils.reading.text_files import folder_name_fault
from utils.sizes import MAX_SIDE_PX, MAX_WORKERS
from utils.visual.names import FIGURE_FORMATS

__all__ = ["AUTO", "FIND_BATCH_SIZE", "NEWEST", "Hyperparameters", "TrainConfig"]

FIND_BATCH_SIZE = -1  # the largest that fits
PRETRAINED = "pretrained"  # of --freeze
NEWEST = "newest"  # of --resume
PATHS = ("cfg", "weights", "backbone_weights", "data", "hyp", "project")  # fields that name a file or a folder
ABSOLUTE = "absolute"  # key of opt.yaml
TASK_NAMES = ("detect", "segment", "pose", "obb", "classify")
AUTO = "auto"  # of --optimizer
MAX_LAYERS = 10_000
PRECISE_BATCHES = 4  # of --precise-bn: what a whole epoch gives on small sets, for little time
GENERATIONS = 300  # of --evolve without a number


@dataclass(frozen=True)
class TrainConfig:
    """The flags of train.py. ``hyp`` may also be Hyperparameters, ``lr_mult`` a mapping, and paths are accepted as text is."""

    cfg: str = flag(
        "", "model, such as yolov9-c-FocalModulation.yaml; alone: train from scratch", section="model and data", metavar="YAML",
        may_be_empty=True,
    )  # fmt: skip
    weights: str = flag(
        "", "checkpoint; alone it gives the architecture too, with --cfg what fits is transferred", metavar="PT", may_be_empty=True
    )
    task: str = flag(
        "",
        "detect, segment, pose, obb or classify: the model and the embedded data set, where neither is given; else checked",
        metavar="NAME",
        choices=TASK_NAMES,
    )
    download: bool = flag(False, "fetch published weights that are not on disk")
    attention: tuple[str, ...] = flag((), "insert same-width modules: FocalModulation@9, EMA@detect, ...", metavar="SPEC")
    attention_init: str = flag("", "identity: inserted modules start as exact no-ops", metavar="HOW", choices=("identity",))
    backbone_weights: str = flag("", "published FocalNet, BiFormer or CloFormer weights for the backbone", metavar="FILE")
    weights_report: str = flag("", "write what became of the weights, row by row, as .md, .csv or .json", metavar="FILE")
    data: str = flag("", "data set; the embedded one if left out", metavar="YAML", resumable=True)
    hyp: str | Hyperparameters = flag("", "hyper-parameters; the recipe of the model's family if left out", metavar="YAML")
    plugins: tuple[str, ...] = flag((), "Python files of yours that register modules", metavar="FILE", resumable=True)
    resume: str = flag("", "resume with this last.pt, or with the newest run", metavar="PT", const=NEWEST, resumable=True)

    epochs: int = flag(100, "epochs", section="length and size", least=1)
    batch_size: int = flag(
        16, "images per step over all processes; -1 finds the largest that fits", least=1,
        special={FIND_BATCH_SIZE: "the largest that fits"},
    )  # fmt: skip
    accumulate: int | None = flag(None, "iterations per optimizer step; nominal batch / batch size if left out", least=1)
    imgsz: int = flag(
        640,
        "side of the square input; a second one is for validation",
        aliases=("--img", "--img-size"),
        metavar="PX",
        nargs="+",
        least=32,
        most=MAX_SIDE_PX,
    )
    val_imgsz: int | None = None  # px; None = imgsz
    multi_scale: bool = flag(False, "vary the input's side by up to half around --imgsz")
    rect: bool = flag(False, "rectangular batches, no mosaic")
    evolve: int = flag(0, f"search hyper-parameters by N ({GENERATIONS}) trainings", const=GENERATIONS, least=0)
    patience: int = flag(100, "stop after so many epochs without a better fitness; 0 = never", least=0, resumable=True)

    optimizer: str = flag(
        AUTO, "SGD, Adam, AdamW, LION or MuSGD; auto: what the recipe names", section="optimization", metavar="NAME",
        choices=(AUTO, *OPTIMIZERS), shorthands={"--adam": "Adam"},
    )  # fmt: skip
    cos_lr: bool = flag(False, "cosine schedule instead of a linear one")
    flat_cos_lr: bool = flag(False, "flat first half, then a cosine")
    fixed_lr: bool = flag(False, "constant after warm-up")
    label_smoothing: float | None = flag(None, "label smoothing; takes the place of the hyp file's", least=0, below=1)
    close_mosaic: int | None = flag(None, "last epochs without mosaic and mixup; takes the place of the hyp file's", least=0)
    mask_ratio: int | None = flag(
        None, "segmentation: px of the image for each cell of a target's mask; takes the place of the hyp file's", least=1, most=32
    )
    overlap_mask: int | None = flag(
        None, "segmentation: 1 gives a pixel to the smallest of overlapping objects, 0 to all; takes the place of the hyp file's", least=0,
        most=1, shorthands={"--no-overlap-mask": 0},
    )  # fmt: skip
    freeze: tuple[int | str, ...] = flag(
        (0,), f"freeze the first N layers, the layers N N ..., or all that was transferred ({PRETRAINED})", metavar="N"
    )
    lr_mult: str = flag("", "learning rates by part: attention=2,backbone=0.1 (also neck, head, rows)", metavar="PART=X,...")
    amp: str = flag("auto", "precision: auto, off, fp16 or bf16", metavar="TYPE", choices=("auto", "off", "fp16", "bf16"))
    compile: bool = flag(False, "torch.compile")
    checkpoint_activations: str = flag(
        "off", "less memory, more time: attention (if no value is given) or all rows are computed again in the backward pass", metavar="OF",
        const="attention", choices=("off", "attention", "all"), resumable=True,
    )  # fmt: skip
    sync_bn: bool = flag(False, "batch statistics over the images of all processes (GPUs)")
    precise_bn: int = flag(
        PRECISE_BATCHES, "measure running statistics on N training batches with the averaged weights before validating and saving; 0 = off",
        least=0, metavar="N",
    )  # fmt: skip
    deterministic: bool = flag(False, "deterministic kernels")
    nan_patience: int = flag(
        5, "stop after N non-finite steps in a row (no such step changes a weight); 0 = never", least=0, resumable=True
    )
    skip_nan: bool = flag(False, "skip any number of such steps", resumable=True)
    seed: int = flag(0, "seed", least=0, most=2**32 - 1)

    workers: int = flag(8, "loader processes", section="input pipeline", least=0, most=MAX_WORKERS, resumable=True)
    cache: str = flag(
        "", "keep images in ram (if no value is given) or on disk", aliases=("--cache-images",), metavar="WHERE", const="ram",
        choices=("ram", "disk"), resumable=True,
    )  # fmt: skip
    single_cls: bool = flag(False, "all classes are one")
    image_weights: bool = flag(False, "draw images of rare and badly detected classes more often", aliases=("--image_weights",))
    min_items: int = flag(0, "leave out images with fewer objects", least=0)
    noautoanchor: bool = flag(False, "keep the YAML's anchors")

    device: str = flag(
        "", "cpu, 0, 0,1 ...; a GPU where there is one", section="device and run folder", metavar="D", may_be_empty=True, resumable=True
    )
    project: str = flag("runs/train", "folder of runs", metavar="DIR", resumable=True)
    name: str = flag("exp", "run folder in it", fault=folder_name_fault)
    exist_ok: bool = flag(False, "write into an existing run folder")
    save_period: int = flag(
        -1, "keep a checkpoint every N epochs; 0 = none", aliases=("--save_period",), least=0, special={-1: "none"}, resumable=True
    )
    save_steps: int = flag(0, "save within epochs too, every N optimizer steps; 0 = only at their ends", least=0, resumable=True)
    nosave: bool = flag(False, "save only at the end", resumable=True)
    noval: bool = flag(False, "validate only at the end", shorthands={"--notest": True})
    noplots: bool = flag(False, "no images", resumable=True)
    plots: tuple[str, ...] = flag(
        (), "every curve and matrix in this format too, beside its .png", metavar="FORMAT", choices=FIGURE_FORMATS, resumable=True
    )
    logger: tuple[str, ...] = flag(
        (), "mlflow, wandb or both, beside results.csv and TensorBoard", metavar="NAME", choices=("mlflow", "wandb"),
        hint="results.csv and TensorBoard are always written", resumable=True,
    )  # fmt: skip
    given: tuple[str, ...] = field(default=(), compare=False)  # names that the command line set, also to their defaults; not saved

    def __post_init__(self) -> None:
        freeze = self.freeze if isinstance(self.freeze, (tuple, list)) else (self.freeze,)
        changes: dict[str, Any] = {
            "hyp": self.hyp if isinstance(self.hyp, Hyperparameters) else str(self.hyp or ""),
            "lr_mult": format_lr_multipliers(self.lr_mult),
            "freeze": tuple(int(i) if str(i).lstrip("-").isdecimal() else str(i) for i in freeze) or (0,),
        }
        for name, value in changes.items():
            object.__setattr__(self, name, value)
        validate_flags(self)
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Refuses values that are allowed each on its own, and not together."""
        if sum((self.cos_lr, self.flat_cos_lr, self.fixed_lr)) > 1:
            raise UserError("--cos-lr, --flat-cos-lr and --fixed-lr exclude one another: give one of them")
        if self.attention_init and not (self.attention or self.resume):
            raise UserError("--attention-init is about inserted modules: give them with --attention, such as --attention FocalModulation@9")
        if not self.freeze_pretrained and any(not isinstance(i, int) or i < 0 for i in self.freeze):
            raise UserError(f"--freeze {' '.join(map(str, self.freeze))}: layer indices count from 0; or {PRETRAINED!r} alone")
        if any(isinstance(i, int) and i > MAX_LAYERS for i in self.freeze):
            raise UserError(f"--freeze {max(i for i in self.freeze if isinstance(i, int))}: no model has more than {MAX_LAYERS} layers")
        if self.val_imgsz is not None and not (isinstance(self.val_imgsz, int) and 32 <= self.val_imgsz <= MAX_SIDE_PX):
            raise UserError(f"--imgsz {self.imgsz} {self.val_imgsz}: whole numbers from 32 to {MAX_SIDE_PX} are needed")
        if self.image_weights and self.rect:
            raise UserError("--image-weights with --rect: they exclude one another, as drawn images come in any shape; give one of them")
        if self.evolve and self.resume:
            raise UserError("--evolve with --resume: leave --resume out, the same command resumes a search by itself")
        if self.plots and self.noplots:
            raise UserError("--plots with --noplots: they exclude one another")
        if self.save_steps and self.nosave:
            raise UserError("--save-steps with --nosave: they exclude one another")

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

    def absolute_paths(self) -> dict[str, str]:
        """The files and folders that flags name relative to the working directory, as absolute paths."""
        given = {name: value for name, value in self.to_dict().items() if name in PATHS and value}
        return {name: str(Path(value).absolute()) for name, value in given.items() if name == "project" or Path(value).exists()}

    def to_yaml(self, path: str | Path, *, absolute: Mapping[str, str] | None = None) -> None:
        """Writes opt.yaml.

        Args:
            absolute: paths that are written as well, for a later run from another working directory.
        """
        content = {**self.to_dict(), **({ABSOLUTE: dict(absolute)} if absolute else {})}
        Path(path).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")

    def replace(self, **changes: Any) -> TrainConfig:
        return replace(self, **changes)
