"""The command line of val.py: flags as YOLO users type them, to a ValConfig."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from utils.cli.command import Command
from utils.cli.flags import flag, validate_flags
from utils.cli.sizes import check_slice_flags, height_and_width, slice_flag, slice_overlap_flag
from utils.errors import UserError
from utils.metrics.average_precision import Rule
from utils.reading.text_files import folder_name_fault
from utils.sizes import MAX_SIDE_PX, MAX_WORKERS
from utils.visual.names import FIGURE_FORMATS

SPLITS = ("train", "val", "test")
STUDIES = ("speed", "study")
STUDY_SIZES = tuple(range(256, 1536 + 1, 128))  # px, as YOLOv5 takes them


@dataclass(frozen=True)
class ValConfig:
    """The flags of val.py."""

    weights: str = flag(
        "", ".pt or exported; several: an ensemble; the newest run's best.pt if left out", section="model and data", metavar="FILE",
        nargs="+",
    )  # fmt: skip
    others: tuple[str, ...] = ()  # more weights, whose predictions join those of the first: an ensemble
    download: bool = flag(False, "fetch published weights that are not on disk")
    data: str = flag("", "data set; what the checkpoint says if left out", metavar="YAML")
    task: str = flag(
        "val", "train, val or test: the split; speed: milliseconds per image; study: mAP and speed over sizes", metavar="TASK",
        choices=(*SPLITS, *STUDIES),
    )  # fmt: skip
    study_sizes: tuple[int, ...] = flag(STUDY_SIZES, "sizes of --task study", metavar="PX", least=32, most=MAX_SIDE_PX)
    single_cls: bool = flag(False, "all classes are one")
    min_items: int = flag(0, "leave out images with fewer objects", least=0)
    plugins: tuple[str, ...] = flag((), "Python files of yours that register modules", metavar="FILE")
    trust: bool = flag(False, "run the code of an exported file of yours unread: it may do anything")

    batch_size: int = flag(32, "images per batch", section="inference", least=1)
    imgsz: int | None = flag(
        None, "longer side of the input (default: 640, 224 to classify)", aliases=("--img", "--img-size"), metavar="PX", nargs="+", least=1,
        most=MAX_SIDE_PX,
    )  # fmt: skip
    conf_thres: float | None = flag(None, "lowest score (default: 0.001, 0 to classify)", least=0, most=1)
    iou_thres: float = flag(0.7, "suppression: overlap above which the box of lower score is dropped", least=0, most=1)
    max_det: int = flag(300, "most detections per image", least=1)
    nms: bool = flag(False, "models with a one-to-one branch (YOLOv10, YOLO26): their one-to-many branch and suppression instead")
    augment: bool = flag(False, "test-time augmentation: also smaller and mirrored versions of each image")
    slice: tuple[int, ...] | None = slice_flag()
    slice_overlap: float = slice_overlap_flag()
    device: str = flag("", "cpu, 0 ...; a GPU where there is one", metavar="D", may_be_empty=True)
    workers: int = flag(8, "loader processes", least=0, most=MAX_WORKERS)
    half: bool = flag(False, "float16 on a GPU")

    ap_rule: str = flag(
        "coco", "coco (equal to pycocotools), yolov5 (as YOLOv5, v7 and v9 print it) or ultralytics", section="results", metavar="RULE",
        choices=get_args(Rule),
    )  # fmt: skip
    verbose: bool = flag(False, "a row for each class, however many there are")
    save_txt: bool = flag(False, "detections as label files")
    save_conf: bool = flag(False, "with the score as last column")
    save_hybrid: bool = flag(False, "label files of the objects and the detections that match none of them")
    save_json: bool = flag(False, "detections for pycocotools, which runs where COCO annotations are there; of oriented boxes for DOTA")
    plots: tuple[str, ...] = flag(
        (), "every curve and matrix in this format too, beside its .png", metavar="FORMAT", choices=FIGURE_FORMATS
    )
    project: str = flag("runs/val", "folder of runs", metavar="DIR")
    name: str = flag("exp", "run folder in it", fault=folder_name_fault)
    exist_ok: bool = flag(False, "write into an existing run folder")

    def __post_init__(self) -> None:
        validate_flags(self)
        if self.slice is not None:
            object.__setattr__(self, "slice", height_and_width(self.slice, flag="--slice"))
        if (self.save_conf or self.save_hybrid) and not self.save_txt:  # both say how label files look
            object.__setattr__(self, "save_txt", True)

    @property
    def all_weights(self) -> tuple[str, ...]:
        """Every file of weights, the first one first; empty where none was given."""
        return (self.weights, *self.others) if self.weights else ()


COMMAND = Command(
    ValConfig,
    prog="val.py",
    description="Validates a detector.",
    refused={
        "--dnn": "not here; .onnx files run with onnxruntime, leave it out",
        "--v5-metric": "not here; write --ap-rule yolov5",
        "--no-trace": "not here; nothing is traced, leave it out",
    },
)


def parse_arguments(argv: Sequence[str] | None = None) -> ValConfig:
    """Reads the command line; only flags that were given are set, the rest are ValConfig's defaults.

    Raises:
        UserError: a flag that is refused by name, or a value that is out of range.
    """
    given = COMMAND.read(argv)
    check_slice_flags(given)
    weights, sides = given.pop("weights", ()), given.pop("imgsz", ())
    if len(set(sides)) > 1:
        raise UserError(f"--imgsz {' '.join(map(str, sides))}: validation takes one side; rectangular batches follow the images")
    files = {"weights": weights[0], "others": weights[1:]} if weights else {}
    return ValConfig(**given, **files, **({"imgsz": sides[0]} if sides else {}))
