"""The command line of detect.py: flags as YOLO users type them, to a DetectConfig."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli.flags import SLICE_OVERLAP_TEXT, SLICE_TEXT, add_noted_flags, check_slice_flags, height_and_width, slice_size
from utils.errors import UserError

# Flags of other YOLOs' detect scripts that are refused: what to write instead.
REFUSED = {
    "--dnn": "OpenCV's DNN module is not used; leave it out, .onnx files are run by onnxruntime",
    "--update": "checkpoints need no update; leave it out",
    "--no-trace": "nothing is traced here; leave it out (export.py writes TorchScript)",
    "--agnostic": "write --agnostic-nms",
}

SOURCE_TEXT = (
    "file, folder, glob, .txt list, video, URL (rtsp, rtmp, http), .streams list, 0 for a webcam, "
    "'screen [N] [LEFT TOP WIDTH HEIGHT]' (default: the validation images)"
)


@dataclass(frozen=True)
class DetectConfig:
    """The flags of detect.py."""

    weights: str = ""  # .pt, .onnx or .torchscript; empty means the newest run's best.pt
    others: tuple[str, ...] = ()  # more weights, whose predictions join those of the first: an ensemble
    source: str = ""  # file, folder, glob, list, video, URL, camera number, screen; empty means the data set's validation images
    data: str = ""  # data set for a missing source; empty means the one in the checkpoint, or the embedded one
    imgsz: tuple[int, ...] | None = None  # px, one side or height and width; None means 640, or what an exported file was made for
    conf_thres: float = 0.25
    iou_thres: float = 0.45
    max_det: int = 1000
    device: str = ""
    view_img: bool = False
    save_txt: bool = False
    save_csv: bool = False
    save_conf: bool = False
    save_crop: bool = False
    nosave: bool = False
    classes: tuple[int, ...] | None = None
    agnostic_nms: bool = False
    augment: bool = False
    slice: tuple[int, ...] | None = None  # px of the image, one side or height and width; None means the whole image only
    slice_overlap: float = 0.2
    visualize: bool = False
    project: str = "runs/detect"
    name: str = "exp"
    exist_ok: bool = False
    line_thickness: int = 3  # px
    hide_labels: bool = False
    hide_conf: bool = False
    half: bool = False
    vid_stride: int = 1
    download: bool = False
    plugins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.imgsz is not None:
            object.__setattr__(self, "imgsz", height_and_width(self.imgsz))
        object.__setattr__(self, "slice", slice_size(self.slice, self.slice_overlap))
        if self.save_conf and not self.save_txt:  # it says how label files look
            object.__setattr__(self, "save_txt", True)
        plugins = (self.plugins,) if isinstance(self.plugins, (str, Path)) else self.plugins
        object.__setattr__(self, "plugins", tuple(map(str, plugins)))
        for name in ("weights", "source", "data", "project"):
            object.__setattr__(self, name, str(getattr(self, name)))
        for name in ("conf_thres", "iou_thres"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name):g}: a number in 0-1 is needed")
        for name in ("max_det", "line_thickness", "vid_stride"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1 is needed")


def parse_arguments(argv: Sequence[str] | None = None) -> DetectConfig:
    """Reads the command line; prefixes such as ``--img``, ``--conf`` and ``--iou`` are accepted.

    Raises:
        UserError: a flag that is refused by name, or an unusable value.
    """
    given = vars(build_parser().parse_args(argv))
    for flag in given.pop("refused", ()):
        raise UserError(f"{flag}: {REFUSED[flag]}")
    check_slice_flags(given)
    weights = given.pop("weights", [])
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return DetectConfig(**values, weights="".join(weights[:1]), others=tuple(weights[1:]))


def build_parser() -> argparse.ArgumentParser:
    """Flags that are not given are not set, so that DetectConfig's defaults hold."""
    defaults = DetectConfig()
    description = "Detects objects in images and videos."
    parser = argparse.ArgumentParser(prog="detect.py", description=description, argument_default=argparse.SUPPRESS)
    for group, flags in _flags().items():
        section = parser.add_argument_group(group)
        for names, options, text in flags:
            default = getattr(defaults, names[0].lstrip("-").replace("-", "_"))
            shown = "" if default in (None, "", False, ()) else f" (default {default})"
            section.add_argument(*names, help=text + shown, **options)
    add_noted_flags(parser, REFUSED, dest="refused")
    return parser


def _flags() -> dict[str, list[tuple[list[str], dict, str]]]:
    """Group -> (names, argparse options, help)."""
    on: dict = {"action": "store_true"}
    number: dict = {"type": int, "metavar": "N"}
    fraction: dict = {"type": float, "metavar": "X"}
    return {
        "what": [
            (["--weights"], {"nargs": "*", "metavar": "FILE"}, ".pt or exported; several: an ensemble (default: newest best.pt)"),
            (["--download"], on, "fetch published weights that are not on disk"),
            (["--source"], {"metavar": "WHAT"}, SOURCE_TEXT),
            (["--data"], {"metavar": "YAML"}, "data set whose validation images are taken without --source"),
            (["--plugins"], {"nargs": "+", "metavar": "FILE"}, "Python files of yours whose modules the model uses"),
        ],
        "how": [
            (["--imgsz", "--img", "--img-size"], {**number, "nargs": "+"}, "side, or height and width, of the input in px (640)"),
            (["--conf-thres"], fraction, "least score"),
            (["--iou-thres"], fraction, "overlap above which the weaker of two boxes of a class is dropped"),
            (["--max-det"], number, "detections an image"),
            (["--classes"], {"type": int, "nargs": "+", "metavar": "N"}, "keep only these classes"),
            (["--agnostic-nms"], on, "boxes of different classes also suppress one another"),
            (["--augment"], on, "also look at smaller and mirrored versions of each image"),
            (["--slice"], {**number, "nargs": "+"}, SLICE_TEXT),
            (["--slice-overlap"], fraction, SLICE_OVERLAP_TEXT),
            (["--vid-stride"], number, "look at every so many frames of a video or stream"),
            (["--device"], {"metavar": "D"}, "cpu, 0 ...; a GPU where there is one"),
            (["--half"], on, "float16, on a GPU"),
        ],
        "what is kept": [
            (["--project"], {"metavar": "DIR"}, "folder of runs"),
            (["--name"], {}, "run folder in it"),
            (["--exist-ok"], on, "write into an existing run folder"),
            (["--nosave"], on, "no images and videos"),
            (["--save-txt"], on, "labels/*.txt"),
            (["--save-conf"], on, "a column of scores in them"),
            (["--save-csv"], on, "predictions.csv"),
            (["--save-crop"], on, "crops/<class>/*.jpg"),
            (["--visualize"], on, "feature maps of every layer"),
            (["--view-img"], on, "show images in a window"),
            (["--line-thickness"], number, "of boxes, px"),
            (["--hide-labels"], on, "boxes without names"),
            (["--hide-conf"], on, "names without scores"),
        ],
    }  # fmt: skip
