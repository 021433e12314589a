"""The hyper-parameter file of a model's family, used when none is given."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError, nearest_file
from utils.files import replacement


class Family(NamedTuple):
    """Recipes of the models whose YAML's name holds ``part``: gains of the two kinds of head differ a hundredfold, so each has its own.

    ``{scale}`` in a recipe's name is the letter of the model's scale.
    """

    part: str
    anchors: str
    no_anchors: str


PUBLISHED_FOLDERS = ("data", "data/hyps", "hyps")
GAIN_BORDER = 1.0  # box gains of heads with anchors lie far below it, those of the others far above
SIZES = "nsmlx"  # scales that have recipes of their own
SMALLEST = "n"  # scale of a model that names none
# Published pairings; the first that fits counts. YOLOv5u, v10 and 11 are trained as YOLOv8, v13 as 12, YOLOv7-AF as YOLOv9.
FAMILIES = (
    *(Family(name, "scratch-low", "rtdetr") for name in ("rtdetr", "rt-detr")),
    Family("v10", "scratch-low", "v8"),
    *(Family(f"yolo{v}11", "scratch-low", "v8") for v in ("", "v")),
    *(Family(f"yolo{v}{number}", "scratch-low", "v12{scale}") for v in ("", "v") for number in (12, 13)),
    *(Family(f"yolo{v}26", "scratch-low", "v26{scale}") for v in ("", "v")),
    Family("v5", "scratch-low", "v8"),
    Family("v7-tiny", "scratch.tiny", "scratch-high"),
    *(Family(f"v7-{size}", "scratch.p6", "scratch-high") for size in ("w6", "e6", "d6")),
    Family("v7", "scratch.p5", "scratch-high"),
    Family("v8", "scratch-low", "v8"),
    Family("v9", "scratch-low", "scratch-high"),
    Family("gelan", "scratch-low", "scratch-high"),
)


def family_hyp(cfg_name: str, dialect: str, anchor_based: bool, *, scale: str = "") -> str:
    """The hyp file of the family that the name of a model YAML belongs to, or else of its dialect and head.

    Args:
        scale: letter of the model's scale, empty for none.
    """
    other = Family("", "scratch-low", "v8" if dialect == "v8" else "scratch-high")
    family = next((f for f in FAMILIES if f.part in cfg_name.lower()), other)
    recipe = family.anchors if anchor_based else family.no_anchors
    return f"hyp.{recipe.format(scale=scale if scale in tuple(SIZES) else SMALLEST)}.yaml"


def gains_warning(box: float, anchor_based: bool) -> str:
    """A warning where the box gain suits the other kind of head (published are 0.05 with anchors and 7.5 without), else empty."""
    if anchor_based != (box > GAIN_BORDER):
        return ""
    kind, other = ("anchors", "no anchors") if anchor_based else ("no anchors", "anchors")
    usual = "0.05" if anchor_based else "7.5"
    return f"warning: box gain {box:g} is that of heads with {other}; this head has {kind}, for which {usual} is usual (--hyp)"


def find_hyp(name: str | Path, folder: Path) -> Path:
    """The path as given, or the file of that name in ``folder`` where the path does not exist, which is printed unless it is a bare name.

    Raises:
        UserError: no such file; or the path's folder does not exist, and is not one in which published projects keep their recipes.
    """
    path, beside = Path(name), folder / Path(name).name
    if path.exists():
        return path
    if not beside.is_file():
        raise UserError(f"{name}: no such file, here or in {folder}; {nearest_file(path, folder)}")
    if in_place := replacement(path, beside, published=PUBLISHED_FOLDERS):
        print(in_place)
    return beside
