"""Loggers that ``--logger`` names: MLflow and Weights & Biases. A resumed run continues its own record there."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.logging.callbacks import Callback, RunInfo
from utils.errors import UserError

MAX_CHARACTERS = 250  # of a value; older MLflow servers refuse more
PARAMS_PER_REQUEST = 50
ARTIFACTS = ("results.csv", "opt.yaml", "hyp.yaml", "results.png", "confusion_matrix.png", "weights/best.pt")


class _Tracker(Callback):
    """Logs flags, hyper-parameters, every column of results.csv, and at the end files and best.pt.

    Args:
        project: name of the project or experiment.
        values: flags and hyper-parameters.
    """

    def __init__(self, project: str, values: Mapping[str, Any]) -> None:
        self.project, self.values = project, values


class MlflowLogger(_Tracker):
    """Logs to the server that MLFLOW_TRACKING_URI names."""

    mlflow: Any = None

    def on_train_start(self, run: RunInfo) -> None:
        self.mlflow = importlib.import_module("mlflow")
        self.mlflow.set_experiment(self.project)
        known = _read_id(run, "mlflow")
        started = self.mlflow.start_run(run_id=known) if known else self.mlflow.start_run(run_name=run.save_dir.name)
        _write_id(run, "mlflow", started.info.run_id)
        texts = [(_allowed(key), str(value)[:MAX_CHARACTERS]) for key, value in self.values.items()]
        for start in range(0, 0 if known else len(texts), PARAMS_PER_REQUEST):
            self.mlflow.log_params(dict(texts[start : start + PARAMS_PER_REQUEST]))
        for row in run.rows[-1:]:  # of a resumed run, which may have been stopped before it was logged
            self.on_epoch_end(run, row)

    def on_epoch_end(self, run: RunInfo, row: Mapping[str, float]) -> None:
        self.mlflow.log_metrics({_allowed(name): value for name, value in row.items() if name != "epoch"}, step=int(row["epoch"]))

    def on_train_end(self, run: RunInfo) -> None:
        for path in _files(run):
            self.mlflow.log_artifact(str(path))
        self.mlflow.end_run()


class WandbLogger(_Tracker):
    """Logs to Weights & Biases; WANDB_ENTITY and WANDB_MODE configure it."""

    wandb: Any = None
    run: Any = None

    def on_train_start(self, run: RunInfo) -> None:
        self.wandb = importlib.import_module("wandb")
        self.run = self.wandb.init(
            project=_project(self.project), name=run.save_dir.name, dir=str(run.save_dir), config=dict(self.values),
            id=_read_id(run, "wandb"), resume="allow",
        )  # fmt: skip
        _write_id(run, "wandb", self.run.id)
        for row in run.rows[-1:]:
            self.on_epoch_end(run, row)

    def on_epoch_end(self, run: RunInfo, row: Mapping[str, float]) -> None:
        self.run.log({name: value for name, value in row.items() if name != "epoch"}, step=int(row["epoch"]))

    def on_train_end(self, run: RunInfo) -> None:
        for path in _files(run):
            self.run.save(str(path), base_path=str(run.save_dir))
        self.run.finish()


TRACKERS: dict[str, Callable[[str, Mapping[str, Any]], Callback]] = {"mlflow": MlflowLogger, "wandb": WandbLogger}


def trackers(names: Sequence[str], project: str, values: Mapping[str, Any]) -> list[Callback]:
    """The loggers of these names.

    Raises:
        UserError: a package is not installed, or cannot be imported.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # a package that is half installed may raise anything
            what = "is not installed" if isinstance(error, ModuleNotFoundError) and error.name == name else f"cannot be imported ({error})"
            raise UserError(f"--logger {name}: the package {name} {what}; pip install {name}, or leave it out") from None
    return [TRACKERS[name](project, values) for name in names]


def _files(run: RunInfo) -> list[Path]:
    return [path for path in (run.save_dir / name for name in ARTIFACTS) if path.is_file()]


def _read_id(run: RunInfo, tracker: str) -> str | None:
    """The tracker's id of this run if it is resumed, else None."""
    path = run.save_dir / f".{tracker}_run"
    return path.read_text(encoding="utf-8").strip() or None if run.rows and path.is_file() else None


def _write_id(run: RunInfo, tracker: str, name: str) -> None:
    (run.save_dir / f".{tracker}_run").write_text(str(name), encoding="utf-8")


def _project(name: str) -> str:
    """A project name that Weights & Biases accepts: no slashes and no ``\\#?%:``, at most 128 characters."""
    return re.sub(r"[/\\#?%:]+", "-", name).strip("-.")[-128:] or "train"


def _allowed(name: str) -> str:
    """A name that MLflow accepts: letters, digits and ``_-. /``."""
    return re.sub(r"[^\w\-. /]", "-", name)
