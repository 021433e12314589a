"""The command line of train.py: flags as YOLO users type them, to a TrainConfig."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from utils.cli.flags import add_noted_flags
from utils.config import TrainConfig
from utils.errors import UserError

# Flags of other YOLOs that this project does not have, and what to write instead.
REFUSED = {
    "--quad": "is not here: give a larger --imgsz or --batch-size",
    "--bucket": "is not here: copy the run folder afterwards",
    "--upload_dataset": "is not here: nothing is uploaded",
    "--bbox_interval": "is not here: images are train_batch*.jpg and val_batch*.jpg",
    "--entity": "is not here: --logger wandb goes where the variable WANDB_ENTITY says",
    "--v5-metric": "is no flag of training: use val.py --ap-rule yolov5",
}
NEWEST = "newest"
GENERATIONS = 300  # of --evolve without a number


def parse_arguments(argv: Sequence[str] | None = None) -> TrainConfig:
    """Reads the command line; only flags that were given are set, the rest are TrainConfig's defaults.

    Raises:
        UserError: a flag that is refused by name, or a value that is out of range.
    """
    given = vars(build_parser().parse_args(argv))
    for flag in given.pop("refused", ()):
        raise UserError(f"{flag} {REFUSED[flag]}")
    if given.pop("notest", False):
        given["noval"] = True
    if given.pop("adam", False):
        given.setdefault("optimizer", "Adam")
    given.pop("linear_lr", None)  # v7: the default here
    given.pop("local_rank", None)  # torchrun says it in the environment
    sides = given.pop("imgsz", [])
    if len(sides) > 2:
        raise UserError(f"--imgsz {' '.join(map(str, sides))}: one side, or one for training and one for validation, are needed")
    if sides:
        given["imgsz"] = sides[0]
        given["val_imgsz"] = sides[1] if len(sides) == 2 and sides[1] != sides[0] else None
    return TrainConfig(**given, given=tuple(given))


def build_parser() -> argparse.ArgumentParser:
    """Prefixes are accepted, as everywhere in argparse: --batch, --img, --opt."""
    defaults = TrainConfig()
    parser = argparse.ArgumentParser(
        prog="train.py",
        argument_default=argparse.SUPPRESS,
        description="Trains a detector. Without arguments: a few minutes on the embedded set.",
    )
    for group, flags in _flags().items():
        section = parser.add_argument_group(group)
        for names, options, text in flags:
            default = getattr(defaults, names[0].lstrip("-").replace("-", "_"), None)
            shown = "" if default in (None, "", False, ()) else f" (default {default})"
            section.add_argument(*names, help=text + shown, **options)
    add_noted_flags(parser, REFUSED, dest="refused")
    return parser


def _flags() -> dict[str, list[tuple[list[str], dict[str, Any], str]]]:
    """Group -> (names, argparse options, help)."""
    on: dict[str, Any] = {"action": "store_true"}
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    side = {"type": int, "nargs": "+", "metavar": "PX"}
    hidden = argparse.SUPPRESS
    return {
        "what": [
            (["--cfg"], {"metavar": "YAML"}, "model, such as yolov9-c-FocalModulation.yaml; alone it trains from scratch"),
            (["--weights"], {"metavar": "PT"}, "checkpoint; alone it gives the architecture too, with --cfg what fits is transferred"),
            (["--download"], on, "fetch published weights that are not on disk"),
            (["--attention"], {"nargs": "+", "metavar": "SPEC"}, "insert same-width modules: FocalModulation@9, EMA@detect, ..."),
            (["--attention-init"], {"metavar": "HOW"}, "identity: inserted modules start as exact no-ops"),
            (["--backbone-weights"], {"metavar": "FILE"}, "published FocalNet, BiFormer or CloFormer weights for the backbone"),
            (["--weights-report"], {"metavar": "FILE"}, "write what became of the weights, row by row, as .md, .csv or .json"),
            (["--data"], {"metavar": "YAML"}, "data set; the embedded one if left out"),
            (["--hyp"], {"metavar": "YAML"}, "hyper-parameters; the recipe of the model's family if left out"),
            (["--plugins"], {"nargs": "+", "metavar": "FILE"}, "Python files of yours that register modules"),
            (["--resume"], {"nargs": "?", "const": NEWEST, "metavar": "PT"}, "resume with this last.pt, or with the newest run"),
        ],
        "how long, how large": [
            (["--epochs"], number, "epochs"),
            (["--batch-size"], number, "images a step over all processes; -1 finds the largest that fits"),
            (["--accumulate"], number, "steps whose gradients are summed; nominal batch / batch size if left out"),
            (["--imgsz", "--img", "--img-size"], side, "side of the square input; a second one is for validation"),
            (["--multi-scale"], on, "vary the input's side by half around --imgsz"),
            (["--rect"], on, "rectangular batches, no mosaic"),
            (["--evolve"], {**number, "nargs": "?", "const": GENERATIONS}, f"search hyper-parameters by N ({GENERATIONS}) trainings"),
            (["--patience"], number, "stop after so many epochs without progress; 0 = never"),
        ],
        "optimisation": [
            (["--optimizer"], {"metavar": "NAME"}, "SGD, Adam, AdamW or LION"),
            (["--adam"], on, hidden),
            (["--cos-lr"], on, "cosine schedule instead of a linear one"),
            (["--flat-cos-lr"], on, "flat first half, then a cosine"),
            (["--fixed-lr"], on, "constant after warm-up"),
            (["--linear-lr"], on, hidden),
            (["--label-smoothing"], {"type": float, "metavar": "X"}, "takes the place of the hyp file's"),
            (["--close-mosaic"], number, "last epochs without mosaic and mixup; takes the place of the hyp file's"),
            (["--freeze"], {"nargs": "+", "metavar": "N"}, "the first N layers, these, or what came in (pretrained) stay fixed"),
            (["--lr-mult"], {"metavar": "PART=X,..."}, "learning rates by part: attention=2,backbone=0.1 (also neck, head, rows)"),
            (["--amp"], {"metavar": "TYPE"}, "auto, off, fp16 or bf16"),
            (["--compile"], on, "torch.compile"),
            (["--checkpoint-activations"], {"nargs": "?", "const": "attention", "metavar": "OF"},
             "less memory, more time: attention (if nothing is said) or all rows are computed again in the backward pass"),
            (["--sync-bn"], on, "batch statistics over the images of all processes (GPUs)"),
            (["--deterministic"], on, "deterministic kernels"),
            (["--nan-patience"], number, "stop after N steps in a row whose loss is not finite (no such step changes a weight); 0 = never"),
            (["--skip-nan"], on, "skip any number of such steps"),
            (["--seed"], number, "seed"),
        ],
        "data": [
            (["--workers"], number, "loader processes"),
            (["--cache", "--cache-images"], {"nargs": "?", "const": "ram", "metavar": "WHERE"}, "keep images in ram or on disk"),
            (["--single-cls"], on, "all classes are one"),
            (["--image-weights", "--image_weights"], on, "draw images of rare and badly found classes more often"),
            (["--min-items"], number, "leave out images with fewer objects"),
            (["--noautoanchor"], on, "keep the YAML's anchors"),
        ],
        "where, and what is kept": [
            (["--device"], {"metavar": "D"}, "cpu, 0, 0,1 ...; a GPU where there is one"),
            (["--project"], {"metavar": "DIR"}, "folder of runs"),
            (["--name"], {}, "run folder in it"),
            (["--exist-ok"], on, "write into an existing run folder"),
            (["--save-period", "--save_period"], number, "keep a checkpoint every N epochs"),
            (["--save-steps"], number, "save within epochs too, every N optimizer steps; 0 = only at their ends"),
            (["--nosave"], on, "save only at the end"),
            (["--noval"], on, "validate only at the end"),
            (["--notest"], on, hidden),
            (["--noplots"], on, "no images"),
            (["--logger"], {"nargs": "+", "metavar": "NAME"}, "mlflow, wandb or both, beside results.csv and TensorBoard"),
            (["--local_rank", "--local-rank"], number, hidden),
        ],
    }  # fmt: skip
