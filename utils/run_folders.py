"""Run folders: a new one for each run (race-free), and the newest weights when none are given."""

from __future__ import annotations

from pathlib import Path

from utils.errors import UserError

MAX_RUNS = 100_000


def new_run_dir(project: str | Path, name: str = "exp", exist_ok: bool = False) -> Path:
    """Makes and returns ``project/name``, or ``project/name2``, ``name3`` … where that is taken.

    The folder is made in the same step that finds it free, so that two runs started at once never share one.

    Raises:
        UserError: the project folder cannot be made or written.
    """
    project = Path(project).expanduser()
    try:
        project.mkdir(parents=True, exist_ok=True)
        if exist_ok:
            (project / name).mkdir(parents=True, exist_ok=True)
            return project / name
        for number in range(1, MAX_RUNS):
            folder = project / (name if number == 1 else f"{name}{number}")
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            return folder
    except OSError as error:
        raise UserError(f"{project}: cannot be written ({error.strerror or error}); give another --project") from None
    raise UserError(f"{project}: {MAX_RUNS} runs named {name!r} are there; give another --name")


def newest_weights(root: str | Path = "runs/train", filename: str = "best.pt") -> Path:
    """The checkpoint ``filename`` of the newest run below ``root``; where a run has none, its last.pt counts.

    Raises:
        UserError: there is no run with a checkpoint.
    """
    root = Path(root)
    folders = [p for p in root.glob("**/weights") if p.is_dir()]
    candidates = [w for f in folders for w in (f / filename, f / "last.pt") if w.is_file()]
    if not candidates:
        raise UserError(f"{root}: no run with weights there; train first (python train.py) or give --weights")
    newest_folder = max(candidates, key=lambda w: w.stat().st_mtime_ns).parent
    return next(w for w in candidates if w.parent == newest_folder)
