"""Steps that need no data set: speed and memory of training steps, waits, latency, attention modules."""

from __future__ import annotations

import collections
import os
import statistics
import sys
import time
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.common import BOXES_PER_IMAGE, CLASSES, Check, Skip, allocated_mib, brief, free, peak_mib, synchronize
from data.augment.colour import level_tables
from engine.logging.progress import LossMeter
from engine.memory_format import channels_last
from engine.training.compiling import compile_loss, compile_network, unsupported_reason
from engine.training.ema import ModelEMA
from engine.training.initial_weights import FrozenLayers
from engine.training.nonfinite_guard import NonFiniteGuard
from engine.training.optim import build_optimizer
from engine.training.schedule import Schedule
from engine.training.step import TrainingState, TrainingStep
from models import build_model
from utils.config import Hyperparameters, TrainConfig
from utils.precision import autocast, choose_kernels, gradient_scaler
from utils.types import Batch, Finish, Letterbox, Targets, to_unit_range

ROOT = Path(__file__).resolve().parents[2]
HYP = Hyperparameters(lr0=1e-3, warmup_epochs=0)


def synthetic_batch(size: int, imgsz: int) -> Batch:
    """Random images with ``BOXES_PER_IMAGE`` boxes each on the host, whose colour and flips a loader has left to the GPU."""
    generator = torch.Generator().manual_seed(1)
    count = size * BOXES_PER_IMAGE
    image = torch.arange(size).repeat_interleave(BOXES_PER_IMAGE)[:, None].float()
    classes = torch.randint(0, CLASSES, (count, 1), generator=generator).float()
    centre = 0.2 + 0.6 * torch.rand(count, 2, generator=generator)
    side = 0.05 + 0.25 * torch.rand(count, 2, generator=generator)
    images = torch.randint(0, 256, (size, imgsz, imgsz, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    gains = torch.tensor((HYP.hsv_h, HYP.hsv_s, HYP.hsv_v))
    factors = 1 + gains * (2 * torch.rand(size, 3, generator=generator) - 1)
    tables = torch.stack([torch.from_numpy(level_tables(row.numpy())) for row in factors])
    finish = Finish(torch.rand(size, 2, generator=generator) < torch.tensor((HYP.flipud, HYP.fliplr)), tables)
    sides = torch.full((size, 2), imgsz)
    letterbox = Letterbox(sides, torch.ones_like(sides).float(), torch.zeros_like(sides).float())
    targets = Targets.of_rows(torch.cat([image, classes, centre, side], 1))
    return Batch(images, targets, ("",) * size, letterbox, BOXES_PER_IMAGE, finish=finish)


class OurStep:
    """The training step of train.py (``TrainingStep`` and the loss meter) on one batch, at a fixed learning rate."""

    def __init__(self, check: Check, cfg: str, batch: Batch, *, compiled: bool = False) -> None:
        device, size = check.device, len(batch.images)
        torch.manual_seed(0)
        model = channels_last(build_model(cfg, nc=CLASSES).to(device)).train()
        ema, loss = ModelEMA(model), model.head.build_loss(HYP)
        if compiled and compile_network(model, device, sizes_vary=False):
            compile_loss(loss, device, sizes_vary=False)
        optimizer = build_optimizer(model, HYP, batch_size=size, accumulate=1)
        state = TrainingState(model, model, FrozenLayers(), loss, ema, optimizer, gradient_scaler(device, check.precision))
        guard = NonFiniteGuard(model, loss.names, patience=0, folder=check.work, scaled=state.scaler.is_enabled())
        schedule = Schedule(HYP, "fixed", epochs=1, iterations=1, batch_size=size, accumulate=1)
        config = TrainConfig(imgsz=batch.images.shape[-1])
        self.step = TrainingStep(state, schedule, guard, config, clip_norm=HYP.clip_norm, device=device, precision=check.precision)
        self.meter = LossMeter(loss.names, finite_only=True)
        self.batch, self.model = batch, model
        self.choose_kernels()

    @staticmethod
    def choose_kernels() -> None:
        """What train.py lets cuDNN and cuBLAS choose."""
        choose_kernels(deterministic=False, sizes_vary=False)

    def __call__(self) -> None:
        self.step.begin(0, 0, is_last=True)
        parts, _ = self.step.backward(self.batch)
        self.step.update_weights()
        self.meter.update(parts)

    def read_losses(self) -> None:
        """What train.py does every ten iterations to log the losses."""
        self.step.guard.check()
        self.meter.means()
        if self.step.micro_batches.count > 1:
            raise Skip("the memory was full: the batch was split into micro-batches")


class PeerStep:
    """The training step of ultralytics: its network, channels-last on CUDA as its trainer makes it, its loss and moving average, float16
    autocast, SGD over its three groups."""

    def __init__(self, check: Check, cfg: str, batch: Batch) -> None:
        get_cfg, DetectionModel, ema_class = _peer()
        torch.manual_seed(0)
        layout = torch.channels_last if check.device.type == "cuda" else torch.contiguous_format
        self.model = DetectionModel(cfg, nc=CLASSES, verbose=False).to(check.device, memory_format=layout).train()
        self.model.args = get_cfg(overrides={"box": 7.5, "cls": 0.5, "dfl": 1.5})
        self.ema, self.scaler = ema_class(self.model), gradient_scaler(check.device, check.precision)
        self.optimizer = torch.optim.SGD(_peer_groups(self.model), lr=HYP.lr0, momentum=HYP.momentum, nesterov=True)
        targets = batch.targets.rows()
        self.images = batch.images.contiguous()  # as its loader gives them
        self.labels = {"batch_idx": targets[:, 0], "cls": targets[:, 1:2], "bboxes": targets[:, 2:]}
        self.device, self.precision = check.device, check.precision
        self.choose_kernels()

    @staticmethod
    def choose_kernels() -> None:
        """torch's own choice, as its trainer leaves it; not that trainer's default ``deterministic``, which would slow it."""
        torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = True

    def __call__(self) -> None:
        with autocast(self.device, self.precision):
            loss = self.model.loss({"img": self.images.float() / 255, **self.labels})[0].sum()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=10.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.ema.update(self.model)

    def read_losses(self) -> None:
        """It takes no look of its own."""


def _peer() -> tuple[Any, Any, Any]:
    """ultralytics' settings, network and moving average.

    Raises:
        Skip: it is not installed, or needs what is not.
    """
    os.environ.setdefault("YOLO_OFFLINE", "true")
    os.environ.setdefault("YOLO_VERBOSE", "false")
    try:
        from ultralytics.cfg import get_cfg
        from ultralytics.nn.tasks import DetectionModel
        from ultralytics.utils.torch_utils import ModelEMA as PeerEMA
    except Exception as error:
        raise Skip(f"ultralytics cannot be imported ({type(error).__name__}: {error})") from None
    return get_cfg, DetectionModel, PeerEMA


def _peer_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights with decay, weights of normalisations and biases without."""
    norms = tuple(kind for name, kind in nn.__dict__.items() if "Norm" in name and isinstance(kind, type))
    groups: tuple[list[nn.Parameter], ...] = ([], [], [])
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                groups[2 if "bias" in name else 1 if isinstance(module, norms) else 0].append(parameter)
    return [{"params": g, "weight_decay": HYP.weight_decay if i == 0 else 0.0} for i, g in enumerate(groups)]


def throughput(check: Check) -> None:
    """Images a second and peak memory of the training step on a batch that lies on the device, ours and the peer's in turn."""
    batch = synthetic_batch(check.sizes.step_batch, check.sizes.imgsz).to(check.device)
    for ours, peer in check.sizes.networks:
        check.part(ours, partial(_throughput, check, batch, ours, peer), needs_s=8)


def compiled(check: Check) -> None:
    """The same with torch.compile, beside the eager step."""
    if not check.sizes.compiled:
        raise Skip("no network is compiled at this size")
    if reason := unsupported_reason(check.device):
        raise Skip(f"torch.compile does not work here: {reason}")
    batch = synthetic_batch(check.sizes.step_batch, check.sizes.imgsz).to(check.device)
    for cfg in check.sizes.compiled:
        check.part(cfg, partial(_compiled, check, batch, cfg), needs_s=30)


def _throughput(check: Check, batch: Batch, ours: str, peer: str) -> None:
    sides: dict[str, Callable[[], Any]] = {"ours": partial(OurStep, check, ours, batch)}
    if peer:
        sides["peer"] = partial(PeerStep, check, peer, batch)
    _beside(check, sides, {"ours": ours, "peer": peer}, len(batch.images))


def _compiled(check: Check, batch: Batch, cfg: str) -> None:
    sides = {"eager": partial(OurStep, check, cfg, batch), "compiled": partial(OurStep, check, cfg, batch, compiled=True)}
    _beside(check, sides, {"eager": cfg, "compiled": cfg}, len(batch.images))


def _beside(check: Check, sides: dict[str, Callable[[], Any]], names: dict[str, str], images: int) -> None:
    """Builds and warms every side, then times blocks of them in turn; a row a side. A side that fails leaves the others."""
    steps, memory, warm = {}, {}, {}
    for side, build in sides.items():
        free(check.device)
        before, started = allocated_mib(check.device), time.perf_counter()
        try:
            step = build()
            for _ in range(check.sizes.warm_up):
                step()
            step.read_losses()
            synchronize(check.device)
        except Exception as error:
            traceback.print_exc()
            check.row(names[side], side=side, status="skipped" if isinstance(error, Skip) else "failed", reason=brief(error))
            continue
        steps[side], memory[side], warm[side] = step, peak_mib(check.device) - before, time.perf_counter() - started
    seconds: dict[str, list[float]] = {side: [] for side in steps}
    for _ in range(check.sizes.rounds):
        for side, step in steps.items():
            step.choose_kernels()
            synchronize(check.device)
            started = time.perf_counter()
            for _ in range(check.sizes.block):
                step()
            step.read_losses()
            synchronize(check.device)
            seconds[side].append((time.perf_counter() - started) / check.sizes.block)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    base = next(iter(medians.values()), 0.0)
    for side, median in medians.items():
        check.row(
            names[side], side=side, images_s=round(images / median, 1), ms=round(1e3 * median, 2), spread=_spread(seconds[side]),
            peak_mib=round(memory[side]), relative_speed=round(base / median, 3), warm_up_s=round(warm[side], 1),
        )  # fmt: skip


def _spread(values: list[float]) -> str:
    """How far the fastest and slowest block are from the median."""
    median = statistics.median(values)
    return f"{100 * (min(values) / median - 1):+.0f}..{100 * (max(values) / median - 1):+.0f}%"


def waits(check: Check) -> None:
    """Calls of one training step that wait for the device, by the project's line, and the number of kernels of a step."""
    for cfg in check.sizes.waits:
        check.part(cfg, partial(_waits, check, cfg), needs_s=6)


def _waits(check: Check, cfg: str) -> None:
    batch = synthetic_batch(check.sizes.step_batch, check.sizes.imgsz)
    if check.device.type == "cuda":
        finish = batch.finish and batch.finish.pin_memory()
        batch = batch._replace(images=batch.images.pin_memory(), targets=batch.targets.pin_memory(), finish=finish)
    step = OurStep(check, cfg, batch)
    first = waiting_lines(step, check.device)
    for _ in range(check.sizes.warm_up):
        step()
    step.read_losses()
    steady = waiting_lines(step, check.device)
    look = waiting_lines(step.read_losses, check.device)
    counts = {"waits": sum(steady.values()), "first_step": sum(first.values()), "look": sum(look.values())}
    check.row(cfg, **counts, lines=dict(steady), first_lines=dict(first))
    check.row(cfg, **kernels(step, check.device))


def waiting_lines(call: Callable[[], None], device: torch.device) -> collections.Counter[str]:
    """How often each line of the project waits for the device in a call; empty where the device cannot tell."""
    found: collections.Counter[str] = collections.Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):
            frames = [f for f in traceback.extract_stack()[:-1] if Path(f.filename).is_relative_to(ROOT) and ".venv" not in f.filename]
            inner = [f for f in frames if "benchmarks" not in Path(f.filename).relative_to(ROOT).parts]
            frame = (inner or frames)[-1]
            found[f"{Path(frame.filename).relative_to(ROOT)}:{frame.lineno} {frame.line}"] += 1

    synchronize(device)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return found


def kernels(step: OurStep, device: torch.device) -> dict[str, Any]:
    """Kernels and copies of one step, and how long the device works on them; on a CPU operators are counted instead."""
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])
    synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        synchronize(device)
    events = list(profile.events() or ())
    if not on_gpu:
        return {"operators": len(events)}
    events = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]
    copies = [e for e in events if e.name.startswith(("Memcpy", "Memset"))]
    launched = [e for e in events if not e.name.startswith(("Memcpy", "Memset", "Optimizer.", "ProfilerStep"))]
    busy_us = sum(e.time_range.elapsed_us() for e in launched)
    most = collections.Counter(e.name[:80] for e in launched).most_common(8)
    return {"kernels": len(launched), "copies": len(copies), "device_ms": round(busy_us / 1e3, 2), "most_frequent": dict(most)}


