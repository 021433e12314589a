"""The command line of val.py: flags as YOLO users type them, to a ValConfig."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from utils.cli.flags import SLICE_OVERLAP_TEXT, SLICE_TEXT, check_slice_flags, slice_size
from utils.errors import UserError
from utils.metrics.average_precision import Rule

SPLITS = ("train", "val", "test")
STUDIES = ("speed", "study")
STUDY_SIZES = tuple(range(256, 1536 + 1, 128))  # px, as YOLOv5 takes them
# Flags of other YOLOs that this project does not have (yet), and what to write instead.
REFUSED = {
    "--dnn": "--dnn is not here: .onnx files run with onnxruntime, leave it out",
    "--v5-metric": "--v5-metric is not here: write --ap-rule yolov5",
    "--no-trace": "--no-trace is not here: nothing is traced, leave it out",
}


@dataclass(frozen=True)
class ValConfig:
    """The flags of val.py. ``weights`` empty means the newest run's best.pt, ``data`` empty what the checkpoint says."""

    weights: str = ""
    others: tuple[str, ...] = ()  # more weights, whose predictions join those of the first: an ensemble
    data: str = ""
    batch_size: int = 32
    imgsz: int = 640  # px
    conf_thres: float = 0.001
    iou_thres: float = 0.7
    max_det: int = 300
    slice: tuple[int, ...] | None = None  # px of the image, one side or height and width; None means the whole image only
    slice_overlap: float = 0.2
    augment: bool = False
    task: str = "val"
    study_sizes: tuple[int, ...] = STUDY_SIZES  # px
    device: str = ""
    workers: int = 8
    single_cls: bool = False
    verbose: bool = False
    save_txt: bool = False
    save_hybrid: bool = False
    save_conf: bool = False
    save_json: bool = False
    project: str = "runs/val"
    name: str = "exp"
    exist_ok: bool = False
    half: bool = False
    min_items: int = 0
    ap_rule: str = "coco"
    download: bool = False
    plugins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in {"batch_size": 1, "imgsz": 1, "max_det": 1, "workers": 0, "min_items": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least {least} is needed")
        for name in ("conf_thres", "iou_thres"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: a number in 0-1 is needed")
        for name, choices in (("task", (*SPLITS, *STUDIES)), ("ap_rule", get_args(Rule))):
            if getattr(self, name) not in choices:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: one of {', '.join(choices)} is needed")
        object.__setattr__(self, "slice", slice_size(self.slice, self.slice_overlap))
        if (self.save_conf or self.save_hybrid) and not self.save_txt:  # both say how label files look
            object.__setattr__(self, "save_txt", True)
        plugins = (self.plugins,) if isinstance(self.plugins, (str, Path)) else self.plugins
        object.__setattr__(self, "plugins", tuple(map(str, plugins)))
        if min(self.study_sizes, default=0) < 32:
            raise UserError(f"--study-sizes {' '.join(map(str, self.study_sizes))}: sides of at least 32 px are needed")

    @property
    def all_weights(self) -> tuple[str, ...]:
        """Every file of weights, the first one first; empty where none was given."""
        return (self.weights, *self.others) if self.weights else ()


def parse_arguments(argv: Sequence[str] | None = None) -> ValConfig:
    """Reads the command line; only flags that were given are set, the rest are ValConfig's defaults.

    Raises:
        UserError: a flag that is refused by name, or a value that is out of range.
    """
    given = vars(build_parser().parse_args(argv))
    for reason in given.pop("refused", ()):
        raise UserError(reason)
    check_slice_flags(given)
    weights = given.pop("weights", [])
    sides = given.pop("imgsz", [])
    if len(set(sides)) > 1:
        raise UserError(f"--imgsz {' '.join(map(str, sides))}: validation takes one side; rectangular batches follow the images")
    if "study_sizes" in given:
        given["study_sizes"] = tuple(given["study_sizes"])
    files = {"weights": weights[0], "others": tuple(weights[1:])} if weights else {}
    return ValConfig(**given, **files, **({"imgsz": sides[0]} if sides else {}))


def build_parser() -> argparse.ArgumentParser:
    """Prefixes are accepted, as everywhere in argparse: --batch, --conf, --iou."""
    defaults = ValConfig()
    on: dict[str, Any] = {"action": "store_true"}
    flags: list[tuple[list[str], dict[str, Any], str]] = [
        (["--weights"], {"nargs": "+", "metavar": "FILE"}, ".pt or exported; several: an ensemble; the newest best.pt if left out"),
        (["--download"], on, "fetch published weights that are not on disk"),
        (["--data"], {"metavar": "YAML"}, "data set; what the checkpoint says if left out"),
        (["--task"], {"metavar": "TASK"}, "train, val or test: the split; speed: milliseconds an image; study: mAP and speed over sizes"),
        (["--study-sizes"], {"type": int, "nargs": "+", "metavar": "PX"}, "sizes of --task study"),
        (["--augment"], on, "also look at smaller and mirrored versions of each image"),
        (["--batch-size"], {"type": int, "metavar": "N"}, "images a batch"),
        (["--imgsz", "--img", "--img-size"], {"type": int, "nargs": "+", "metavar": "PX"}, "longer side of the input"),
        (["--conf-thres"], {"type": float, "metavar": "X"}, "least score"),
        (["--iou-thres"], {"type": float, "metavar": "X"}, "overlap above which the weaker box is dropped"),
        (["--max-det"], {"type": int, "metavar": "N"}, "most detections of an image"),
        (["--slice"], {"type": int, "nargs": "+", "metavar": "PX"}, SLICE_TEXT),
        (["--slice-overlap"], {"type": float, "metavar": "X"}, SLICE_OVERLAP_TEXT),
        (["--ap-rule"], {"metavar": "RULE"}, "coco (equal to pycocotools), yolov5 (as YOLOv5, v7 and v9 print it) or ultralytics"),
        (["--device"], {"metavar": "D"}, "cpu, 0 ...; a GPU where there is one"),
        (["--workers"], {"type": int, "metavar": "N"}, "loader processes"),
        (["--half"], on, "float16 on a GPU"),
        (["--single-cls"], on, "all classes are one"),
        (["--min-items"], {"type": int, "metavar": "N"}, "leave out images with fewer objects"),
        (["--verbose"], on, "a row for each class, however many there are"),
        (["--save-txt"], on, "detections as label files"),
        (["--save-conf"], on, "with the score as sixth column"),
        (["--save-hybrid"], on, "label files of the objects and the detections that are none of them"),
        (["--save-json"], on, "detections for pycocotools, which runs where the data set has COCO annotations"),
        (["--project"], {"metavar": "DIR"}, "folder of runs"),
        (["--name"], {}, "run folder in it"),
        (["--exist-ok"], on, "write into an existing run folder"),
        (["--plugins"], {"nargs": "+", "metavar": "FILE"}, "Python files of yours that register modules"),
    ]
    parser = argparse.ArgumentParser(prog="val.py", argument_default=argparse.SUPPRESS, description="Validates a detector.")
    for names, options, text in flags:
        default = getattr(defaults, names[0].lstrip("-").replace("-", "_"))
        parser.add_argument(*names, help=text + ("" if default in (None, "", False, ()) else f" (default {default})"), **options)
    for flag in REFUSED:
        parser.add_argument(flag, dest="refused", action=_Refuse, nargs="*", help=argparse.SUPPRESS)
    return parser


class _Refuse(argparse.Action):
    """Remembers why a flag is refused, whatever follows it."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        reason = next(text for flag, text in REFUSED.items() if flag.startswith(option_string or ""))
        namespace.refused = [*getattr(namespace, "refused", []), reason]
