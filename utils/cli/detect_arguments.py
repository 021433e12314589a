"""The command line of detect.py: flags as YOLO users type them, to a DetectConfig."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from utils.cli.command import Command
from utils.cli.flags import flag, validate_flags
from utils.cli.sizes import check_slice_flags, height_and_width, slice_flag, slice_overlap_flag
from utils.reading.text_files import folder_name_fault
from utils.sizes import MAX_SIDE_PX

MAX_LINE_PX = 1000
TRACKERS = {"bytetrack": "ByteTrackTracker", "sort": "SORTTracker", "ocsort": "OCSORTTracker"}  # --track -> class of the package trackers
SOURCE_HELP = (
    "file, folder, glob, .txt list, video, URL (rtsp, rtmp, http), .streams list, 0 for a webcam, "
    "'screen [N] [LEFT TOP WIDTH HEIGHT]' (default: the validation images)"
)


@dataclass(frozen=True)
class DetectConfig:
    """The flags of detect.py."""

    weights: str = flag(
        "", ".pt or exported; several: an ensemble (default: the newest run's best.pt)", section="model and source", metavar="FILE",
        nargs="*",
    )  # fmt: skip
    others: tuple[str, ...] = ()  # more weights, whose predictions join those of the first: an ensemble
    download: bool = flag(False, "fetch published weights that are not on disk")
    source: str = flag("", SOURCE_HELP, metavar="WHAT")
    data: str = flag(
        "", "data set whose validation images are taken without --source (default: the checkpoint's, or the embedded one)", metavar="YAML"
    )
    plugins: tuple[str, ...] = flag((), "Python files of yours whose modules the model uses", metavar="FILE")
    trust: bool = flag(False, "run the code of an exported file of yours unread: it may do anything")

    imgsz: tuple[int, ...] | None = flag(
        None, "side, or height and width, of the input in px (default: 640, 224 to classify, or what an exported file was made for)",
        section="inference",
        aliases=("--img", "--img-size"), least=1, most=MAX_SIDE_PX,
    )  # fmt: skip
    conf_thres: float | None = flag(None, "lowest score (default: 0.25, 0 to classify)", least=0, most=1)
    iou_thres: float = flag(0.45, "suppression: overlap above which the box of lower score is dropped", least=0, most=1)
    max_det: int = flag(1000, "most detections per image", least=1)
    classes: tuple[int, ...] | None = flag(None, "keep only these classes")
    agnostic_nms: bool = flag(False, "boxes of different classes also suppress one another")
    nms: bool = flag(False, "models with a one-to-one branch (YOLOv10, YOLO26): their one-to-many branch and suppression instead")
    augment: bool = flag(False, "test-time augmentation: also smaller and mirrored versions of each image")
    slice: tuple[int, ...] | None = slice_flag()
    slice_overlap: float = slice_overlap_flag()
    track: str = flag(
        "", "follow objects through a video, stream or folder of images: numbers on them, tracks/*.csv in MOT's format; needs the package "
        "trackers", metavar="TRACKER", const="bytetrack", choices=tuple(TRACKERS),
    )  # fmt: skip
    vid_stride: int = flag(1, "take every N-th frame of a video or stream", least=1)
    device: str = flag("", "cpu, 0 ...; a GPU where there is one", metavar="D", may_be_empty=True)
    half: bool = flag(False, "float16, on a GPU")

    project: str = flag("runs/detect", "folder of runs", section="results", metavar="DIR")
    name: str = flag("exp", "run folder in it", fault=folder_name_fault)
    exist_ok: bool = flag(False, "write into an existing run folder")
    nosave: bool = flag(False, "no images and videos")
    save_txt: bool = flag(False, "labels/*.txt")
    save_conf: bool = flag(False, "a column of scores in them")
    save_csv: bool = flag(False, "predictions.csv")
    save_json: bool = flag(False, "predictions.json: COCO's results format, with run-length codes, keypoints or corners")
    save_crop: bool = flag(False, "crops/<class>/*.jpg")
    visualize: bool = flag(False, "feature maps of every layer")
    view_img: bool = flag(False, "show images in a window")
    line_thickness: int = flag(3, "of boxes, px", least=1, most=MAX_LINE_PX)
    hide_labels: bool = flag(False, "boxes without names")
    hide_conf: bool = flag(False, "names without scores")

    def __post_init__(self) -> None:
        validate_flags(self)
        if self.imgsz is not None:
            object.__setattr__(self, "imgsz", height_and_width(self.imgsz))
        if self.slice is not None:
            object.__setattr__(self, "slice", height_and_width(self.slice, flag="--slice"))
        if self.save_conf and not self.save_txt:  # it says how label files look
            object.__setattr__(self, "save_txt", True)


COMMAND = Command(
    DetectConfig,
    prog="detect.py",
    description="Detects objects in images and videos.",
    refused={
        "--dnn": "OpenCV's DNN module is not used; leave it out, .onnx files are run by onnxruntime",
        "--update": "checkpoints need no update; leave it out",
        "--no-trace": "nothing is traced here; leave it out (export.py writes TorchScript)",
        "--agnostic": "write --agnostic-nms",
        "--task": "the weights say what they find; leave it out",
    },
    accepted={"--retina-masks": "has no effect: masks, where a network has them, always have the resolution of the original image"},
)


def parse_arguments(argv: Sequence[str] | None = None) -> DetectConfig:
    """Reads the command line; prefixes such as ``--img``, ``--conf`` and ``--iou`` are accepted.

    Raises:
        UserError: a flag that is refused by name, or an unusable value.
    """
    given = COMMAND.read(argv)
    check_slice_flags(given)
    weights = given.pop("weights", ())
    return DetectConfig(**given, weights="".join(weights[:1]), others=weights[1:])
