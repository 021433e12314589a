"""The runner's logic, with trainings that are made up: nothing is trained."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.study import runner as runner_module
from engine.study.halving import Rule, survivors
from engine.study.records import Status
from engine.study.run_files import JOB_FILE, METRICS_FILE, Job, epochs_done, file_hash, prepare, read_json, write_json
from engine.study.runner import Runner, RunnerOptions, duration
from models.checkpoints.checkpoint import Checkpoint, save_checkpoint
from utils.errors import UserError
from utils.run_folders import RunLock

METRIC = "metrics/mAP_0.5:0.95"


def jobs(folder: Path, names="abc", seeds=(0, 1), epochs=4, **changes) -> list[Job]:
    return [
        Job(name, seed, folder / f"{name}-seed{seed}", {"epochs": epochs, "seed": seed, **changes}, network=name)
        for name in names
        for seed in seeds
    ]


class Fake:
    """A training whose epochs take a poll each and whose metric is a function of variant, seed and epoch."""

    def __init__(self, world: World, job: Job) -> None:
        self.world, self.job, self.is_asked = world, job, False

    def poll(self) -> int | None:
        done = epochs_done(self.job)
        if self.is_asked:
            return self._end(130)
        if self.world.polls_left is not None:
            self.world.polls_left -= 1
            if self.world.polls_left < 0:
                raise KeyboardInterrupt
        if self.job.variant in self.world.failing and done >= self.world.failing[self.job.variant]:
            return self._end(1)
        if done < self.job.epochs:
            with open(self.job.folder / "results.csv", "a", newline="") as file:
                writer = csv.writer(file)
                if not done:
                    writer.writerow(["epoch", METRIC])
                writer.writerow([done, self.world.value(self.job, done)])
            return None
        write_json(self.job.folder / METRICS_FILE, {"compare": self.job.compare, "metrics": {METRIC: self.world.value(self.job, done)}})
        return self._end(0)

    def _end(self, code: int) -> int:
        self.world.running.remove(self)
        return code

    def interrupt(self) -> None:
        self.is_asked = True

    def wait(self) -> None:
        self.world.ended_cleanly.append(str(self.job))

    def reason(self) -> str:
        return "the memory is full"


class World:
    """Starts fake trainings and notes what was started."""

    def __init__(self, failing=(), polls_left=None) -> None:
        self.failing = dict(failing)
        self.polls_left = polls_left
        self.started: list[tuple[str, int, str]] = []
        self.running: list[Fake] = []
        self.most = 0
        self.ended_cleanly: list[str] = []

    def value(self, job: Job, epoch: int) -> float:
        return round((ord(job.variant[0]) - 96) / 100 + job.seed / 1000 + epoch / 10000, 6)

    def __call__(self, job: Job, device: str) -> Fake:
        self.started.append((str(job), epochs_done(job), device))
        self.running.append(Fake(self, job))
        self.most = max(self.most, len(self.running))
        return self.running[-1]


def run(made, world, **options):
    runner = Runner(made, world, RunnerOptions(poll_s=0, **options))
    runner.prepare()
    runner.run()
    return runner


def table(runner) -> list[tuple]:
    return [(r.variant, r.seed, r.status, dict(r.metrics), r.reason) for r in runner.records()]


def test_seven_configs_of_which_one_fails(tmp_path, capsys):
    made = jobs(tmp_path, names="abcdefg", seeds=(0,))
    found = table(run(made, World(failing={"d": 2})))
    assert [status for _, _, status, _, _ in found] == [Status.FINISHED] * 3 + [Status.FAILED] + [Status.FINISHED] * 3
    assert found[3][4] == "the memory is full"
    lines = capsys.readouterr().out.splitlines()
    failed = next(line for line in lines if line.startswith("failed"))
    assert failed.startswith("failed d seed 0: the memory is full; 4 of 7 runs, 1 of them failed")
    assert lines[-1].endswith("; 7 of 7 runs, 1 of them failed")
    again = World()
    assert table(run(made, again)) == found
    assert again.started == []
    assert table(run(made, again, retry=True))[3][2] is Status.FINISHED
    assert [name for name, *_ in again.started] == ["d seed 0"]


def test_killed_study_ends_with_the_same_table(tmp_path):
    whole = table(run(jobs(tmp_path / "whole"), World()))
    made, starts = jobs(tmp_path / "cut"), []
    for polls in (3, 9, 11):
        world = World(polls_left=polls)
        with pytest.raises(KeyboardInterrupt):
            run(made, world)
        assert world.ended_cleanly
        starts += world.started
    last = World()
    assert table(run(made, last)) == whole
    starts += last.started
    finished_at = {name: [done for n, done, _ in starts if n == name] for name, *_ in starts}
    assert any(len(found) > 1 for found in finished_at.values())  # some were broken off,
    assert all(found == sorted(found) and found.count(0) == 1 for found in finished_at.values())  # and went on where they were


def test_jobs_run_side_by_side_on_their_devices(tmp_path):
    world = World()
    run(jobs(tmp_path), world, slots=("0", "1", "0"))
    assert world.most == 3
    assert {device for *_, device in world.started} == {"0", "1"}
    assert len(world.started) == 6


def test_rest_is_told_after_the_first_run(tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 10_000, 60))
    monkeypatch.setattr(runner_module.time, "monotonic", lambda: next(clock))
    run(jobs(tmp_path, names="ab", seeds=(0, 1)), World())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("finished")]
    assert "1 of 4 runs, about 3 min left" in lines[0]
    assert lines[-1].endswith("4 of 4 runs")
    assert [duration(s) for s in (42, 600, 12_600)] == ["42 s", "10 min", "3.5 h"]


def test_a_run_that_ended_unseen_is_not_counted_before_its_line(tmp_path, capsys):
    run(jobs(tmp_path, names="ab", seeds=(0, 1)), World(), slots=("", ""))  # two at a time, which end together
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("finished")]
    assert [line.partition("; ")[2].partition(",")[0] for line in lines] == [f"{n} of 4 runs" for n in (1, 2, 3, 4)]
    assert ["left" in line for line in lines] == [True, True, True, False]


def test_halving_stops_all_seeds_of_the_worst_and_keeps_the_baseline(tmp_path):
    made = jobs(tmp_path, names="abcde", epochs=6)
    runner = run(made, World(), rule=Rule((2, 4), 0.5), always=("a",))
    done = {(j.variant, j.seed): epochs_done(j) for j in made}
    assert {v: {done[v, s] for s in (0, 1)} for v in "abcde"} == {"a": {6}, "b": {2}, "c": {2}, "d": {4}, "e": {6}}
    status = {r.variant: r.status for r in runner.records()}
    assert status == {"a": Status.FINISHED, "b": Status.STOPPED, "c": Status.STOPPED, "d": Status.STOPPED, "e": Status.FINISHED}
    reasons = {r.variant: r.reason for r in runner.records()}
    assert "stopped after 2 epochs: mean metrics/mAP_0.5:0.95 0.0206" in reasons["b"]
    again = World()
    assert table(run(made, again, rule=Rule((2, 4), 0.5), always=("a",))) == table(runner)
    assert again.started == []


def test_halving_broken_off_stops_the_same(tmp_path):
    rule = {"rule": Rule((2,), 0.5), "always": ("a",), "slots": ("", "")}
    whole = table(run(jobs(tmp_path / "whole"), World(), **rule))
    made = jobs(tmp_path / "cut")
    for polls in (5, 8):
        with pytest.raises(KeyboardInterrupt):
            run(made, World(polls_left=polls), **rule)
    assert table(run(made, World(), **rule)) == whole


BY_SEED = {
    "a": (0.1, 0.1, 0.1), "b": (0.2, 0.2, 0.2), "c": (0.25, 0.25, 0.9), "d": (0.22, 0.3, 0.2), "e": (0.5, 0.5, 0.5),
    "f": (0.21, 0.21, 0.21),
}  # fmt: skip


class Chosen(World):
    """The metric of each variant and seed is given; "d seed 1" fails after its third epoch."""

    def value(self, job: Job, epoch: int) -> float:
        return round(BY_SEED[job.variant][job.seed] + epoch / 10000, 6)

    def __call__(self, job: Job, device: str) -> Fake:
        self.failing = {"d": 3} if str(job) == "d seed 1" else {}
        return super().__call__(job, device)


def test_failure_after_a_decision_undoes_nothing(tmp_path):
    rule = {"rule": Rule((2,), 0.5), "always": ("a",)}  # without a file of decisions, as in a study of an older version
    found = table(run(jobs(tmp_path, names="abcde"), Chosen(), **rule))
    assert {(v, s): status.value for v, s, status, _, _ in found if v in "cd"} == {
        ("c", 0): "stopped early", ("c", 1): "stopped early", ("d", 0): "finished", ("d", 1): "failed"
    }  # fmt: skip
    again = Chosen()
    assert table(run(jobs(tmp_path, names="abcde"), again, **rule)) == found
    assert again.started == []


def test_decisions_stay_when_seeds_and_variants_join(tmp_path):
    rule = {"rule": Rule((2,), 0.5), "always": ("a",), "decisions": tmp_path / "early_stop.json"}
    before = table(run(jobs(tmp_path, names="abcde"), Chosen(), **rule))
    world = Chosen()
    found = table(run(jobs(tmp_path, names="abcdef", seeds=(0, 1, 2)), world, **rule))  # c would now be better than d
    kept = [row for row in found if row[0] != "f" and row[1] < 2]
    assert kept == before
    joined = {(v, s): (status.value, reason) for v, s, status, _, reason in found if v == "f" or s == 2}
    why = next(reason for v, _, _, _, reason in before if v == "c")
    assert joined["c", 2] == ("stopped early", why)
    assert joined["d", 2] == joined["e", 2] == ("finished", "")
    assert joined["f", 0][0] == joined["f", 2][0] == "stopped early"
    assert {name for name, *_ in world.started if "f" not in name} == {f"{v} seed 2" for v in "abcde"}
    other = run(jobs(tmp_path, names="abcde", seeds=(0, 1, 2)), Chosen(), **{**rule, "rule": Rule((2,), 0.6)})
    assert "c" not in other.stopped  # another rule decides anew


def test_damaged_decisions_are_named(tmp_path):
    rule = {"rule": Rule((2,), 0.5), "decisions": tmp_path / "early_stop.json"}
    run(jobs(tmp_path, names="ab"), Chosen(), **rule)
    text = (tmp_path / "early_stop.json").read_text()
    (tmp_path / "early_stop.json").write_text(text.replace('"b": ""', '"b": 3'))
    with pytest.raises(UserError, match=r"early_stop\.json: damaged; remove it"):
        run(jobs(tmp_path, names="ab"), Chosen(), **rule)


def test_control_of_a_joined_variant_is_kept_though_it_was_stopped_before():
    follows = {"x control": ("x", "z")}
    means = {"x": 0.3, "y": 0.4, "z": 0.5, "x control": 0.1}
    decided = {"x": "stopped after 1 epochs", "y": ""}
    assert survivors(means, Rule((1,), 0.3), always=(), follows=follows, decided=decided) == {"y", "z", "x control"}


def test_metrics_of_a_stopped_run_are_of_the_stated_epoch(tmp_path):
    class Slow(Fake):  # trains an epoch more before it pauses
        def interrupt(self) -> None:
            self.poll()
            super().interrupt()

    class SlowWorld(World):
        def __call__(self, job: Job, device: str) -> Fake:
            self.running.append(Slow(self, job))
            return self.running[-1]

    made = jobs(tmp_path, names="abc", seeds=(0,))
    runner = run(made, SlowWorld(), rule=Rule((2,), 0.5), always=("a",))
    assert epochs_done(made[1]) == 3
    row = table(runner)[1]
    assert row[2] is Status.STOPPED
    assert row[3] == {METRIC: World().value(made[1], 1)}  # epochs are numbered from 0
    assert f"mean {METRIC} {row[3][METRIC]:.4f}" in row[4]


def test_rest_is_told_in_every_phase_of_an_early_stop(tmp_path, capsys, monkeypatch):
    clock = iter(range(0, 10_000, 60))
    monkeypatch.setattr(runner_module.time, "monotonic", lambda: next(clock))
    run(jobs(tmp_path, names="abc", seeds=(0,)), World(failing={"b": 1}), rule=Rule((2,), 0.5), always=("a",))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("pauses", "finished"))]
    assert lines[0] == "pauses a seed 0 after 2 epochs in 60 s, about 2 min left to epoch 2"
    assert lines[1] == "pauses c seed 0 after 2 epochs in 60 s"
    assert lines[2].endswith("2 of 3 runs, 1 of them failed, about 60 s left")


def test_controls_follow_their_variants():
    means = {"base": 0.1, "x": 0.5, "y": 0.4, "x control": 0.9, "y control": 0.8, "failed": float("nan")}
    follows = {"x control": ("x",), "y control": ("y",)}
    assert survivors(means, Rule((1,), 0.3), always=("base",), follows=follows) == {"base", "x", "x control"}
    shared = {"x control": ("x", "y"), "y control": ("y",)}
    assert survivors(means, Rule((1,), 0.3), always=("base",), follows=shared) == {"base", "x", "x control"}
    assert survivors({}, Rule((1,), 0.5), always=("base",), follows={}) == set()


def test_folder_of_another_study_is_refused(tmp_path):
    run(jobs(tmp_path), World())
    with pytest.raises(UserError, match=r"a-seed0: was trained with epochs 4, now 5; give another --name"):
        run(jobs(tmp_path, epochs=5), World())
    with pytest.raises(UserError, match="batch_size None, now 8"):
        run(jobs(tmp_path, batch_size=8), World())
    with pytest.raises(UserError, match="another network of this name"):
        run([Job("a", 0, tmp_path / "a-seed0", {"epochs": 4, "seed": 0}, network="other")], World())
    run([Job("a", 0, tmp_path / "a-seed0", {"epochs": 4, "seed": 0, "workers": 3}, network="a")], World())


def test_nothing_changes_in_the_folders_of_a_refused_study(tmp_path):
    run(jobs(tmp_path, names="b"), World())
    with pytest.raises(UserError, match="b-seed0: was trained with epochs 4, now 5"):
        run(jobs(tmp_path, names="ab", epochs=5), World())
    assert not (tmp_path / "a-seed0").exists()


def save_of(job: Job, *, epoch: int, batch: int) -> Path:
    """A save of a training that has come so far."""
    job.last.parent.mkdir(exist_ok=True)
    save_checkpoint(job.last, Checkpoint({}, "a.yaml", ("thing",), {"w": torch.ones(1)}, epoch=epoch, training={"batch": batch}))
    return job.last


@pytest.mark.parametrize(("epoch", "batch"), [(0, 0), (0, 3), (1, 0)])
def test_a_run_is_another_ones_once_it_has_made_a_step(tmp_path, epoch, batch):
    (before,), (now,) = jobs(tmp_path, names="a", seeds=(0,)), jobs(tmp_path, names="a", seeds=(0,), epochs=5)
    prepare(before)
    save = save_of(before, epoch=epoch, batch=batch)
    if epoch or batch:
        with pytest.raises(UserError, match="was trained with epochs 4, now 5"):
            prepare(now)
    else:
        prepare(now)
    assert save.exists() == bool(epoch or batch)
    assert read_json(now.folder / JOB_FILE)["flags"]["epochs"] == (4 if epoch or batch else 5)


def test_a_run_that_another_process_trains_does_not_begin_anew(tmp_path, monkeypatch):
    def refuse(lock: RunLock, folder: Path, **_: object) -> None:
        raise UserError(f"{folder}: process 1 trains in it")

    (before,), (now,) = jobs(tmp_path, names="a", seeds=(0,)), jobs(tmp_path, names="a", seeds=(0,), epochs=5)
    prepare(before)
    save = save_of(before, epoch=0, batch=0)
    monkeypatch.setattr(RunLock, "take", refuse)
    with pytest.raises(UserError, match="a-seed0: process 1 trains in it"):
        prepare(now)
    assert save.exists()


def test_other_version_of_a_file_is_refused_once_something_was_trained_with_it(tmp_path):
    weights = tmp_path / "start.pt"
    weights.write_bytes(b"first")
    first = file_hash(weights)

    def one(files):
        return [replace(job, files=files) for job in jobs(tmp_path, names="a", seeds=(0,))]

    prepare(one({first: str(weights)})[0])
    weights.write_bytes(b"second")
    second = file_hash(weights)
    prepare(one({second: str(weights)})[0])  # nothing was trained yet
    run(one({second: str(weights)}), World())
    with pytest.raises(UserError, match=r"a-seed0: was trained with another version of start\.pt; give another --name"):
        prepare(one({first: str(weights)})[0])
    with pytest.raises(UserError, match=r"was trained with start\.pt, now without it"):
        prepare(one({})[0])
    prepare(one({second: "elsewhere/renamed.pt"})[0])
    marks = read_json(tmp_path / "a-seed0" / JOB_FILE)
    del marks["files"]  # as an older version left it
    write_json(tmp_path / "a-seed0" / JOB_FILE, marks)
    world = World()
    run(one({second: str(weights)}), world)
    assert world.started == []
    with pytest.raises(UserError, match="another version"):
        prepare(one({first: str(weights)})[0])


def test_file_that_changes_while_the_study_runs_fails_the_runs_that_start_later(tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text("first")
    made = [replace(job, files={file_hash(plugin): str(plugin)} if job.variant == "b" else {}) for job in jobs(tmp_path, seeds=(0,))]

    class Editing(World):
        def __call__(self, job: Job, device: str) -> Fake:
            plugin.write_text("second")
            return super().__call__(job, device)

    found = table(run(made, Editing()))
    assert [status for _, _, status, _, _ in found] == [Status.FINISHED, Status.FAILED, Status.FINISHED]
    assert found[1][4].startswith(f"{plugin} has changed since the study began; put it back and start the study with --retry")


def test_more_seeds_and_variants_join_a_finished_study(tmp_path):
    run(jobs(tmp_path), World())
    world = World()
    found = table(run(jobs(tmp_path, names="abcd", seeds=(0, 1, 2)), world))
    assert len(world.started) == 6
    assert all(status is Status.FINISHED for _, _, status, _, _ in found)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"afte": [1]}, "early_stop: unknown key 'afte'; did you mean 'after'"),
        ({"after": [5, 3]}, "early_stop.after: ascending epochs from 1 to 9 are expected"),
        ({"after": [10]}, "early_stop.after: ascending epochs from 1 to 9"),
        ({}, "early_stop.after: ascending epochs"),
        ({"after": 3, "keep": 1.5}, "early_stop.keep: a fraction between 0 and 1 is expected, not 1.5"),
    ],
)
def test_wrong_rules_are_named(values, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        Rule.from_mapping(values, epochs=10, source="s.yaml")
    assert Rule.from_mapping({"after": 3}, epochs=10, source="s.yaml") == Rule((3,), 0.5)