def latency(check: Check) -> None:
    """Milliseconds of a call of deployed networks, ours (autocast as ``--half`` runs it, and half weights) and the peer's in turn."""
    for ours, peer in check.sizes.latency:
        for size in check.sizes.latency_batches:
            check.part(f"{ours} x{size}", partial(_latency, check, ours, peer, size), needs_s=4)


@torch.no_grad()
def _latency(check: Check, ours: str, peer: str, size: int) -> None:
    device = check.device
    images = to_unit_range(synthetic_batch(size, check.sizes.imgsz).images).to(device)
    low = images.to(check.precision or torch.float32)
    model = channels_last(build_model(ours, nc=CLASSES).deploy().to(device))
    half = channels_last(build_model(ours, nc=CLASSES).deploy().to(device))
    half = half.half() if check.precision else half

    def cast() -> Any:
        with autocast(device, check.precision):
            return model.predict(images)

    calls: dict[str, Callable[[], Any]] = {"ours autocast": cast, "ours half weights": lambda: half.predict(low)}
    if peer:
        try:
            calls["peer half weights"] = _peer_call(check, peer, low.contiguous())
        except Exception as error:  # ours is measured all the same
            check.row(f"{peer} x{size}", side="peer", status="skipped" if isinstance(error, Skip) else "failed", reason=brief(error))
    usable: dict[str, list[float]] = {}
    for side, call in calls.items():
        try:
            for _ in range(check.sizes.warm_up):
                call()
            synchronize(device)
            usable[side] = []
        except Exception as error:
            check.row(f"{ours} x{size}", side=side, status="failed", reason=brief(error))
    for _ in range(check.sizes.rounds):
        for side, times in usable.items():
            for _ in range(check.sizes.latency_calls):
                started = time.perf_counter()
                calls[side]()
                synchronize(device)
                times.append(time.perf_counter() - started)
    for side, times in usable.items():
        ms = 1e3 * statistics.median(times)
        name = f"{peer if side.startswith('peer') else ours} x{size}"
        check.row(name, side=side, ms=round(ms, 3), images_s=round(1e3 * size / ms, 1))


