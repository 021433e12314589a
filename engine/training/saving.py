"""When a run is saved, and the files of its weights folder. All other files there follow from ``last.pt``.

``last.pt`` is complete at every moment, and the save before it is kept beside it as ``last.prev.pt`` until the run has ended.
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
from models.checkpoints.convert import convert
from utils import distributed
from utils.errors import UserError
from utils.files import UNFINISHED
from utils.memory import is_out_of_memory
from utils.random_state import refused_kernel

if TYPE_CHECKING:
    from tasks.base import MetricResult

STOP_EVERY = 10  # steps between two exchanges of several ranks about a requested stop
DEPLOY_CHECK_IMAGES = 2  # validation images on which the deployed form is compared with best.pt


def save_epoch(run: Run, metrics: MetricResult | None) -> None:
    """Saves last.pt, best.pt where this epoch is the best, and one more checkpoint every --save-period epochs."""
    last = snapshot(run, metrics)
    save_last(run, last)
    save_copies(run.save_dir / "weights", last, period=run.config.save_period)


def save_last(run: Run, last: Checkpoint) -> None:
    """Saves last.pt and keeps the one before it."""
    save_checkpoint(run.save_dir / "weights" / "last.pt", last, keep_previous=True)


def save_copies(weights: Path, last: Checkpoint, *, period: int) -> None:
    """Saves what follows from the last.pt of an epoch; repeated on a resume, as the process may have been killed in between."""
    assert last.training is not None
    plain = last.without_training_state()
    if last.training["best_epoch"] == last.epoch - 1 or not (weights / "best.pt").exists():
        save_checkpoint(weights / "best.pt", plain)
    if period > 0 and last.epoch % period == 0:
        save_checkpoint(weights / f"epoch{last.epoch}.pt", plain)


def save_within_epoch(run: Run) -> None:
    """Called after an optimizer step: saves every --save-steps steps, and where a stop was requested.

    Raises:
        Stopped: a stop was requested.
    """
    config, steps = run.config, run.state.ema.updates
    if _is_stop_due(run, steps):
        run.gather_rank_states()
        raise Stopped
    if config.save_steps > 0 and steps % config.save_steps == 0:
        run.step.guard.check()
        run.gather_rank_states()
        if distributed.is_main():
            save_last(run, snapshot(run))


def save_deployed(run: Run, best: Path) -> Path | None:
    """Saves ``best-deploy.pt`` beside best.pt, after comparing the two on validation images; prints a line about it.

    The training has ended by then, so that a failure is a warning.

    Returns:
        The file; None where the network is folded already or the comparison fails.
    """
    if run.state.model.spec.fused:
        return None
    images = run.loaders.val.dataset.image_files[:DEPLOY_CHECK_IMAGES]
    try:
        result = convert(best, deploy=True, images=images)
    except UserError as error:
        print(f"warning: no deployed weights: {error}", file=sys.stderr)
        return None
    print(f"Deployed  {result}")
    return result.path


def finish_weights(run: Run) -> None:
    """Removes the training state from last.pt and the save before it: the last action of a run, which cannot be resumed afterwards."""
    last = run.save_dir / "weights" / "last.pt"
    if distributed.is_main():
        previous_of(last).unlink(missing_ok=True)
        save_checkpoint(last, load_checkpoint(last).without_training_state())


@contextmanager
def explain_interruption(run: Run) -> Iterator[None]:
    """Ends an interrupted run with one line: the reason, what is saved and how to resume. A requested stop is saved first.

    Raises:
        KeyboardInterrupt: a stop was requested.
        UserError: the run failed for a reason that a user can act on.
    """
    try:
        yield
    except Stopped:
        run.step.guard.check()
        if distributed.is_main() and run.progress.batch and not run.config.nosave:  # at the end of an epoch it is saved already
            save_last(run, snapshot(run))
        raise KeyboardInterrupt(describe_saved(run)) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(describe_saved(run)) from None
    except UserError as error:
        raise UserError(f"{error}; {describe_saved(run)}") from error
    except (RuntimeError, MemoryError) as error:
        reason = explain_error(error)
        if not reason:
            raise
        raise UserError(f"{reason}; {describe_saved(run)}") from error


def explain_error(error: RuntimeError | MemoryError) -> str:
    """The reason of an error of torch and what to do about it; empty where it is not known."""
    if is_out_of_memory(error):  # of several ranks, or outside the network
        return "the memory is full: start the training again with a smaller --batch-size or --imgsz"
    if kernel := refused_kernel(error):
        advice = "leave out --deterministic, or the layer that needs it (docs/own_modules.md says what stands in for which)"
        return f"{kernel} has no deterministic form on this device: {advice}"
    if loss := distributed.lost_rank_message():
        return loss
    if "DataLoader worker" in str(error) and "Traceback" not in str(error):  # a worker that was killed, not one that raised
        return "a loader process was killed, most likely for lack of memory: give fewer --workers, or leave out --cache ram"
    return ""


def describe_saved(run: Run) -> str:
    """What last.pt holds and how to resume from it."""
    last = run.save_dir / "weights" / "last.pt"
    if not last.exists():
        return "nothing was saved"
    try:
        checkpoint = load_checkpoint(last)
    except UserError as error:
        return str(error)
    if checkpoint.training is None:
        return f"{last} is finished"
    return f"{last} holds {describe_position(checkpoint)}, resume with --resume {last}"


def describe_position(checkpoint: Checkpoint) -> str:
    """Epochs and batches that the run of a checkpoint had done."""
    assert checkpoint.training is not None
    batches = checkpoint.training.get("batch", 0)
    more = f" and {batches} of {checkpoint.training['iterations']} batches of the next" if batches else ""
    return f"{checkpoint.epoch} of {checkpoint.config.get('epochs')} epochs{more}"


def remove_partial_files(weights: Path) -> None:
    """Removes the partial files of saves that were killed."""
    for partial in weights.glob(UNFINISHED):
        try:
            partial.unlink()
        except OSError as error:
            print(f"warning: {partial}: cannot be removed ({error.strerror or error})", file=sys.stderr)


def _is_stop_due(run: Run, steps: int) -> bool:
    """Whether a stop was requested, on any rank; several ranks exchange that every ``STOP_EVERY`` steps only."""
    if distributed.world_size() == 1:
        return run.signals.requested
    return steps % STOP_EVERY == 0 and any(distributed.gather_objects(run.signals.requested))
