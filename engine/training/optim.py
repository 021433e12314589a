"""Parameter groups, optimizers and the step itself: every trainable parameter is in exactly one of three groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.training.learning_rates import class_rates
from engine.training.optimizers.lion import Lion
from engine.training.optimizers.musgd import MuSGD
from engine.training.schedule import StepSettings
from utils.errors import UserError
from utils.hyperparameters import OPTIMIZERS, Hyperparameters
from utils.precision import update_scale

GROUPS = ("bias", "decay", "no_decay")  # also the order of x/lr0, x/lr1, x/lr2 in results.csv
NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)
# Parts of names of tables that are added, not multiplied: position encodings (Swin, arXiv 2103.14030, trains them without decay).
POSITION_NAMES = ("relative_position", "rel_pos", "pos_embed", "position_bias")


def parameter_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every parameter that needs a gradient, once: biases; weights with decay; the rest without.

    Without decay are the weights of normalisations, vectors that scale or shift (a layer scale ``gamma``, implicit vectors) and
    position tables.
    A parameter shared by two modules counts where it is found first.
    """
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                groups[_group_of(module, name, parameter)].append(parameter)
    return groups


def build_optimizer(
    model: nn.Module,
    hyp: Hyperparameters,
    *,
    name: str = "SGD",
    batch_size: int,
    accumulate: int,
    multipliers: Mapping[str, float] | None = None,
) -> Optimizer:
    """SGD with Nesterov momentum, Adam, AdamW, LION or MuSGD over the three groups.

    With MuSGD the weights that are decayed are those that are orthogonalised, and the class towers learn three times as fast.

    Args:
        batch_size: over all processes.
        accumulate: after warm-up. Weight decay is scaled by batch_size * accumulate / nominal batch.
        multipliers: parameter name -> factor of its learning rate; such parameters are in groups of their own after the three.

    Raises:
        UserError: nothing is left to train, or the optimizer is unknown.
    """
    groups = parameter_groups(model)
    if not any(groups.values()):
        raise UserError("no parameter is left to train: --freeze names every layer of the model")
    decay = hyp.weight_decay * batch_size * accumulate / hyp.nbs
    rates = class_rates(model) if name == "MuSGD" else {}
    described: list[dict[str, Any]] = [
        {"params": parameters, "name": g, "weight_decay": decay if g == "decay" else 0.0, "lr_mult": factor, "class_rate": rate}
        for (factor, rate), g, parameters in _by_factors(model, groups, multipliers or {}, rates)
    ]
    fused = {"fused": True} if _can_fuse(model) else {"foreach": True}
    if name == "SGD":
        return initialize_momentum(torch.optim.SGD(described, lr=hyp.lr0, momentum=hyp.momentum, nesterov=hyp.momentum > 0, **fused))
    betas = (hyp.momentum, 0.999)
    if name == "Adam":
        return torch.optim.Adam(described, lr=hyp.lr0, betas=betas, **fused)
    if name == "AdamW":
        return torch.optim.AdamW(described, lr=hyp.lr0, betas=betas, **fused)
    if name == "LION":
        return Lion(described, lr=hyp.lr0, betas=(hyp.momentum, 0.99))
    if name == "MuSGD":
        for group in described:
            group["muon"] = group["name"] == "decay"
        return MuSGD(described, lr=hyp.lr0, momentum=hyp.momentum, **fused)
    raise UserError(f"--optimizer {name!r} is unknown, one of {', '.join(OPTIMIZERS)} is needed")


def initialize_momentum(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    """Initializes the momenta with zero: torch makes them in the first step, and leaves them unset where that one is skipped."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return optimizer


def load_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Loads a saved state. Fused kernels on a CPU ignore strides, so every tensor gets the memory layout of its parameter, whatever
    layout it was saved in.
    """
    optimizer.load_state_dict(dict(state))
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def apply_settings(optimizer: Optimizer, settings: StepSettings) -> None:
    """Sets every group's learning rate, times its multiplier, and the momentum where the optimizer is SGD (others keep their betas).

    The rate of the class towers multiplies what a warm-up ends at, not ``warmup_bias_lr``, where that of all biases begins.
    """
    for group in optimizer.param_groups:
        further = settings.lr * (group.get("class_rate", 1.0) - 1.0)  # 0 where a warm-up begins
        lr = settings.lr_bias if group["name"] == "bias" else settings.lr
        group["lr"] = (lr + further) * group.get("lr_mult", 1.0)
        if "momentum" in group:
            group["momentum"] = settings.momentum


def learning_rates(optimizer: Optimizer) -> tuple[float, ...]:
    """Of each group, in the order of ``GROUPS``, before multipliers."""
    return tuple(group["lr"] for group in optimizer.param_groups[: len(GROUPS)])


def optimizer_step(optimizer: Optimizer, scaler: torch.amp.GradScaler, *, clip_norm: float, non_finite: Tensor | None = None) -> Tensor:
    """Unscales, clips, steps and clears the gradients; non-finite gradients change nothing.

    Fused optimizers read on the device whether to skip the step. The others (LION, and all on devices without fused kernels) wait for the
    device once a step. The norm decides, with a scaler too: gradients may be finite, which is all that ``scaler.step`` checks, where
    their norm is not.

    Args:
        non_finite: () bool on the device, whether a loss of the step was non-finite; see :func:`update_scale`.

    Returns:
        () bool on the device, whether the step was applied.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm or torch.inf, foreach=True)
    applied = torch.isfinite(norm)
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~applied).float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif applied:
        optimizer.step()
    update_scale(scaler, non_finite=torch.zeros_like(applied) if non_finite is None else non_finite)
    optimizer.zero_grad(set_to_none=True)
    return applied


def _by_factors(
    model: nn.Module, groups: Mapping[str, list[nn.Parameter]], multipliers: Mapping[str, float], rates: Mapping[str, float]
) -> list[tuple[tuple[float, float], str, list[nn.Parameter]]]:
    """((multiplier, class rate), group, parameters): the three groups at factors of 1 first, empty or not, then what is at others."""
    plain = (1.0, 1.0)
    factors_of = {id(p): (multipliers.get(name, 1.0), rates.get(name, 1.0)) for name, p in model.named_parameters()}
    split = [
        (factors, name, [p for p in parameters if factors_of[id(p)] == factors])
        for factors in (plain, *sorted(set(factors_of.values()) - {plain}))
        for name, parameters in groups.items()
    ]
    return split[: len(GROUPS)] + [entry for entry in split[len(GROUPS) :] if entry[2]]


def _group_of(module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    is_table = any(part in name for part in POSITION_NAMES)
    if name.endswith("bias") and not is_table:
        return "bias"
    is_scale = name != "weight" and sum(side > 1 for side in parameter.shape) <= 1
    return "no_decay" if isinstance(module, NORM_LAYERS) or is_table or is_scale else "decay"


def _can_fuse(model: nn.Module) -> bool:
    """Fused kernels take floats of one device of these types."""
    devices = {p.device.type for p in model.parameters()}
    return len(devices) == 1 and devices <= {"cpu", "cuda"}
