"""Steps that train on real files: the three precisions, exact resume, the loader's rate, and the tests that need a GPU."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from benchmarks.gpu.common import Check, Skip
from data.dataset_spec import load_dataset_spec
from data.labels.files import list_images
from data.loader import LoaderOptions, build_loader
from engine.logging.callbacks import Callback, RunInfo
from engine.training.nonfinite_guard import NonFiniteGuard
from models.checkpoints.checkpoint import load_checkpoint
from train import train
from utils.config import Hyperparameters, TrainConfig
from utils.types import Batch

ROOT = Path(__file__).resolve().parents[2]
END_S = 12  # kept for the end of a training: its validation and its weights


class Watch(Callback):
    """Counts iterations and images, notes when epochs end, and stops the training where it is told to.

    Args:
        iterations: after which the training is stopped; 0 for never.
        epochs: after which it is stopped, once they are saved; 0 for never.
        until: ``time.monotonic()`` at which it is stopped in any case.
    """

    def __init__(self, *, iterations: int = 0, epochs: int = 0, until: float = math.inf) -> None:
        self.last_iteration, self.last_epoch, self.until = iterations, epochs, until
        self.stopped = False
        self.iterations = self.images = 0
        self.started = 0.0
        self.ends: list[tuple[float, int]] = []  # of epochs: time, images so far
        self.rows: list[Mapping[str, float]] = []

    def on_train_start(self, run: RunInfo) -> None:
        self.started = time.perf_counter()

    def on_batch(self, run: RunInfo, epoch: int, iteration: int, batch: Batch) -> None:
        self.iterations += 1
        self.images += len(batch.images)
        if self.iterations == self.last_iteration or time.monotonic() > self.until:
            self._stop()

    def on_epoch_end(self, run: RunInfo, row: Mapping[str, float]) -> None:
        self.ends.append((time.perf_counter(), self.images))
        self.rows.append(row)
        if len(self.ends) == self.last_epoch:
            self._stop()

    def _stop(self) -> None:
        self.stopped = True
        raise KeyboardInterrupt

    def epoch_seconds(self) -> list[float]:
        """Of the epochs after the first; the epoch that validates may be among them."""
        return [b[0] - a[0] for a, b in zip(self.ends, self.ends[1:])]

    def rate(self) -> float:
        """Images a second from the end of the first epoch, or over everything where there was but one.

        The median over epochs, so that a last epoch with its validation does not count.
        """
        rates = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(self.ends, self.ends[1:])]
        return statistics.median(rates) if rates else self.images / (time.perf_counter() - self.started)


class Recorded:
    """Losses and verdicts of every step, kept on the device until they are asked for, so that nothing waits."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.taken: list[Tensor] = []
        self.names: tuple[str, ...] = ()

    def totals(self) -> list[float]:
        return torch.stack(self.losses)[:, -1].tolist() if self.losses else []

    def last(self) -> dict[str, float]:
        """Means of the last ten iterations, by part."""
        if not self.losses:
            return {}
        means = torch.stack(self.losses[-10:]).mean(0).tolist()
        return {name: round(value, 4) for name, value in zip(self.names, means)}

    def not_taken(self) -> int:
        return int((~torch.stack(self.taken)).sum()) if self.taken else 0


@contextmanager
def recorded() -> Iterator[Recorded]:
    """Records the losses that the guard of non-finite steps gets: callbacks do not get the loss of an iteration."""
    found, total_loss, after_step = Recorded(), NonFiniteGuard.total_loss, NonFiniteGuard.after_step

    def record_loss(self: NonFiniteGuard, *args: Any, **kwargs: Any) -> Tensor:
        total = total_loss(self, *args, **kwargs)
        found.losses.append(self._pending[-1].losses)
        found.names = self.names
        return total

    def record_step(self: NonFiniteGuard, applied: Tensor, non_finite: Tensor) -> None:
        found.taken.append(applied)
        after_step(self, applied, non_finite)

    NonFiniteGuard.total_loss, NonFiniteGuard.after_step = record_loss, record_step  # type: ignore[method-assign]
    try:
        yield found
    finally:
        NonFiniteGuard.total_loss, NonFiniteGuard.after_step = total_loss, after_step  # type: ignore[method-assign]


