"""``--batch-size -1``: the largest batch that fits into memory, found by training steps on synthetic images."""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch

from data.augment.on_device import finished
from engine.micro_batches import TrainingMicroBatches
from engine.training.multi_scale import longest_side
from engine.training.nonfinite_guard import NonFiniteGuard
from engine.training.optim import build_optimizer, optimizer_step
from engine.training.recompute import checkpoint_activations
from models.model import Model
from utils import distributed
from utils.config import FIND_BATCH_SIZE as FIND
from utils.config import Hyperparameters, TrainConfig
from utils.errors import UserError
from utils.memory import free_bytes, is_out_of_memory, release_memory
from utils.precision import autocast, gradient_scaler, precision_of
from utils.random_state import random_state, set_random_state
from utils.sizes import round_up_to_stride
from utils.types import Batch, Finish, Letterbox, Targets, to_unit_range

FEW = 10  # batches an epoch, below which a warning is printed
BOXES = 100  # in a synthetic image: a mosaic of four crowded images
# Of the free memory; the rest is for pieces that the allocator cannot use, loader processes, and images with more boxes.
SHARE = {"cuda": 0.85, "cpu": 0.6}


def largest_batch(model: Model, config: TrainConfig, hyp: Hyperparameters, device: torch.device, *, images: int) -> int:
    """The batch size over all ranks that fits into the memory of the smallest; prints every trial.

    Args:
        images: of the data set; a batch is never larger.

    Raises:
        UserError: not one image fits, or the device's memory cannot be measured.
    """
    if device.type not in SHARE:
        raise UserError(f"--batch-size {FIND}: memory cannot be measured on {device.type}; give a number, such as 16")
    state, measure_peak = random_state(), make_trial(model, config, hyp, device)
    budget = int(free_bytes(device) * SHARE[device.type])
    own = search(measure_peak, budget=budget, most=max(images // distributed.world_size(), 1))
    release_memory(device)
    set_random_state(state)
    found = min(distributed.gather_objects(own)) * distributed.world_size()
    if not found:
        raise UserError(f"--batch-size {FIND}: not even one image of {config.imgsz} px fits into {_gib(budget)}; lower --imgsz")
    if distributed.is_main():
        within = f"within {_gib(budget)}, {SHARE[device.type]:.0%} of the free memory"
        limit = "as many as there are images" if found >= images else within
        print(f"--batch-size {FIND}: {found}, {limit}; give this number to repeat the run elsewhere")
        if images < FEW * found:
            few = -(-images // found)
            print(f"warning: {few} batch(es) an epoch of {images} images: a smaller --batch-size takes more steps", file=sys.stderr)
    return found


def search(measure_peak: Callable[[int], int | None], *, budget: int, most: int) -> int:
    """The largest number of images whose step stays within ``budget`` bytes: doubles it, then extrapolates from the last two and verifies.

    Args:
        measure_peak: bytes that a step of so many images takes; None where the memory was full.
        most: upper bound of the number of images.
    """
    peaks: list[tuple[int, int]] = []  # images, bytes
    images, too_many = 1, most + 1
    while images < too_many:
        peak = measure_peak(images)
        if peak is None or peak > budget:
            too_many = images
            break
        peaks.append((images, peak))
        if images == most:
            return most
        images = min(images * 2, most) if 2 * peak <= budget or len(peaks) < 2 else too_many
    if not peaks:
        return 0
    return _between(peaks, measure_peak, budget=budget, too_many=too_many)


def _between(peaks: list[tuple[int, int]], measure_peak: Callable[[int], int | None], *, budget: int, too_many: int) -> int:
    """The linear extrapolation, lowered until a step of that size fits; the largest measured size at worst."""
    fits, peak = peaks[-1]
    before, lower = peaks[-2] if len(peaks) > 1 else (0, 0)
    slope = max((peak - lower) / (fits - before), 1.0)
    guess = min(int(fits + (budget - peak) / slope), too_many - 1)
    while guess > fits:
        peak_then = measure_peak(guess)
        if peak_then is not None and peak_then <= budget:
            return guess
        guess = min(int(guess * 0.9), guess - 1)
    return fits


def make_trial(model: Model, config: TrainConfig, hyp: Hyperparameters, device: torch.device) -> Callable[[int], int | None]:
    """A function that runs two training steps of so many images on a copy of the model, and returns the peak of their memory in bytes.

    The copy takes the memory of the moving average that a run has beside its model. Two steps, as the first makes the optimizer's state.
    """
    copy = deepcopy(model).train()
    checkpoint_activations(copy, config.checkpoint_activations)
    loss = copy.head.build_loss(hyp)
    optimizer = build_optimizer(copy, hyp, name=config.optimizer, batch_size=hyp.nbs, accumulate=1)
    precision = precision_of(config.amp, device)
    scaler = gradient_scaler(device, precision)
    side = round_up_to_stride(config.imgsz, model.stride)
    side = longest_side(side, stride=model.stride) if config.multi_scale else side
    finish = finish_of(hyp) if device.type == "cuda" and model.spec.ch == 3 else None
    meter = PeakMeter(device)

    def steps(images: int) -> None:
        """Forward, loss, backward and optimizer step as of :class:`TrainingStep`."""
        guard = NonFiniteGuard(copy, loss.names, patience=0, folder=Path(), scaled=scaler.is_enabled())
        backup = TrainingMicroBatches(copy, loss, guard, device)  # of the buffers, beside the guard's own
        given = synthetic_batch(images, channels=model.spec.ch, side_px=side, nc=model.nc, seed=config.seed, finish=finish)
        for _ in range(2):
            batch = finished(given.to(device))
            with autocast(device, precision):
                output = copy(to_unit_range(batch.images, precision or torch.float32), copy.head.targets_of(batch))
            total = guard.total_loss(loss(output, batch), epoch=0, iteration=0, paths=batch.paths)
            scaler.scale(total * images).backward()
            non_finite = ~torch.isfinite(total.detach())  # of this rank alone: others may try other sizes
            guard.after_step(optimizer_step(optimizer, scaler, clip_norm=hyp.clip_norm, non_finite=non_finite), non_finite)
        del backup

    def measure_peak(images: int) -> int | None:
        meter.begin()
        try:
            steps(images)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            peak = None
        else:
            peak = meter.peak_bytes()
        optimizer.zero_grad(set_to_none=True)
        release_memory(device)
        if distributed.is_main():
            print(f"--batch-size {FIND}: {images} image(s) of {side} px take {'too much' if peak is None else _gib(peak)}")
        return peak

    return measure_peak


class PeakMeter:
    """Peak memory in bytes since ``begin``, above what was in use when the meter was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin()
        self.base = torch.cuda.memory_allocated(device) if device.type == "cuda" else self._status("VmRSS")

    def begin(self) -> None:
        """Resets the peak.

        Raises:
            UserError: the system does not report it.
        """
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            except OSError:
                raise UserError(f"--batch-size {FIND}: this system does not report a process's peak memory; give a number") from None

    def peak_bytes(self) -> int:
        """The peak since ``begin``."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.base
        return max(self._status("VmHWM") - self.base, 0)

    @staticmethod
    def _status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def finish_of(hyp: Hyperparameters) -> Finish:
    """What a loader leaves to the device for one image, in a form that changes nothing."""
    coloured = hyp.hsv_h or hyp.hsv_s or hyp.hsv_v
    tables = torch.arange(256, dtype=torch.uint8).expand(1, 3, 256) if coloured else None
    return Finish(torch.zeros(1, 2, dtype=torch.bool), tables)


def synthetic_batch(images: int, *, channels: int, side_px: int, nc: int, seed: int, finish: Finish | None = None) -> Batch:
    """A batch (images, channels, side_px, side_px) of noise with many boxes, and what is left to do to each image."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.rand(images * BOXES, 2, generator=generator) * 0.3 + 0.02
    centres = sizes / 2 + torch.rand(images * BOXES, 2, generator=generator) * (1 - sizes)
    classes = torch.randint(nc, (images * BOXES, 1), generator=generator).float()
    index = torch.arange(images).repeat_interleave(BOXES).view(-1, 1).float()
    pixels = torch.randint(256, (images, channels, side_px, side_px), dtype=torch.uint8, generator=generator)
    hw = torch.full((images, 2), side_px)
    letterbox = Letterbox(hw, torch.ones(images, 2), torch.zeros(images, 2))
    targets = Targets.of_rows(torch.cat((index, classes, centres, sizes), dim=1))
    left = None if finish is None else finish.map(lambda t: t.expand(images, *t.shape[1:]))
    return Batch(pixels, targets, ("synthetic",) * images, letterbox, max_boxes=BOXES, finish=left)


def _gib(amount: int) -> str:
    return f"{amount / 2**30:.2f} GiB"
