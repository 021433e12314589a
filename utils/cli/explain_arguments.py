"""The command line of explain.py, to an ExplainConfig."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from utils.cli.command import Command
from utils.cli.flags import flag, flags_of, validate_flags
from utils.cli.sizes import height_and_width
from utils.errors import UserError
from utils.reading.text_files import folder_name_fault
from utils.sizes import MAX_SIDE_PX, MAX_WORKERS

METHODS = ("layercam", "gradcam", "gradcam++", "hirescam", "eigencam")
QUANTITIES = ("score", "box", "both")
LARGEST_ROW = 10_000
ABOUT_IMAGES = (  # without one of these --errors stands alone
    "source", "compare", "method", "rows", "target", "classes", "of", "query", "modules", "receptive_field", "faithfulness", "sanity",
)  # fmt: skip


@dataclass(frozen=True)
class ExplainConfig:
    """The flags of explain.py."""

    weights: str = flag("", "checkpoint (default: the newest run's best.pt)", section="model and source", metavar="PT")
    compare: str = flag("", "a second checkpoint, explained beside the first: same image, same object", metavar="PT")
    download: bool = flag(False, "fetch published weights that are not on disk")
    source: str = flag("", "file, folder, glob, .txt list, video or URL (default: the first validation images)", metavar="WHAT")
    data: str = flag("", "data set, for --errors and without --source (default: the checkpoint's)", metavar="YAML")
    vid_stride: int = flag(1, "take every N-th frame of a video", least=1)
    plugins: tuple[str, ...] = flag((), "Python files of yours whose modules the model uses", metavar="FILE")

    imgsz: tuple[int, ...] | None = flag(
        None, "side, or height and width, of the input in px (default: 640, 224 to classify)", section="detections",
        aliases=("--img", "--img-size"), metavar="PX", least=1, most=MAX_SIDE_PX,
    )  # fmt: skip
    conf_thres: float | None = flag(None, "lowest score (default: 0.25, 0 to classify)", least=0, most=1)
    iou_thres: float | None = flag(
        None, "suppression: overlap above which the box of lower score is dropped (default: 0.45, 0.7 for --errors)", least=0, most=1
    )  # fmt: skip
    max_det: int = flag(300, "most detections per image", least=1)
    device: str = flag("", "cpu, 0 ...; a GPU where there is one", metavar="D", may_be_empty=True)

    method: tuple[str, ...] = flag(("layercam",), "class activation maps", section="what is explained", metavar="NAME", choices=METHODS)
    rows: tuple[int, ...] | None = flag(
        None, "rows that maps are made of; -1 is the one before the head (default: those that the head reads)", metavar="ROW",
        least=-LARGEST_ROW, most=LARGEST_ROW,
    )  # fmt: skip
    target: tuple[int, ...] | None = flag(
        None, "detections, numbered from 0, best score first (default: all; to classify the first)", metavar="N", least=0
    )
    classes: tuple[int, ...] | None = flag(None, "only detections of these classes", metavar="N", least=0)
    of: str = flag("score", "what of them: score, box (its width and height), or both", metavar="WHAT", choices=QUANTITIES)
    query: tuple[int, ...] | None = flag(
        None, "place whose attention is shown, in px of the image (default: the middle of the first detection; to classify, of the "
        "image)", metavar="PX", least=0,
    )  # fmt: skip
    modules: tuple[int, ...] | None = flag(None, "rows whose attention modules are shown (default: all)", metavar="ROW", least=0)
    no_cam: bool = flag(False, "no class activation maps")
    no_modules: bool = flag(False, "no attention modules")

    receptive_field: bool = flag(False, "effective and theoretical receptive fields of the rows", section="further figures")
    faithfulness: bool = flag(False, "area under the deletion and the insertion curve of each map")
    sanity: bool = flag(False, "the same maps of the network with random weights")
    errors: bool = flag(False, "panels of errors on --data: what kinds, what each costs, the most confident first")
    panels: int = flag(24, "most panels of each kind of error", least=1, most=400)
    batch_size: int = flag(8, "images per batch of --errors", least=1)
    workers: int = flag(0, "loader processes of --errors", least=0, most=MAX_WORKERS)

    project: str = flag("runs/explain", "folder of runs", section="results", metavar="DIR")
    name: str = flag("exp", "run folder in it", fault=folder_name_fault)
    exist_ok: bool = flag(False, "write into an existing run folder")

    def __post_init__(self) -> None:
        validate_flags(self)
        if self.imgsz is not None:
            object.__setattr__(self, "imgsz", height_and_width(self.imgsz))
        if self.query is not None and len(self.query) != 2:
            raise UserError(f"--query {' '.join(map(str, self.query))}: x and y in px of the image are needed")
        if self.no_cam and (self.faithfulness or self.sanity or self.compare):
            raise UserError("--no-cam: --faithfulness, --sanity and --compare are about class activation maps; leave one out")
        if self.no_cam and self.no_modules and self.explains_images and not self.receptive_field:
            raise UserError("--no-cam --no-modules: leave nothing to draw; leave one out")
        if self.errors and self.imgsz is not None and self.imgsz[0] != self.imgsz[1]:
            sides = " ".join(map(str, self.imgsz))
            raise UserError(f"--imgsz {sides}: --errors fits the longer side of every image into one side, as val.py does; give one number")

    @property
    def explains_images(self) -> bool:
        """Whether single images are explained: with ``--errors`` only where a flag asks for something about them."""
        return not self.errors or any(getattr(self, f.name) != f.default for f in flags_of(ExplainConfig) if f.name in ABOUT_IMAGES)


COMMAND = Command(
    ExplainConfig,
    prog="explain.py",
    description="Shows what a network looks at.",
    refused={
        "--cam": f"write --method, and one or more of {', '.join(METHODS)}",
        "--layer": "write --rows, such as --rows 15 18 21",
    },
)


def parse_arguments(argv: Sequence[str] | None = None) -> ExplainConfig:
    """Reads the command line.

    Raises:
        UserError: a flag that is refused by name, or an unusable value.
    """
    return ExplainConfig(**COMMAND.read(argv))