def config(check: Check, name: str, **changes: Any) -> TrainConfig:
    """What all trainings share."""
    device = "0" if check.device.type == "cuda" else "cpu"
    workers = min(check.sizes.workers, os.cpu_count() or 1)
    given = {
        "data": check.data, "imgsz": check.sizes.imgsz, "device": device, "workers": workers, "project": check.work, "name": name,
        "noval": True, "noplots": True, "nosave": True, "seed": 0,
    }  # fmt: skip
    return TrainConfig(**{**given, **changes})


def precision(check: Check) -> None:
    """One training in the precision that the step's name ends in: final losses, what was not finite, the curve beside float32's."""
    sizes, amp = check.sizes, check.step.partition("-")[2]
    images = len(list_images(load_dataset_spec(check.data).sources("train")))
    iterations = math.ceil(images / sizes.train_batch)
    epochs = max(1, round(sizes.train_iterations / iterations))
    stop_at = min(sizes.fp32_iterations, epochs * iterations - 1) if amp == "fp32" else 0
    watch = Watch(iterations=stop_at, until=check.deadline - END_S)
    flags = {"cfg": sizes.train_cfg, "amp": "off" if amp == "fp32" else amp, "batch_size": sizes.train_batch, "epochs": epochs}
    result, error = None, None
    with recorded() as found:
        try:
            result = train(config(check, check.step, **flags), callbacks=[watch])
        except KeyboardInterrupt:
            if not watch.stopped:
                raise
        except Exception as caught:
            error = caught
    curve = found.totals()
    if curve:
        check.row(
            sizes.train_cfg, iterations=len(curve), images_s=round(watch.rate(), 1), last=found.last(),
            last_total=round(statistics.fmean(curve[-10:]), 4), non_finite=sum(not math.isfinite(v) for v in curve),
            steps_not_taken=found.not_taken(), largest_gap=largest_gap(check, curve), curve=[round(v, 5) for v in curve],
            map50=round(float(result.best.map50), 4) if result else None,
        )  # fmt: skip
    if error is not None:
        raise error


def largest_gap(check: Check, curve: list[float]) -> float | None:
    """The largest relative difference to float32's total loss over the first iterations; None for float32 or without it."""
    plain = next((row["curve"] for row in check.earlier if row["step"] == "train-fp32" and "curve" in row), None)
    if plain is None:
        return None
    return round(max(abs(a - b) / abs(b) for a, b in zip(curve[: check.sizes.compared], plain)), 5)


def resume(check: Check) -> None:
    """A deterministic training beside one that was stopped after its first epoch and went on: are the weights bit-equal?"""
    flags = {"cfg": check.sizes.resume_cfg, "imgsz": check.sizes.resume_imgsz, "batch_size": check.sizes.train_batch, "epochs": 2}
    flags |= {"deterministic": True, "nosave": False, "amp": "auto"}
    whole = train(config(check, "whole", **flags)).last_weights
    try:
        train(config(check, "cut", **flags), callbacks=[Watch(epochs=1)])
    except KeyboardInterrupt:
        pass
    else:
        raise RuntimeError("the training did not stop")
    resumed = train(TrainConfig(resume=check.work / "cut" / "weights" / "last.pt")).last_weights
    differing = differences(whole, resumed)
    check.row(check.sizes.resume_cfg, bit_equal=not differing, differing=len(differing), first=differing[:3])
    if differing:
        again = differences(whole, train(config(check, "again", **flags)).last_weights)
        check.row("the whole training again", bit_equal=not again, differing=len(again), first=again[:3])


def differences(a: Path, b: Path) -> list[str]:
    """Tensors of two checkpoints that differ, each with its largest difference."""
    one, two = load_checkpoint(a).weights, load_checkpoint(b).weights
    changed = [name for name in one if not torch.equal(one[name], two[name])]
    return [f"{name} {(one[name].double() - two[name].double()).abs().max():.2e}" for name in changed]


