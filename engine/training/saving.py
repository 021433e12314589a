"""When a run is saved, and what stands in its weights folder. ``last.pt`` is the truth: everything else there follows from it.

``last.pt`` is whole at every moment, and the save before it lies beside it as ``last.prev.pt`` until the run has ended.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from engine.training.run import Run, snapshot
from engine.training.stop_signals import Stopped
from models.checkpoints.checkpoint import Checkpoint, load_checkpoint, previous_of, save_checkpoint
from utils import distributed
from utils.errors import UserError
from utils.files import UNFINISHED
from utils.memory import is_out_of_memory
from utils.random_state import refused_kernel

if TYPE_CHECKING:
    from utils.metrics.metrics import Metrics

STOP_EVERY = 10  # steps between agreements of several processes whether to stop


def save_epoch(run: Run, metrics: Metrics | None) -> None:
    """last.pt with all that a resume needs, best.pt where this is the best, and every --save-period epochs one more."""
    last = snapshot(run, metrics)
    save_last(run, last)
    save_copies(run.save_dir / "weights", last, period=run.config.save_period)


def save_last(run: Run, last: Checkpoint) -> None:
    """last.pt, with the one before it kept beside it."""
    save_checkpoint(run.save_dir / "weights" / "last.pt", last, keep_previous=True)


def save_copies(weights: Path, last: Checkpoint, *, period: int) -> None:
    """What follows from a last.pt at the end of an epoch; done again on a resume, as a kill may have come between the two."""
    assert last.training is not None
    plain = last.without_training_state()
    if last.training["best_epoch"] == last.epoch - 1 or not (weights / "best.pt").exists():
        save_checkpoint(weights / "best.pt", plain)
    if period > 0 and last.epoch % period == 0:
        save_checkpoint(weights / f"epoch{last.epoch}.pt", plain)


def save_midway(run: Run) -> None:
    """Called when no gradient waits: saves every --save-steps steps, and where a stop was asked for.

    Raises:
        Stopped: a stop was asked for.
    """
    config, steps = run.config, run.ema.updates
    if _stop_is_due(run, steps):
        run.agree()
        raise Stopped
    if config.save_steps > 0 and steps % config.save_steps == 0:
        run.guard.check()
        run.agree()
        if distributed.is_main():
            save_last(run, snapshot(run))


def finish_weights(run: Run) -> None:
    """Takes the training state out of last.pt: the very last thing of a run, for it cannot go on after that."""
    last = run.save_dir / "weights" / "last.pt"
    if distributed.is_main():
        previous_of(last).unlink(missing_ok=True)
        save_checkpoint(last, load_checkpoint(last).without_training_state())


@contextmanager
def explain_interruption(run: Run) -> Iterator[None]:
    """Whatever ends the run early ends in one line that says what is kept and how to go on; a stop that was asked for is saved first."""
    try:
        yield
    except Stopped:
        run.guard.check()
        if distributed.is_main() and run.batch and not run.config.nosave:  # at the end of an epoch it was saved already
            save_last(run, snapshot(run))
        raise KeyboardInterrupt(saved_position(run)) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(saved_position(run)) from None
    except UserError as error:
        raise UserError(f"{error}; {saved_position(run)}") from error
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):  # of several processes, or outside the network
            raise UserError(f"the memory is full: train anew with a smaller --batch-size or --imgsz; {saved_position(run)}") from error
        if kernel := refused_kernel(error):
            advice = "leave out --deterministic, or the layer that needs it (docs/own_modules.md says what stands in for which)"
            raise UserError(f"{kernel} has no deterministic form on this device: {advice}; {saved_position(run)}") from error
        if loss := distributed.lost_rank_message():
            raise UserError(f"{loss}; {saved_position(run)}") from error
        if "DataLoader worker" not in str(error) or "Traceback" in str(error):
            raise  # not a worker that died
        advice = "most likely for lack of memory: give fewer --workers, or leave out --cache ram"
        raise UserError(f"a loader process was killed, {advice}; {saved_position(run)}") from error


def saved_position(run: Run) -> str:
    """What a resume would go on from."""
    last = run.save_dir / "weights" / "last.pt"
    if not last.exists():
        return "nothing was saved"
    try:
        checkpoint = load_checkpoint(last)
    except UserError as error:
        return str(error)
    if checkpoint.training is None:
        return f"{last} is finished"
    return f"{last} holds {position(checkpoint)}, resume with --resume {last}"


def position(checkpoint: Checkpoint) -> str:
    """How far a checkpoint's run had come."""
    assert checkpoint.training is not None
    batches = checkpoint.training.get("batch", 0)
    more = f" and {batches} of {checkpoint.training['iterations']} batches of the next" if batches else ""
    return f"{checkpoint.epoch} of {checkpoint.config.get('epochs')} epochs{more}"


def clean(weights: Path) -> None:
    """Removes what killed saves have left."""
    for partial in weights.glob(UNFINISHED):
        try:
            partial.unlink()
        except OSError as error:
            print(f"warning: {partial}: cannot be removed ({error.strerror or error})", file=sys.stderr)


def _stop_is_due(run: Run, steps: int) -> bool:
    """Whether a stop was asked for, of any process; several processes ask one another only now and then."""
    if distributed.world_size() == 1:
        return run.signals.requested
    return steps % STOP_EVERY == 0 and any(distributed.gather_objects(run.signals.requested))
