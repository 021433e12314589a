"""The checks of a model YAML: build, one training step, validation, fusing, deployment, ONNX export.

Images are small, of noise with a few boxes. The outputs of a new network are nearly constant, so that a comparison of two forms of it could
not fail: before comparisons the batch norms take the statistics of a batch and the biases of the head are set to zero.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.evaluation.evaluate import EvaluationOptions, evaluate
from engine.memory_format import channels_last
from engine.task_presets import HYPS
from engine.training.optim import build_optimizer, optimizer_step
from engine.training.recipes import family_hyp, find_hyp
from models.analysis.compare import prediction_difference
from models.build import build_model
from models.export.exporting import ExportOptions, export_model
from models.model import Model
from tasks.base import targets_of_images
from utils.config import Hyperparameters
from utils.errors import UserError, place_in_plugin
from utils.instances import Instances
from utils.memory import is_out_of_memory
from utils.precision import gradient_scaler
from utils.reading.yaml_text import read_yaml
from utils.sizes import round_up_to_stride
from utils.types import Batch, Letterbox, to_unit_range

CHECKS = ("build", "train", "val", "fuse", "deploy", "onnx")
BATCH, BOXES = 2, 3  # images, and boxes in each
# between a network and its fused form, both in float32: fusing multiplies weights in another order
BOX_TOLERANCE_PX, SCORE_TOLERANCE = 1e-3, 1e-5
STATISTICS_MOMENTUM = 0.9  # weight of the batch in the running statistics; with 1.0, rounding errors would grow from norm to norm


@dataclass(frozen=True)
class Case:
    """One YAML at one scale, a letter of the v8 dialect; empty for a file without scales."""

    cfg: Path
    scale: str = ""

    @property
    def name(self) -> str:
        """Path and scale, for messages."""
        return f"{self.cfg.as_posix()}{f' ({self.scale})' if self.scale else ''}"


@dataclass
class Report:
    """The results of one case.

    Attributes:
        reasons: of failure by check, empty for a pass; a check that did not run is missing.
    """

    case: Case
    reasons: dict[str, str] = field(default_factory=dict)
    parameters: int = 0
    size: tuple[int, int] = (0, 0)  # height and width of the rectangular images, px
    seconds: float = 0.0  # of processor time
    peak_mib: float = 0.0
    out_of_memory: bool = False

    @property
    def passed(self) -> bool:
        """Whether every check ran and passed."""
        return list(self.reasons) == list(CHECKS) and not any(self.reasons.values())

    @property
    def failure(self) -> str:
        """The first failed check and its reason, in a line; empty for a pass."""
        return next((f"{check}: {reason}" for check, reason in self.reasons.items() if reason), "")


def run_checks(case: Case, *, side: int = 64, limit: str = "", on_check: Callable[[str], object] = lambda name: None) -> Report:
    """Runs all checks of one case.

    Args:
        side: of the training images, px; rounded up to the network's stride, and rectangles are one stride wider.
        limit: the flag that bounds the memory, such as ``--memory 2``, for messages.
        on_check: called with the name of each check before it runs.
    """
    report, checks = Report(case), NetworkChecks(case, side)
    for check in CHECKS:
        on_check(check)
        try:
            getattr(checks, f"check_{check}")()
        except Exception as error:  # any error of a check is a line of the report
            report.reasons[check], place = _one_line(error), place_in_plugin(error)
            if is_out_of_memory(error):
                report.reasons[check] = f"out of memory{f' ({limit})' if limit else ''}: {report.reasons[check]}"
                report.out_of_memory = True
            elif place and place not in report.reasons[check]:
                report.reasons[check] = f"{place}: {report.reasons[check]}"
        else:
            report.reasons[check] = ""
        if check == "build" and report.reasons[check]:
            break
    if checks.model is not None:
        report.parameters = sum(p.numel() for p in checks.model.parameters())
        report.size = checks.rectangle
    return report


class NetworkChecks:
    """The checks, a method each, which raises if it fails.

    Args:
        case: the YAML and its scale.
        side: of the training images, px.
    """

    def __init__(self, case: Case, side: int) -> None:
        self.case, self.min_side = case, side
        self.model: Model | None = None
        self.is_randomized = False

    @property
    def network(self) -> Model:
        """The model, after ``check_build``."""
        assert self.model is not None
        return self.model

    @property
    def side(self) -> int:
        """Of square images, px."""
        return round_up_to_stride(self.min_side, self.network.stride)

    @property
    def rectangle(self) -> tuple[int, int]:
        """Height and width of rectangular images, px."""
        return self.side, self.side + self.network.stride

    def check_build(self) -> None:
        """Builds the network."""
        torch.manual_seed(0)
        self.model = build_model(read_at_scale(self.case))

    def check_train(self) -> None:
        """Forward, loss, backward and an optimizer step as in a training; every parameter must get a gradient."""
        model, hyp = channels_last(self.network).train(), self._hyp()
        batch = noise_batch(model, self.side, self.side)
        optimizer = build_optimizer(model, hyp, name="SGD", batch_size=BATCH, accumulate=1)
        parts = model.head.build_loss(hyp)(model(to_unit_range(batch.images), model.head.targets_of(batch)), batch)
        require_finite(parts, "loss")
        (sum(parts.values(), start=torch.zeros(())) * BATCH).backward()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        missing = [name for name, p in trained.items() if p.grad is None]
        if missing:
            raise UserError(f"no gradient reaches {', '.join(missing[:3])}{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}")
        require_finite({name: p.grad for name, p in trained.items() if p.grad is not None}, "gradient of")
        optimizer_step(optimizer, gradient_scaler(torch.device("cpu"), None), clip_norm=hyp.clip_norm)
        require_finite(trained, "after the step")

    def check_val(self) -> None:
        """One batch of rectangles through validation: loss, decoding, suppression and metrics."""
        model = self._randomized_network()
        batch = noise_batch(model, *self.rectangle)
        metrics = evaluate(model, [batch], EvaluationOptions(progress=False), loss=model.head.build_loss(self._hyp()))
        require_finite({name: torch.tensor(value) for name, value in metrics.losses.items()}, "loss")
        name, value = metrics.headline
        if not 0 <= value <= 1:
            raise UserError(f"{name} {value} on noise")

    def check_fuse(self) -> None:
        """The fused network predicts the same."""
        self._require_same_predictions(self._randomized_network().fuse(), "the fused network")

    def check_deploy(self) -> None:
        """The deployed network has one branch and predicts the same."""
        deployed = self._randomized_network().deploy()
        if len(deployed.head.branch_weights) != 1:
            raise UserError(f"{len(deployed.head.branch_weights)} branches are left")
        self._require_same_predictions(deployed, "the deployed network")

    def check_onnx(self) -> None:
        """Exports with dynamic sizes; the export compares onnxruntime with torch on several sizes."""
        with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
            export_model(self._randomized_network(), "onnx", Path(folder) / "model.onnx", ExportOptions(imgsz=self.rectangle, dynamic=True))

    def _hyp(self) -> Hyperparameters:
        model = self.network
        family = family_hyp(model.spec.origin, model.spec.dialect, model.head.anchor_based, scale=model.spec.scale)
        return Hyperparameters.from_yaml(find_hyp(family, HYPS))

    def _randomized_network(self) -> Model:
        """The network in evaluation mode, with outputs that vary over the image."""
        model = self.network
        if not self.is_randomized:
            model.zero_grad(set_to_none=True)
            randomize_weights(model, noise_images(2 * BATCH, model.ch, *self.rectangle))
            self.is_randomized = True
        return model.eval()

    def _require_same_predictions(self, other: Model, what: str) -> None:
        images = noise_images(1, self.network.ch, *self.rectangle)
        boxes_px, scores = prediction_difference(self.network.predict(images), other.predict(images))
        if not (boxes_px < BOX_TOLERANCE_PX and scores < SCORE_TOLERANCE):
            raise UserError(f"{what} differs by {boxes_px:.1e} px and {scores:.1e} in score")


def read_at_scale(case: Case) -> Mapping[str, Any]:
    """The YAML as a dictionary with the scale letter in it.

    Raises:
        UserError: not a model YAML.
    """
    data = read_yaml(case.cfg, expected="keys such as nc, backbone and head")
    return {**data, "yaml_file": case.cfg.name, **({"scale": case.scale} if case.scale else {})}


def noise_images(count: int, channels: int, height: int, width: int) -> Tensor:
    """Noise (count, channels, height, width) in 0-1, the same for the same arguments."""
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(count))


def noise_batch(model: Model, height: int, width: int) -> Batch:
    """A batch of noise with a few boxes of every size in each image."""
    draw = torch.Generator().manual_seed(1)
    images = (noise_images(BATCH, model.ch, height, width) * 255).to(torch.uint8)
    classes = torch.randint(model.nc, (BATCH * BOXES,), generator=draw)
    centres = 0.3 + 0.4 * torch.rand(BATCH * BOXES, 2, generator=draw)
    half = torch.linspace(0.15, 0.6, BOXES).repeat(BATCH)[:, None] / 2
    boxes = (torch.cat((centres - half, centres + half), dim=1) * torch.tensor([width, height] * 2)).numpy()
    objects = [objects_of(c, b) for c, b in zip(classes.numpy().reshape(BATCH, -1), boxes.reshape(BATCH, -1, 4))]
    targets = targets_of_images([model.task.targets(one, (height, width)) for one in objects])
    letterbox = Letterbox(torch.tensor([[height, width]] * BATCH), torch.ones(BATCH, 2), torch.zeros(BATCH, 2))
    return Batch(images, targets, tuple(f"noise{i}" for i in range(BATCH)), letterbox, BOXES)


def objects_of(classes: NDArray, boxes_xyxy: NDArray) -> Instances:
    """Objects (n,) with boxes (n, 4) in px and their corners as polygons, of which a task makes its targets."""
    corners = boxes_xyxy[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2)
    return Instances(classes.astype(np.float32), boxes_xyxy.astype(np.float32), corners.astype(np.float32), np.full(len(classes), 4))


@torch.no_grad()
def randomize_weights(model: Model, images: Tensor) -> None:
    """Makes the outputs of a new network vary, in place: norms take the statistics of ``images``, and scores are near 0.5, not near 0."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = STATISTICS_MOMENTUM
    model.train()(images)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    for layer in model.head.modules():
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            layer.bias.zero_()


def require_finite(values: Mapping[str, Tensor], what: str) -> None:
    """Raises UserError naming the first tensor that holds NaN or infinity."""
    non_finite = next((name for name, value in values.items() if not torch.isfinite(value).all()), None)
    if non_finite is not None:
        raise UserError(f"{what} {non_finite} is not finite")


def failure_lines(reports: Iterable[Report]) -> list[str]:
    """A line for each case that failed: file and reason."""
    return [f"{report.case.name}: {report.failure}" for report in reports if not report.passed]


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:400]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
