"""A job that torchrun (``--max-restarts``) or SLURM (a requeue) starts again resumes its own run.

The run folder holds the job's id. Only a restarted job looks for it, so the same command started by hand is a new run.
"""

from __future__ import annotations

from pathlib import Path

from engine.training.resume import load_last_valid
from models.checkpoints.checkpoint import previous_of
from utils import distributed
from utils.config import TrainConfig

JOB_FILE = ".job"
FINISHED, SAVED, UNSAVED = "finished", "saved", ""


def write_job_id(folder: Path) -> None:
    """Records which job a new run belongs to."""
    if distributed.job_id():
        (folder / JOB_FILE).write_text(distributed.job_id(), encoding="utf-8")


def resume_after_restart(config: TrainConfig) -> TrainConfig:
    """The config as given or, after a restart, the one that resumes the run of the job.

    Raises:
        SystemExit: the run was finished before the restart.
    """
    if config.resume or not distributed.restarted():
        return config
    found = distributed.main_rank_decision(lambda: find_run_of_job(config.project))
    if not found:
        return config
    folder, last = Path(found), Path(found) / "weights" / "last.pt"
    status = distributed.main_rank_decision(lambda: run_status(last))
    print(f"This job was started again; its run is {folder}")
    if status == FINISHED:
        print("It was finished before, so there is nothing to do")
        raise SystemExit(0)
    if status == SAVED:
        return TrainConfig(resume=str(last), plugins=config.plugins)
    return config.replace(project=str(folder.parent), name=folder.name, exist_ok=True)  # stopped before its first save


def find_run_of_job(project: str) -> str:
    """The newest run folder of this job, or empty."""
    files = [file for file in Path(project).glob(f"*/{JOB_FILE}") if file.read_text(encoding="utf-8") == distributed.job_id()]
    return str(max(files, key=lambda file: file.stat().st_mtime_ns).parent) if files else ""


def run_status(last: Path) -> str:
    """Whether the run of a last.pt is FINISHED, SAVED (it can be resumed) or UNSAVED."""
    if not (last.exists() or previous_of(last).exists()):
        return UNSAVED
    return FINISHED if load_last_valid(last)[1].training is None else SAVED
