"""Is it better? Trains variants with several seeds each: arguments -> plans -> runs -> records -> tables and figures.

Example:
    python study.py benchmarks/attention_study.yaml
    python study.py --cfg yolov8n.yaml --attention none SE@9 'CBAM@4,6,9' EMA@detect --seeds 0 1 2 3 4 --data mydata.yaml --epochs 60
    python study.py STUDY.yaml --jobs 2 --devices 0,1     # the same command resumes a study that was broken off
    python study.py --report runs/train                   # the same tables and figures from runs that exist already
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli.script import run_script
from utils.cli.study_arguments import StudyConfig, StudyRequest, parse_arguments

if TYPE_CHECKING:
    from engine.study.plan import Plan
    from engine.study.records import Cost, RunRecord, Study
    from engine.study.report import Report
    from engine.study.runner import Start


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # handled like Ctrl-C

    def body() -> None:
        request = parse_arguments(argv)
        report_runs(request.config) if request.config.report else study(request)

    return run_script("study.py", body, reason="the same command resumes the study")


def study(request: StudyRequest, *, start: Start | None = None) -> list[Study]:
    """Plans, runs and reports a study of each data set.

    Args:
        start: starts a training; train.py in a process of its own if None.

    Raises:
        UserError: whatever a user can cause, in one line.
        KeyboardInterrupt: it was interrupted; says how much is done.
    """
    from engine.study.plan import make_plans

    return [run_plan(plan, start=start) for plan in make_plans(request)]


def run_plan(plan: Plan, *, start: Start | None = None) -> Study:
    """Trains every variant with every seed, and writes the report; what was done before is not done again."""
    from engine.study.cost import count_costs
    from engine.study.folder import jobs_of, write_study, write_variants
    from engine.study.halving import DECISIONS_FILE
    from engine.study.processes import starter
    from engine.study.runner import Runner, RunnerOptions, interruption
    from utils import distributed
    from utils.run_folders import RunLock

    slots = slots_of(plan.config)
    check_devices(slots)
    with RunLock() as lock:
        make_folder(plan.folder)
        lock.take(plan.folder, job=distributed.job_id())
        options = RunnerOptions(
            slots, plan.config.metric, plan.early_stop, (plan.baseline,), plan.folder / DECISIONS_FILE, plan.config.retry
        )  # fmt: skip
        runner = Runner(jobs_of(plan), start or starter(jobs=len(slots)), options)
        runner.prepare()  # refuses the folder of another study before anything in it changes
        write_variants(plan)
        notes = [*notes_of(plan)]
        costs = count_costs(plan.folder, plan.variants, notes)
        write_study(plan, costs, runner.stopped, notes)
        show_differences(plan, costs, notes)
        try:
            runner.run()
        except KeyboardInterrupt:
            write_study(plan, costs, runner.stopped, notes)
            raise KeyboardInterrupt(interruption(runner.records(), plan.folder)) from None
        costs = with_latencies(plan, costs, notes, device=slots[0])
        write_study(plan, costs, runner.stopped, notes)
        found = make_study(plan, runner.records(), costs, notes)
        report(found, plan.folder)
    return found


def slots_of(config: StudyConfig) -> tuple[str, ...]:
    """The device of each training that runs at the same time."""
    devices = [name.strip() for name in config.devices.split(",") if name.strip()] or [""]
    return tuple(devices[i % len(devices)] for i in range(config.jobs or len(devices)))


def check_devices(slots: Sequence[str]) -> None:
    """Refuses a device that is not there, before every training fails on it.

    Raises:
        UserError: names the device.
    """
    from utils.distributed import select_device
    from utils.errors import UserError

    for device in dict.fromkeys(slots):
        try:
            select_device(device)
        except UserError as error:
            raise UserError(str(error).replace("--device ", "--devices ")) from None


def make_folder(folder: Path) -> None:
    """Makes the study folder, where it is not there yet."""
    from utils.errors import UserError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror or error}); give another --project or --name") from None


def show_differences(plan: Plan, costs: dict[str, Cost], notes: Sequence[str]) -> None:
    """Prints what differs between each variant and the baseline, and the notes; writes diff.md and diff.json."""
    from engine.study.diff import difference, write_differences

    baseline = next(v for v in plan.variants if v.name == plan.baseline)
    found = [difference(baseline, other, costs) for other in plan.variants if other is not baseline]
    write_differences(plan.folder, found)
    seeds = " ".join(map(str, plan.config.seeds))
    print(f"study     {plan.folder}: {len(plan.variants)} variants, seeds {seeds}, {plan.config.epochs} epochs on {plan.data}")
    for one in found:
        print(f"{one.variant} and {one.baseline}", *one.lines(), sep="\n    ")
    for line in notes:
        print(f"note      {line}")


def notes_of(plan: Plan) -> tuple[str, ...]:
    """Lines for the report: the plan's, the rule, and which weights are compared."""
    weights = "the moving average of the last epoch" if plan.config.compare == "last" else "best.pt, chosen by its metric on these images"
    return (*plan.notes, *([str(plan.early_stop)] if plan.early_stop else []), f"compared weights: {weights}")


def with_latencies(plan: Plan, costs: dict[str, Cost], notes: list[str], *, device: str) -> dict[str, Cost]:
    """The costs with latencies, measured when nothing trains any more; what could not be measured is a note."""
    from engine.study.cost import measure_latencies
    from utils.distributed import select_device

    if not plan.config.latency:
        return costs
    return measure_latencies(plan.folder, plan.variants, costs, device=select_device(device), repeats=plan.config.latency, notes=notes)


def make_study(plan: Plan, records: Sequence[RunRecord], costs: dict[str, Cost], notes: Sequence[str]) -> Study:
    """The records with the costs of their networks."""
    from engine.study.records import Study

    whole = []
    for record in records:
        trained = record.cost
        cost = replace(costs[record.variant], peak_memory_mib=trained.peak_memory_mib, training_seconds=trained.training_seconds)
        whole.append(replace(record, cost=cost))
    return Study(tuple(whole), plan.baseline, plan.config.metric, tuple(notes))


def report(found: Study, folder: Path) -> None:
    """Writes tables, figures and verdicts into the study folder, and prints the table."""
    from engine.study.report import write_report

    print_report(write_report(found, folder))


def report_runs(config: StudyConfig) -> Report:
    """Compares runs that exist already.

    Raises:
        UserError: nothing that could be compared, or a study is asked for at the same time.
    """
    from engine.study.reading import ReadOptions
    from engine.study.report import report_folders
    from utils.errors import UserError
    from utils.run_folders import new_run_dir

    if config.study or config.cfg:
        raise UserError("--report: compares runs that exist already; leave the study file and --cfg out")
    folder = new_run_dir(config.project, config.name)
    try:
        found = report_folders(config.report, folder, ReadOptions(config.baseline, config.metric))
    except UserError:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    print_report(found)
    return found


def print_report(found: Report) -> None:
    """The table, the verdicts and where the files are."""
    print(f"\n{found.text}\nReport in {found.folder}: {', '.join(file.name for file in found.files)}")


if __name__ == "__main__":
    sys.exit(main())
