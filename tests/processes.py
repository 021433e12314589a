"""Runs jobs of several forked ranks: ``python -m tests.processes JOBS.json``.

A job is ``{"name", "kind", "world", …}`` (``world``: number of ranks). The results are printed as JSON: exit codes and the stderr
of each rank. Forking saves the imports.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import train
import val
from engine.evaluation import validate as validation
from engine.logging.progress import LossMeter
from engine.training.step import TrainingState
from utils import distributed
from utils.config import Hyperparameters, TrainConfig
from utils.errors import UserError

LIMIT_S = 600  # of a job whose ranks wait for each other without end


def main(jobs: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    return {job["name"]: launch(job, folder / job["name"]) for job in jobs}


def launch(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Starts the ranks of a job and waits for all."""
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children: dict[int, int] = {}
    for rank in range(job["world"]):
        pid = os.fork()
        if pid == 0:
            os._exit(in_child(job, rank, port, folder))
        children[pid] = rank
    codes, limit = {}, time.monotonic() + LIMIT_S
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > limit:
            for late in children:
                os.kill(late, signal.SIGKILL)
            limit += LIMIT_S
        else:
            time.sleep(0.01)
    said = [(folder / f"{rank}.err").read_text() for rank in range(job["world"])]
    return {"codes": [codes[r] for r in sorted(codes)], "stderr": said}


def in_child(job: dict[str, Any], rank: int, port: int, folder: Path) -> int:
    """Runs one rank; returns its exit code."""
    for number, suffix in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{rank}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["world"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({k: str(v) for k, v in names.items()} if job["world"] > 1 else {})
    try:
        return KINDS[job["kind"]](job, folder)
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 70


def train_job(job: dict[str, Any], folder: Path) -> int:
    """A training, with frozen batch norm statistics if ``frozen``.

    Writes the losses of every step, averaged over ranks, and whether all ranks had the same moving average at every validation.
    """
    steps: list[list[float]] = []
    update = LossMeter.update

    def recorded(self: LossMeter, parts: dict[str, torch.Tensor], *, counts: bool = True) -> None:
        if torch.is_grad_enabled():
            values = torch.stack([p.detach() * counts for p in parts.values()])
            steps.append((distributed.all_reduce_sum(values) / distributed.world_size()).tolist())
        update(self, parts, counts=counts)

    def frozen(self: TrainingState) -> None:
        self.network.train()
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    LossMeter.update = recorded  # type: ignore[method-assign]
    if job.get("frozen"):
        TrainingState.set_training_mode = frozen  # type: ignore[method-assign]
    same: list[bool] = []
    measure = train.validate

    def compared(run: train.Run) -> Any:
        metrics = measure(run)
        averages = distributed.gather_objects([float(v.double().sum()) for v in run.state.ema.model.state_dict().values()])
        same.append(all(a == averages[0] for a in averages))
        return metrics

    train.validate = compared
    code = run_main(job)
    (folder / f"steps{distributed.rank()}.json").write_text(json.dumps(steps))
    (folder / f"same{distributed.rank()}.json").write_text(json.dumps(same))
    return code


def failing_job(job: dict[str, Any], folder: Path) -> int:
    """A training in which one rank fails within an epoch."""

    def fail(run: train.Run, epoch: int) -> dict[str, float]:
        loader, when = run.loaders.train, job["at"]
        draw = type(loader).__iter__

        class Failing(type(loader)):  # type: ignore[misc]
            def __iter__(self) -> Any:
                for i, batch in enumerate(draw(self)):
                    if i == when and distributed.rank() == job["rank"]:
                        if job["how"] == "kill":
                            os.kill(os.getpid(), signal.SIGKILL)
                        raise UserError("the disk of this one is gone") if job["how"] == "error" else KeyError("a bug")
                    yield batch

        loader.__class__ = Failing
        return before(run, epoch)

    before, train.train_one_epoch = train.train_one_epoch, fail
    return run_main(job)


def lost_in_validation_job(job: dict[str, Any], folder: Path) -> int:
    """A training in whose validation one rank is killed; with ``agent`` the others then get a SIGTERM, as torchrun's agent sends it."""

    def lose(*args: Any, **kwargs: Any) -> Any:
        if distributed.rank() == job["rank"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if job["agent"]:
            assert distributed._watch is not None
            assert distributed._watch.watchdog.wait(LIMIT_S)
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*args, **kwargs)

    evaluate, train.evaluate = train.evaluate, lose
    return run_main(job)


def run_main(job: dict[str, Any]) -> int:
    """Runs train.py with a config in place of flags."""
    flags = dict(job["config"])
    flags["hyp"] = Hyperparameters(**flags["hyp"]) if isinstance(flags.get("hyp"), dict) else flags.get("hyp", "")
    train.parse_arguments = lambda _: TrainConfig(**flags)
    return train.main([])


def val_job(job: dict[str, Any], folder: Path) -> int:
    """Runs val.py and saves its metrics."""
    measured = validation.validate

    def kept(config: Any) -> Any:
        metrics = measured(config)
        torch.save({k: v for k, v in vars(metrics).items() if k not in ("speed_ms", "names")}, folder / f"metrics{distributed.rank()}.pt")
        return metrics

    validation.validate = kept
    return val.main(job["flags"])


KINDS: dict[str, Callable[[dict[str, Any], Path], int]] = {
    "train": train_job,
    "failing": failing_job,
    "lost_in_validation": lost_in_validation_job,
    "val": val_job,
}

if __name__ == "__main__":
    given = Path(sys.argv[1])
    print(json.dumps(main(json.loads(given.read_text()), given.parent)))