def _peer_call(check: Check, cfg: str, images: Tensor) -> Callable[[], Any]:
    _, DetectionModel, _ = _peer()
    network = DetectionModel(cfg, nc=CLASSES, verbose=False).eval().fuse(verbose=False).to(check.device)
    network = network.half() if check.precision else network
    return lambda: network(images)


def attention(check: Check) -> None:
    """Part A modules beside their plain formulas, forward and backward, float32, channels last."""
    sys.path.insert(0, str(ROOT / "benchmarks"))  # for the files that bench_attention imports
    import bench_attention

    for shape in check.sizes.attention_shapes:
        for name in check.sizes.attention:
            check.part(f"{name} {shape}", partial(_attention, check, bench_attention, name, shape))


def _attention(check: Check, bench: Any, name: str, shape: str) -> None:
    batch, channels, height, width = map(int, shape.split("x"))
    pairs_gb = 4 * batch * bench._cases()[name].pair_floats(height * width, channels) / 2**30
    sides = ["ours"] if pairs_gb > check.sizes.attention_limit_gb else ["plain", "ours"]
    found: dict[str, dict[str, float]] = {}
    for side in sides:
        free(check.device)
        found[side] = bench._measure(
            Namespace(
                one=(name, shape, "channels_last", side), threads=1, device=check.device.type, repeats=check.sizes.attention_repeats,
                limit_gb=check.sizes.attention_limit_gb,
            )
        )  # fmt: skip
    values = {f"{side}_{key}": round(result[key], 3) for side, result in found.items() for key in ("ms", "mb")}
    if "plain" in found:
        values["faster"] = round(found["plain"]["ms"] / found["ours"]["ms"], 2)
        values["difference"] = float(f"{found['ours']['difference']:.1e}")
    else:
        values["plain_needs_gb"] = round(pairs_gb, 1)
    check.row(f"{name} {shape}", **values)
