"""The command line of study.py: flags, and the keys of a study file, to a StudyConfig."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.cli.command import Command
from utils.cli.flags import flag, flags_of, spelling_of, validate_flags
from utils.errors import UserError, nearest
from utils.reading.text_files import folder_name_fault
from utils.reading.yaml_text import parse_yaml, read_yaml, shown
from utils.sizes import MAX_SIDE_PX, MAX_WORKERS

FILE_ONLY = ("variants", "early_stop")  # keys of a study file that no flag has
NOT_IN_FILE = ("study", "retry", "report")
PAIRS = ("hyp_change", "train")  # KEY=VALUE on the command line, a mapping in a file
WEIGHTS = ("last", "best")


def _name_fault(text: str) -> str:
    return folder_name_fault(text) if text else ""


@dataclass(frozen=True)
class StudyConfig:
    """The flags of study.py; what a study file gives and what the command line gives, which takes precedence."""

    study: str = flag("", "study file; flags take the place of its keys", section="variants", metavar="STUDY.yaml", positional=True)
    cfg: tuple[str, ...] = flag((), "model YAMLs", metavar="YAML")
    weights: tuple[str, ...] = flag((), "initial weights; none: from scratch", metavar="PT")
    attention: tuple[str, ...] = flag((), "insertions: none SE@9 'CBAM@4,6' SE@9+EMA@detect", metavar="SPEC")
    attention_init: str = flag("", "identity: inserted modules start as exact no-ops", metavar="HOW", choices=("identity",))
    replace: tuple[str, ...] = flag((), "replacements: none C2f=C2f_EMA@6,8", metavar="SPEC")
    hyp: tuple[str, ...] = flag((), "hyper-parameter files; the recipe of the model's family if left out", metavar="YAML")
    hyp_change: tuple[str, ...] = flag((), "values of hyper-parameters: iou_loss=CIoU,SIoU", metavar="KEY=X,Y")
    imgsz: tuple[int, ...] = flag(
        (640,), "sides of the square input", aliases=("--img", "--img-size"), metavar="PX", least=32, most=MAX_SIDE_PX
    )  # fmt: skip
    control: str = flag(
        "", "add convolution blocks of as many params or flops as the modules have, each a variant", metavar="KIND",
        choices=("params", "flops"),
    )  # fmt: skip
    baseline: str = flag(
        "", "variant that the others are compared with; the first, or the study's in a report, if left out", metavar="VARIANT"
    )  # fmt: skip

    data: tuple[str, ...] = flag((), "data sets; a study of each", section="training", metavar="YAML")
    seeds: tuple[int, ...] = flag((0, 1, 2), "seeds, the same for every variant", metavar="N", least=0, most=2**32 - 1)
    epochs: int = flag(100, "epochs", least=1)
    batch_size: int = flag(16, "images per step", least=1)
    workers: int = flag(8, "loader processes of a training", least=0, most=MAX_WORKERS)
    train: tuple[str, ...] = flag((), "other flags of train.py: optimizer=AdamW cos_lr=true", metavar="FLAG=X")
    plugins: tuple[str, ...] = flag((), "Python files of yours that register modules", metavar="FILE")

    report: tuple[str, ...] = flag(
        (), "report these run folders instead of training; NAME=FOLDER names a variant", section="comparison", metavar="FOLDER"
    )  # fmt: skip
    compare: str = flag(
        "last", "weights that are compared: of the last epoch, or best.pt", metavar="WHICH", choices=WEIGHTS
    )  # fmt: skip
    metric: str = flag("", "column of results.csv that is compared; the main one of the task if left out", metavar="NAME")
    latency: int = flag(20, "repetitions of the measurement of latency; 0 = none", least=0)

    jobs: int | None = flag(None, "trainings side by side; one for each of --devices if left out", section="runs", least=1)
    devices: str = flag("", "cpu, or GPUs such as 0,1, which take trainings in turn", metavar="D,D")
    retry: bool = flag(False, "train runs again that failed before")
    project: str = flag("runs/study", "folder of studies", metavar="DIR")
    name: str = flag("", "study folder in it; the study file's name if left out", fault=_name_fault)

    def __post_init__(self) -> None:
        validate_flags(self)
        for name in ("imgsz", "seeds"):
            values = getattr(self, name)
            if twice := next((v for v in values if values.count(v) > 1), None):
                raise UserError(f"{spelling_of(name)} {' '.join(map(str, values))}: {twice} is given twice")


COMMAND = Command(
    StudyConfig,
    prog="study.py",
    description="Trains variants with several seeds each and says which differences are real.",
    refused={
        "--resume": "not needed; the same command resumes a study",
        "--device": "write --devices, such as --devices 0,1",
        "--seed": "write --seeds, such as --seeds 0 1 2",
    },
)


@dataclass(frozen=True)
class StudyRequest:
    """What is to be studied, as it was asked for.

    Attributes:
        config: the flags, with what the file gives in their places.
        source: what messages call it: the study file, or the command line.
        hyp_changes: hyper-parameter -> its value, or a list of values.
        train: further flags of train.py.
        variants: name -> keys of a single variant.
        early_stop: the rule by which variants are stopped; empty without one.
    """

    config: StudyConfig
    source: str
    hyp_changes: Mapping[str, Any]
    train: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]]
    early_stop: Mapping[str, Any]


def parse_arguments(argv: Sequence[str] | None = None) -> StudyRequest:
    """Reads the command line and the study file that it names.

    Raises:
        UserError: a flag or a key that is unknown, refused or out of range.
    """
    given = COMMAND.read(argv)
    pairs = {name: _read_pairs(name, given.pop(name)) for name in PAIRS if name in given}
    file = given.get("study", "")
    content = read_study_file(file) if file else {}
    values = {**content, **pairs, **given}
    config = StudyConfig(**{k: v for k, v in values.items() if k not in (*FILE_ONLY, *PAIRS)})
    if not config.name:
        object.__setattr__(config, "name", Path(file).stem if file else "report" if config.report else "study")
    return StudyRequest(
        config, file or "the command line", values.get("hyp_change", {}), values.get("train", {}), content.get("variants", {}),
        content.get("early_stop", {}),
    )  # fmt: skip


def read_study_file(path: str) -> dict[str, Any]:
    """The keys of a study file, each checked as its flag is.

    Raises:
        UserError: the file cannot be read, or a key is unknown or wrong; names file and key.
    """
    content = read_yaml(path, expected="keys such as cfg, attention and seeds")
    known = [*(f.name for f in flags_of(StudyConfig) if f.name not in NOT_IN_FILE), *FILE_ONLY]
    values: dict[str, Any] = {}
    for written, value in content.items():
        key = written.replace("-", "_")
        if key not in known:
            hint = nearest(key, known) or f"known are {', '.join(known)}"
            raise UserError(f"{path}: unknown key {shown(written)}; {hint}")
        values[key] = _checked(path, key, value)
    return values


def _checked(path: str, key: str, value: Any) -> Any:
    """The value of a key of a study file, as its flag takes it."""
    if key in FILE_ONLY or key in PAIRS:
        if not isinstance(value, Mapping):
            raise UserError(f"{path}: {key}: a mapping is expected, not {shown(value)}")
        for name, entry in value.items():
            if key == "variants" and not isinstance(entry, Mapping):
                raise UserError(f"{path}: variants.{name}: a mapping of keys such as attention is expected, not {shown(entry)}")
        return value
    if key == "seeds" and not isinstance(value, list):
        raise UserError(f"{path}: seeds: a list such as [0, 1, 2] is expected, not {shown(value)}")
    if key == "attention" and isinstance(value, list):
        value = ["+".join(map(str, entry)) if isinstance(entry, list) else entry for entry in value]
    flag_ = next(f for f in flags_of(StudyConfig) if f.name == key)
    if flag_.many and flag_.scalar is str:
        entries = value if isinstance(value, list) else [value]
        if any(isinstance(entry, (list, dict)) for entry in entries):
            raise UserError(f"{path}: {key}: a list of texts is expected, not {shown(value)}")
        value = ["none" if entry is None else entry for entry in entries]
    elif flag_.scalar is str and isinstance(value, (list, dict)):
        raise UserError(f"{path}: {key}: a single text is expected, not {shown(value)}")
    try:
        return getattr(StudyConfig(**{key: value}), key)
    except UserError as error:
        raise UserError(f"{path}: {str(error).replace(spelling_of(key), key, 1)}") from None


def _read_pairs(name: str, texts: Sequence[str]) -> dict[str, Any]:
    """``iou_loss=CIoU,SIoU`` as a mapping; several values as a list."""
    pairs: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            example = "iou_loss=SIoU" if name == "hyp_change" else "optimizer=AdamW"
            raise UserError(f"{spelling_of(name)} {text!r}: KEY=VALUE is expected, such as {example}")
        read = [parse_yaml(part, source=f"{spelling_of(name)} {text}") for part in value.split(",")]
        pairs[key.replace("-", "_")] = read[0] if len(read) == 1 else read
    return pairs
