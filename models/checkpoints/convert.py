"""A checkpoint in another form: deployed, in half precision, without training state, as safetensors.

    python -m models.convert best.pt --deploy
    python -m models.convert yolov9-c.pt --deploy --half --to-safetensors --out yolov9-c.safetensors

The new file is written under a hidden name, read back, and compared with the old one on random and real images; only then does it get
its name. Where the outputs do not agree, nothing is left.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from models.analysis.equivalence import FOLDED, HALVED, SIDE_PX, Difference, Tolerance, difference, read_images
from models.analysis.tolerance import check_tolerance
from models.checkpoints.checkpoint import Checkpoint, load_checkpoint, model_from_checkpoint, save_checkpoint
from models.checkpoints.safetensors_writer import write_safetensors
from models.checkpoints.sound_weights import check_weights
from models.model import Model
from utils.cli.parser import OneLineParser
from utils.cli.script import run_script
from utils.errors import UserError
from utils.files import atomic_write

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MOST_IMAGES = 8  # of a folder
KEPT_FLOAT = ("anchors", "anchor_grid")  # of an anchor-based head: sizes in px, not weights


class Conversion(NamedTuple):
    """What was written."""

    path: Path
    difference: Difference
    parameters: tuple[int, int]  # before, after
    bytes: tuple[int, int]

    def __str__(self) -> str:
        (before, after), (old, new) = self.parameters, self.bytes
        return (
            f"{self.path}: {before / 1e6:.2f} M parameters to {after / 1e6:.2f} M, {old / 1e6:.1f} MB to {new / 1e6:.1f} MB\n"
            f"checked: {self.difference}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = OneLineParser(prog="python -m models.convert", description="Writes a checkpoint in another form, checked.")
    parser.add_argument("source", help="checkpoint: this project's, YOLOv5's, v7's, v9's, ultralytics', or .safetensors")
    parser.add_argument("--deploy", action="store_true", help="drop auxiliary branches, fold batch norms and re-parameterised branches")
    parser.add_argument("--half", action="store_true", help="store weights in float16")
    parser.add_argument("--to-safetensors", action="store_true", help="write .safetensors, with the YAML and class names in its notes")
    parser.add_argument("--strip-optimizer", action="store_true", help="leave out what only a resume needs")
    parser.add_argument("--out", metavar="FILE", help="beside the source if left out, called after what was done")
    parser.add_argument("--images", nargs="+", default=[], metavar="PATH", help="real images or folders of them to check on")
    parser.add_argument("--plugins", nargs="*", default=[], metavar="FILE", help="Python files with blocks of your own")
    parser.add_argument(
        "--tolerance", nargs=2, type=float, metavar=("PX", "SCORE"), help="differences of boxes and scores that are allowed"
    )
    args = vars(parser.parse_args(argv))
    return run_script("models.convert", lambda: print(convert(args.pop("source"), **args)))


def convert(
    source: str | Path,
    *,
    deploy: bool = False,
    half: bool = False,
    to_safetensors: bool = False,
    strip_optimizer: bool = False,
    out: str | Path | None = None,
    images: Sequence[str | Path] = (),
    plugins: Sequence[str | Path] = (),
    tolerance: Sequence[float] | None = None,
) -> Conversion:
    """Writes ``source`` in another form and checks it.

    Args:
        out: file to write; beside the source and called after what was done if not given.
        images: images or folders; a drawn one if none is given.
        plugins: Python files of the caller's whose blocks the network uses.
        tolerance: allowed differences of boxes in px and of scores, instead of those of the conversion; raw maps are not compared then.

    Raises:
        UserError: nothing to do, the source cannot be read, the outputs differ, or the disk is full; no file is left then.
    """
    allowed = _tolerance(tolerance, half=half)
    source = Path(source)
    target = _target(source, out, {"deploy": deploy, "half": half, "stripped": strip_optimizer}, to_safetensors)
    checkpoint = load_checkpoint(source)
    model = model_from_checkpoint(checkpoint, plugins=plugins, source=source)
    side_px = _compared_side(checkpoint)
    inputs = read_images(model, _files(images), side_px=side_px)
    converted = _converted(checkpoint, model.deploy() if deploy else model, half=half, strip=deploy or half or strip_optimizer)
    check_weights(converted.weights, f"{target}: not written")  # float16 may overflow
    try:
        with atomic_write(target) as partial:
            _write(partial, converted, safetensors=to_safetensors)
            after = model_from_checkpoint(load_checkpoint(partial), source=target)
            found = difference(model, after, inputs=inputs, allowed=allowed, side_px=side_px)
            if not found.holds:
                remedy = "models.convert --tolerance PX SCORE allows more"
                raise UserError(f"{target}: not written, the outputs are not those of {source}: {found}; {remedy}")
            sizes = source.stat().st_size, partial.stat().st_size
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error
    return Conversion(target, found, (_parameters(model), _parameters(after)), sizes)


def _compared_side(checkpoint: Checkpoint) -> int:
    """The side of the images that are compared in px: that of the training, where it was smaller than usual."""
    trained = checkpoint.config.get("imgsz")
    return min(trained, SIDE_PX) if isinstance(trained, int) and trained > 0 else SIDE_PX


def _tolerance(given: Sequence[float] | None, *, half: bool) -> Tolerance:
    usual = HALVED if half else FOLDED
    if given is None:
        return usual
    boxes_px, scores = check_tolerance(given)
    return Tolerance(math.inf, boxes_px, scores, mean=usual.mean)


def _converted(checkpoint: Checkpoint, model: Model, *, half: bool, strip: bool) -> Checkpoint:
    """The checkpoint with the network as it is now, as one of this project's own."""
    own: dict[str, Any] = {f.name: getattr(checkpoint, f.name) for f in fields(Checkpoint)}
    weights = {name: _halved(name, value) if half else value for name, value in model.state_dict().items()}
    own |= {"names": checkpoint.names or model.names, "weights": weights}
    if model.spec.fused:
        own["cfg"] = model.spec.to_dict()
    if strip:
        own["training"] = None
    return Checkpoint(**own)