def loader(check: Check) -> None:
    """Images a second of the loader alone and of the whole training loop, on the data's images repeated to a useful number."""
    sizes = check.sizes
    data = repeated(check)
    check.part("loader alone", lambda: loader_alone(check, data))
    watch = Watch(epochs=sizes.loader_epochs, until=check.deadline - END_S / 2)
    flags = {"cfg": sizes.loader_cfg, "batch_size": sizes.loader_batch, "epochs": sizes.loader_epochs + 1, "data": data}
    try:
        train(config(check, check.step, **flags), callbacks=[watch])
    except KeyboardInterrupt:
        if not watch.stopped:
            raise
    if len(watch.ends) < 2:
        raise Skip(f"{watch.iterations} iterations were done in the time")
    seconds = watch.epoch_seconds()
    check.row(
        sizes.loader_cfg, images_s=round(watch.rate(), 1), s_epoch=round(statistics.median(seconds), 2),
        images_epoch=watch.ends[0][1], workers=min(sizes.workers, os.cpu_count() or 1),
        first_s=round(watch.ends[0][0] - watch.started, 2),
    )  # fmt: skip


def loader_alone(check: Check, data: Path) -> None:
    """Images a second of the training batches, in page-locked memory on a GPU's host, which nobody takes a step with: the loop's limit."""
    sizes, until = check.sizes, time.monotonic() + check.left() / 4
    options = LoaderOptions(
        imgsz=sizes.imgsz, batch_size=sizes.loader_batch, hyp=Hyperparameters(), augment=True,
        workers=min(sizes.workers, os.cpu_count() or 1), finish_on_device=check.device.type == "cuda",
    )  # fmt: skip
    batches, rates = build_loader(load_dataset_spec(data), "train", options), []
    for epoch in range(sizes.loader_epochs):
        batches.set_epoch(epoch)
        started, images = time.perf_counter(), 0
        for batch in batches:
            images += len(batch.images)
            if time.monotonic() > until:
                break
        rates.append(images / (time.perf_counter() - started))
        if time.monotonic() > until:
            break
    check.row("loader alone", images_s=round(statistics.median(rates[1:] or rates), 1), workers=options.workers, epochs=len(rates))


def repeated(check: Check) -> Path:
    """A dataset YAML whose training images are copies of the data's, up to the wanted number."""
    spec, folder = load_dataset_spec(check.data), check.work / "repeated"
    options = LoaderOptions(imgsz=check.sizes.imgsz, batch_size=1, hyp=Hyperparameters(), augment=False, workers=0)
    dataset = build_loader(spec, "train", options).dataset
    for kind in ("images", "labels"):
        (folder / kind / "train").mkdir(parents=True)
    for copy in range(max(1, round(check.sizes.loader_images / len(dataset.image_files)))):
        for image, labels in zip(map(Path, dataset.image_files), dataset.labels):
            shutil.copyfile(image, folder / "images" / "train" / f"{copy}-{image.name}")
            lines = (f"{int(row[0])} {' '.join(f'{v:.6f}' for v in row[1:5])}\n" for row in labels)
            (folder / "labels" / "train" / f"{copy}-{image.stem}.txt").write_text("".join(lines))
    val = [str(p.resolve()) for p in spec.sources("val")]
    values = {"path": str(folder), "train": "images/train", "val": val, "names": dict(enumerate(spec.names))}
    (folder / "data.yaml").write_text(yaml.safe_dump(values))
    return folder / "data.yaml"


def tests(check: Check) -> None:
    """The tests with the mark ``gpu``, in a process of their own: how many passed, and which did not."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--no-header", "-rfE", "--tb=line", "-p", "no:cacheprovider"]
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    running = subprocess.Popen(
        [*command, *check.sizes.tests], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = running.communicate(timeout=max(5.0, check.left() - 5))
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        said, _ = running.communicate()
        said += "\ntimed out"
    print(said[-20000:])
    if running.returncode == 5:
        raise Skip("no such tests")
    wrong = running.returncode not in (0, 5)
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
    progress = said.count(".") if "timed out" in last else None
    check.row(
        "pytest -m gpu", status="failed" if wrong else "ok", reason=last[:200] if wrong else "", **counts(last),
        failures=[failure[:300] for failure in re.findall(r"^(?:FAILED|ERROR) (.*)", said, re.MULTILINE)], dots_until_timeout=progress,
    )  # fmt: skip


def counts(summary: str) -> dict[str, int]:
    """The numbers in the last line that pytest prints."""
    found = {word: re.search(rf"(\d+) {word}", summary) for word in ("passed", "failed", "skipped", "error")}
    return {word: int(match[1]) if match else 0 for word, match in found.items()}
