"""The command line of train.py: flags as YOLO users type them, to a TrainConfig."""

from __future__ import annotations

from collections.abc import Sequence

from utils.cli.command import Command
from utils.config import TrainConfig
from utils.errors import UserError

COMMAND = Command(
    TrainConfig,
    prog="train.py",
    description="Trains a detector. Without flags: a few minutes on the embedded data set.",
    refused={
        "--quad": "not here; give a larger --imgsz or --batch-size",
        "--bucket": "not here; copy the run folder afterwards",
        "--upload_dataset": "not here; nothing is uploaded",
        "--bbox_interval": "not here; images are train_batch*.jpg and val_batch*.jpg",
        "--entity": "not here; --logger wandb takes it from the variable WANDB_ENTITY",
        "--v5-metric": "not a flag of training; use val.py --ap-rule yolov5",
    },
    ignored={
        "--linear-lr": 0,  # YOLOv7's: the default here
        "--local_rank": 1,  # torchrun sets it in the environment
        "--local-rank": 1,
    },
)


def parse_arguments(argv: Sequence[str] | None = None) -> TrainConfig:
    """Reads the command line; only flags that were given are set, the rest are TrainConfig's defaults.

    Raises:
        UserError: a flag that is refused by name, or a value that is out of range.
    """
    given = COMMAND.read(argv)
    empty = [f"--{name} ''" for name in ("cfg", "weights") if given.get(name) == ""]
    if empty and not (given.get("cfg") or given.get("weights") or given.get("resume")):
        raise UserError(f"{' '.join(empty)}: nothing says what to train; give --cfg (from scratch) or --weights, or leave both out")
    sides = given.pop("imgsz", ())
    if len(sides) > 2:
        raise UserError(f"--imgsz {' '.join(map(str, sides))}: one side, or one for training and one for validation, are needed")
    if sides:
        given["imgsz"] = sides[0]
        given["val_imgsz"] = sides[1] if len(sides) == 2 and sides[1] != sides[0] else None
    return TrainConfig(**given, given=tuple(given))