def _halved(name: str, value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() and not name.endswith(KEPT_FLOAT) else value


def _write(path: Path, checkpoint: Checkpoint, *, safetensors: bool) -> None:
    if not safetensors:
        return save_checkpoint(path, checkpoint)
    notes = {"format": "pt", "cfg": json.dumps(checkpoint.cfg), "cfg_name": checkpoint.cfg_name, "names": json.dumps(checkpoint.names)}
    return write_safetensors(path, checkpoint.weights, notes)


def _target(source: Path, out: str | Path | None, done: dict[str, bool], to_safetensors: bool) -> Path:
    suffix = ".safetensors" if to_safetensors else ".pt"
    words = [word for word, is_done in done.items() if is_done]
    if out is None and not (words or to_safetensors):
        raise UserError(f"{source}: nothing to do; give --deploy, --half, --to-safetensors or --strip-optimizer, or --out for a copy")
    if out is None:
        return source.with_name("-".join((source.stem, *words)) + suffix)
    target = Path(out)
    if to_safetensors != (target.suffix == ".safetensors"):
        raise UserError(f"--out {target}: .safetensors and --to-safetensors belong together")
    if not target.parent.is_dir():
        raise UserError(f"--out {target}: there is no folder {target.parent}")
    return target


def _files(images: Sequence[str | Path]) -> list[Path]:
    """The given files, and the first images of the given folders."""
    files: list[Path] = []
    for path in map(Path, images):
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)[:MOST_IMAGES] if path.is_dir() else [path]
        if not inside:
            raise UserError(f"--images {path}: a folder without images")
        files += inside
    return files


def _parameters(model: Model) -> int:
    return sum(p.numel() for p in model.parameters())
