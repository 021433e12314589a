"""Runs the trainings of a study: some side by side, resumed where they were broken off, and stopped early by the study's rule.

What is done is read from the run folders alone, so that a study continues after any kill as if nothing had happened. How a training is
started is a function, which tests replace.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from engine.study.halving import Decisions, Rule, survivors
from engine.study.records import RunRecord, Status, Stop
from engine.study.run_files import (
    Job,
    changed_file,
    epochs_done,
    failure,
    forget_failure,
    is_measured,
    note_failure,
    prepare,
    read_record,
    read_table,
    refuse_others,
)
from utils.text_table import counted

POLL_S = 0.2
INTERRUPTED = (130, -2, -15)  # exit statuses of a training that was asked to end


class Training(Protocol):
    """A training that was started."""

    def poll(self) -> int | None:
        """Exit status, 0 when it is trained and measured; None while it runs."""

    def interrupt(self) -> None:
        """Asks it to save and to end."""

    def wait(self) -> None:
        """Waits until an interrupted one has ended."""

    def reason(self) -> str:
        """Why it failed."""


Start = Callable[[Job, str], Training]


@dataclass(frozen=True)
class RunnerOptions:
    """How a study is run.

    Attributes:
        slots: devices that trainings take in turn, one training each at a time; the empty text is train.py's own choice.
        metric: column of results.csv that the rule and the lines on the console name.
        rule: stops variants early; None never does.
        always: variants that the rule never stops.
        decisions: file in which what the rule decided is kept; None for none.
        retry: trains again what failed before.
        poll_s: seconds between two looks at the trainings.
    """

    slots: tuple[str, ...] = ("",)
    metric: str = "metrics/mAP_0.5:0.95"
    rule: Rule | None = None
    always: tuple[str, ...] = ()
    decisions: Path | None = None
    retry: bool = False
    poll_s: float = POLL_S


@dataclass
class _Active:
    job: Job
    training: Training
    slot: str
    since: float
    first_epoch: int
    is_paused: bool = False


class Runner:
    """Runs jobs until each is finished, failed, or stopped by the rule.

    Args:
        jobs: in the order of the table.
        start: starts a training on a device.
    """

    def __init__(self, jobs: Sequence[Job], start: Start, options: RunnerOptions | None = None) -> None:
        self.jobs, self.start, self.options = tuple(jobs), start, options or RunnerOptions()
        self.active: list[_Active] = []
        self.stopped: dict[str, Stop] = {}  # by variant
        self.progress = _Progress()

    def prepare(self) -> None:
        """Makes the run folders; :meth:`run` comes after it.

        Raises:
            UserError: a run folder holds another run.
        """
        for job in self.jobs:  # all of them before any folder changes
            refuse_others(job)
        for job in self.jobs:
            prepare(job)
        if self.options.retry:
            for job in self.jobs:
                forget_failure(job)

    def run(self) -> None:
        """Trains what is left.

        Raises:
            KeyboardInterrupt: the study was interrupted; every training has saved itself.
            UserError: the file of decisions is damaged.
        """
        rule, options = self.options.rule, self.options
        decisions = Decisions(options.decisions, rule, metric=options.metric, always=options.always) if rule else None
        try:
            for goal in (*(rule.after if rule else ()), None):
                self._train_until(goal)
                if goal is not None and decisions is not None:
                    self._stop_variants(goal, decisions)
        except BaseException:
            self._end_all()
            raise

    def records(self) -> tuple[RunRecord, ...]:
        """What every run left behind so far."""
        return tuple(read_record(job, stopped=self.stopped.get(job.variant)) for job in self.jobs)

    def _train_until(self, goal: int | None) -> None:
        """Trains every job to its end, or to so many epochs."""
        waiting = [job for job in self.jobs if not self._is_done(job, goal)]
        self.progress.begin(waiting, slots=len(self.options.slots), goal=goal)
        while waiting or self.active:
            for slot in self._free_slots()[: len(waiting)]:
                job = waiting.pop(0)
                if reason := changed_file(job):
                    self._fail(job, reason)
                    continue
                print(f"{_what_is_done(job)} {job}{f' on {slot}' if slot else ''}", flush=True)
                self.active.append(_Active(job, self.start(job, slot), slot, time.monotonic(), epochs_done(job)))
            time.sleep(self.options.poll_s)
            for active in tuple(self.active):
                self._look_at(active, goal)

    def _look_at(self, active: _Active, goal: int | None) -> None:
        code = active.training.poll()
        if code is None:
            if goal is not None and not active.is_paused and goal <= epochs_done(active.job) < active.job.epochs:
                active.is_paused = True
                active.training.interrupt()
            return
        self.active.remove(active)
        if code == 0 and is_measured(active.job):
            self._tell(active)
        elif active.is_paused and code in INTERRUPTED:
            seconds = time.monotonic() - active.since
            done = epochs_done(active.job)
            self.progress.ended(active.job, seconds, epochs=done - active.first_epoch)
            print(f"pauses {active.job} after {counted(done, 'epoch')} in {duration(seconds)}{self.progress.left()}", flush=True)
        else:
            self._fail(active.job, active.training.reason() if code else "it ended without metrics")

    def _fail(self, job: Job, reason: str) -> None:
        self.progress.failed(job)
        note_failure(job, reason)
        print(f"failed {job}: {reason}; {self._standing()}", flush=True)

    def _is_done(self, job: Job, goal: int | None) -> bool:
        done = job.variant in self.stopped or is_measured(job) or bool(failure(job))
        return done or (goal is not None and goal <= epochs_done(job) < job.epochs)

    def _free_slots(self) -> list[str]:
        free = list(self.options.slots)
        for active in self.active:
            free.remove(active.slot)
        return free

    def _stop_variants(self, goal: int, decisions: Decisions) -> None:
        """Stops the variants that the rule does not keep after so many epochs; what it decided before stays."""
        options, means, before = self.options, self._means(goal), decisions.at(goal)
        assert options.rule is not None
        follows = {job.variant: job.control_of for job in self.jobs if job.control_of}
        kept = survivors(means, options.rule, always=options.always, follows=follows, decided=before)
        decided: dict[str, str] = {}
        for variant, mean in means.items():
            if variant in options.always or (math.isnan(mean) and variant not in follows and variant not in before):
                continue  # of the latter every seed has failed, and says why
            why = ""
            if variant not in kept:
                why = before.get(variant) or self._reason(variant, mean, goal, follows=variant in follows)
                self.stopped[variant] = Stop(goal, why)
                print(f"stops {variant}: {why}", flush=True)
            if variant not in follows:  # a control follows whatever is decided of its variants
                decided[variant] = why
        decisions.keep(goal, decided)

    def _reason(self, variant: str, mean: float, goal: int, *, follows: bool) -> str:
        if follows:
            return f"its controlled variant was stopped after {counted(goal, 'epoch')}"
        metric, rule = self.options.metric, self.options.rule
        assert rule is not None
        return f"stopped after {counted(goal, 'epoch')}: mean {metric} {mean:.4f} over its seeds is not among the best {rule.keep:g}"

    def _means(self, goal: int) -> dict[str, float]:
        """Mean of the metric after so many epochs over the seeds of each variant that is left; NaN without one.

        A seed that came so far counts, whatever became of it later.
        """
        values: dict[str, list[float]] = {job.variant: [] for job in self.jobs if job.variant not in self.stopped}
        for job in self.jobs:
            column = read_table(job.folder / "results.csv").get(self.options.metric, [])
            if job.variant in values and len(column) >= goal and math.isfinite(column[goal - 1]):
                values[job.variant].append(column[goal - 1])
        return {variant: sum(found) / len(found) if found else math.nan for variant, found in values.items()}

    def _tell(self, active: _Active) -> None:
        """Prints the result of a run, and how long the rest will take."""
        record, seconds = read_record(active.job), time.monotonic() - active.since
        value = record.metrics.get(self.options.metric, math.nan)
        self.progress.ended(active.job, seconds, epochs=active.job.epochs - active.first_epoch)
        found = f"{self.options.metric} {value:.4f} in {duration(seconds)}"
        print(f"finished {active.job}: {found}; {self._standing()}", flush=True)

    def _standing(self) -> str:
        """How many runs have ended, and how long the rest will take: ``3 of 4 runs, 1 of them failed, about 2 min left``."""
        running = [active.job for active in self.active]  # one of them may have ended since it was looked at
        failed = sum(bool(failure(job)) and not is_measured(job) for job in self.jobs if job not in running)
        done = sum(self._is_done(job, None) for job in self.jobs if job not in running)
        failures = f", {failed} of them failed" if failed else ""
        return f"{done} of {len(self.jobs)} runs{failures}{self.progress.left()}"

    def _end_all(self) -> None:
        for active in self.active:
            active.training.interrupt()
        for active in self.active:
            active.training.wait()
        self.active.clear()


def _what_is_done(job: Job) -> str:
    done = epochs_done(job)
    return "trains" if not done else "measures" if done >= job.epochs else "resumes"


@dataclass
class _Progress:
    """How long what is left will take, from the runs that were finished or paused in this process."""

    slots: int = 1
    goal: int | None = None  # epochs after which the trainings pause; None for their end
    waiting: dict[str, int] = field(default_factory=dict)  # job -> its epochs that are left
    seconds: float = 0.0
    epochs: int = 0

    def begin(self, jobs: Sequence[Job], *, slots: int, goal: int | None) -> None:
        self.slots, self.goal = slots, goal
        self.waiting = {str(job): max((goal or job.epochs) - epochs_done(job), 1) for job in jobs}

    def failed(self, job: Job) -> None:
        """Leaves a run out of what is left."""
        self.waiting.pop(str(job), None)

    def ended(self, job: Job, seconds: float, *, epochs: int) -> None:
        """Counts a run that has finished or paused."""
        self.waiting.pop(str(job), None)
        self.seconds, self.epochs = self.seconds + seconds, self.epochs + max(epochs, 1)

    def left(self) -> str:
        """What is left in words; empty for nothing, or where it is not known."""
        left = sum(self.waiting.values())
        if not left or not self.epochs:
            return ""
        rate = self.seconds / self.epochs / self.slots
        return f", about {duration(left * rate)} left{f' to epoch {self.goal}' if self.goal else ''}"


def duration(seconds: float) -> str:
    """Seconds in words: ``42 s``, ``12 min``, ``3.5 h``."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def interruption(records: Sequence[RunRecord], folder: object) -> str:
    """What an interrupted study says."""
    done = sum(record.status is not Status.PENDING for record in records)
    return f"{folder} holds {done} of {len(records)} runs; the same command resumes it"
