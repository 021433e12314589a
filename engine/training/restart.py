"""A job that torchrun (``--max-restarts``) or SLURM (a requeue) starts again resumes the run that it had begun.

The run's folder holds the job's id; only a restarted job looks for it, so the same command given anew is a new run.
"""

from __future__ import annotations

from pathlib import Path

from engine.training.resume import last_whole
from models.checkpoints.checkpoint import previous_of
from utils import distributed
from utils.config import TrainConfig

MARK = ".job"
FINISHED = "finished"


def mark(folder: Path) -> None:
    """Writes down which job a new run belongs to."""
    if distributed.job_id():
        (folder / MARK).write_text(distributed.job_id(), encoding="utf-8")


def continued(config: TrainConfig) -> TrainConfig:
    """The config as it was given or, after a restart, that of going on with what the job has left.

    Raises:
        SystemExit: the run was finished before the restart.
    """
    if config.resume or not distributed.restarted():
        return config
    found = distributed.main_rank_decision(lambda: begun(config.project))
    if not found:
        return config
    folder, last = Path(found), Path(found) / "weights" / "last.pt"
    state = distributed.main_rank_decision(lambda: _state(last))
    print(f"This job was started again; its run is {folder}")
    if state == FINISHED:
        print("It was finished before, so there is nothing to do")
        raise SystemExit(0)
    if state:
        return TrainConfig(resume=str(last), plugins=config.plugins)
    return config.replace(project=str(folder.parent), name=folder.name, exist_ok=True)  # stopped before its first save


def begun(project: str) -> str:
    """The newest run folder of this job, or nothing."""
    marks = [m for m in Path(project).glob(f"*/{MARK}") if m.read_text(encoding="utf-8") == distributed.job_id()]
    return str(max(marks, key=lambda m: m.stat().st_mtime_ns).parent) if marks else ""


def _state(last: Path) -> str:
    """Whether a run can go on, is finished, or (nothing) has saved nothing."""
    if not (last.exists() or previous_of(last).exists()):
        return ""
    return FINISHED if last_whole(last)[1].training is None else "begun"
