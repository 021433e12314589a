"""Convolution, batch norm and activation: the unit of every YOLO, and how the default activation is chosen.

The default activation belongs to the network that is being built, not to a class: the parser opens an :func:`activation_scope` and every
``act=True`` inside it uses that activation. Networks built one after the other, or in two threads, do not affect each other.
"""

from __future__ import annotations

import ast
import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from models.spec import channel_rules as rules
from models.spec.registry import register
from utils.errors import UserError, nearest

ActivationFactory: TypeAlias = Callable[[], nn.Module]
Activation: TypeAlias = "bool | nn.Module | None"
Size: TypeAlias = "int | tuple[int, int]"

ACTIVATIONS: dict[str, type[nn.Module]] = {
    cls.__name__: cls
    for cls in (
        nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.Mish,
        nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softsign, nn.Tanh,
    )
}  # fmt: skip
_DEFAULT_ACTIVATION: ContextVar[ActivationFactory] = ContextVar("default_activation", default=nn.SiLU)


@contextmanager
def activation_scope(factory: ActivationFactory) -> Iterator[None]:
    """Within it, ``act=True`` means ``factory()``; outside every scope it means SiLU."""
    token = _DEFAULT_ACTIVATION.set(factory)
    try:
        yield
    finally:
        _DEFAULT_ACTIVATION.reset(token)


def make_activation(act: Activation = True) -> nn.Module:
    """The module for an ``act`` argument: True for the scope's default, a module for a copy of itself, False or None for none."""
    if isinstance(act, nn.Module):
        return copy.deepcopy(act)
    return _DEFAULT_ACTIVATION.get()() if act else nn.Identity()


def parse_activation(text: str) -> ActivationFactory:
    """Reads an activation as YAML files write it, ``nn.LeakyReLU(0.1)``; runs no code.

    Args:
        text: a name of :data:`ACTIVATIONS`, with or without ``nn.``, and literal arguments in parentheses if any.

    Raises:
        UserError: the name is not an activation, an argument is not a literal, or the activation refuses its arguments.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
        name = ast.unparse(call.func).removeprefix("torch.").removeprefix("nn.")
        args = [ast.literal_eval(a) for a in call.args]
        kwargs = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}  # "None" for **, which no activation takes
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{text!r} is not an activation; write it like nn.SiLU() or nn.LeakyReLU(0.1)") from error
    if name not in ACTIVATIONS:
        hint = nearest(name, ACTIVATIONS) or f"known are {', '.join(sorted(ACTIVATIONS))}"
        raise UserError(f"unknown activation {text!r}, {hint}")

    def factory() -> nn.Module:
        return ACTIVATIONS[name](*args, **kwargs)

    try:
        factory()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"activation {text!r}: {error}") from error
    return factory


def same_padding(k: Size, d: int = 1) -> Size:
    """Padding that keeps height and width at stride 1 for an odd kernel."""
    if isinstance(k, int):
        return d * (k - 1) // 2
    height, width = k
    return d * (height - 1) // 2, d * (width - 1) // 2


@register("Conv", channels=rules.out_width)
class Conv(nn.Module):
    """Convolution without bias, batch norm, activation; (B, c1, H, W) to (B, c2, ceil(H/s), ceil(W/s)) with the default padding.

    Args:
        c1: input channels.
        c2: output channels.
        k: kernel size, a number or (height, width).
        s: stride.
        p: padding; None keeps the size at stride 1.
        g: groups.
        d: dilation, or an activation: YOLOv7's files have no dilation and give the activation in this position.
        act: True for the network's default activation, a module for that one, False or None for none.
    """

    def __init__(
        self, c1: int, c2: int, k: Size = 1, s: int = 1, p: Size | None = None, g: int = 1, d: int | nn.Module = 1, act: Activation = True
    ) -> None:
        super().__init__()
        if isinstance(d, nn.Module):
            act, d = d, 1
        self.conv = nn.Conv2d(c1, c2, k, s, same_padding(k, d) if p is None else p, groups=g, dilation=d, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = make_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def fused(self) -> FusedConv:
        """The same function in eval mode as one convolution with a bias."""
        return FusedConv(fuse_conv_bn(self.conv, self.bn), self.act).train(self.training)


@register("DWConv", channels=rules.out_width)
class DWConv(Conv):
    """Convolution with as many groups as both widths allow: depth-wise where they are equal. Shapes as for :class:`Conv`."""

    def __init__(self, c1: int, c2: int, k: Size = 1, s: int = 1, d: int | nn.Module = 1, act: Activation = True) -> None:
        super().__init__(c1, c2, k, s, g=math.gcd(c1, c2), d=d, act=act)


class FusedConv(nn.Module):
    """A convolution with bias and its activation: the inference form of :class:`Conv` and of re-parameterised blocks."""

    def __init__(self, conv: nn.Conv2d, act: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.act = copy.deepcopy(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


@register("ConvTranspose", channels=rules.out_width)
class ConvTranspose(nn.Module):
    """Transposed convolution, batch norm, activation; (B, c1, H, W) to (B, c2, s·H, s·W) with the defaults."""

    def __init__(self, c1: int, c2: int, k: int = 2, s: int = 2, p: int = 0, bn: bool = True, act: Activation = True) -> None:
        super().__init__()
        self.conv_transpose = nn.ConvTranspose2d(c1, c2, k, s, p, bias=not bn)
        self.bn = nn.BatchNorm2d(c2) if bn else nn.Identity()
        self.act = make_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv_transpose(x)))

    def fused(self) -> ConvTranspose:
        """The same function in eval mode with the batch norm folded into the bias."""
        if not isinstance(self.bn, nn.BatchNorm2d):
            return self
        old = self.conv_transpose
        sizes: tuple[Any, Any, Any] = (old.kernel_size, old.stride, old.padding)
        new = ConvTranspose(old.in_channels, old.out_channels, *sizes, bn=False, act=self.act).to(old.weight)
        scale, bias = _batch_norm_as_affine(self.bn)
        with torch.no_grad():
            new.conv_transpose.weight.copy_(old.weight.double() * scale.view(1, -1, 1, 1))
            bias_of(new.conv_transpose).copy_(bias)
        return new.train(self.training)


@register("CrossConv", channels=rules.out_width)
class CrossConv(nn.Module):
    """A 1×k and a k×1 convolution in place of a k×k one (YOLOv5); (B, c1, H, W) to (B, c2, H/s, W/s)."""

    def __init__(self, c1: int, c2: int, k: int = 3, s: int = 1, g: int = 1, e: float = 1.0, shortcut: bool = False) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, (1, k), (1, s))  # type: ignore[arg-type]  # a row's stride is one number, this one a pair
        self.cv2 = Conv(hidden, c2, (k, 1), (s, 1), g=g)  # type: ignore[arg-type]
        self.add = shortcut and c1 == c2 and s == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


@register("DFL", channels=rules.rearrange(lambda c, bins=16: c // bins))
class DFL(nn.Module):
    """Softmax over the bins of each side and their mean; logits (B, 4·bins, A), side-major, to distances (B, 4, A) in units of the stride.

    Source: Generalized Focal Loss, arXiv 2006.04388, sec. 3.2. The projection 0 … bins − 1 is fixed: a parameter by its published name
    (``conv.weight``) that requires no gradient.
    """

    def __init__(self, bins: int = 16) -> None:
        super().__init__()
        self.bins = bins
        self.conv = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data.copy_(torch.arange(bins, dtype=torch.float32).view(1, bins, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, _, a = x.shape
        probabilities = x.view(b, 4, self.bins, a).softmax(2)
        return (self.conv.weight.view(1, self.bins) @ probabilities).squeeze(2)  # (B, 4, 1, A) before the squeeze


def fuse_conv_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    """One convolution with bias that equals ``bn(conv(x))`` in eval mode; the arguments are not modified.

    W' = W·γ/√(σ² + ε) and b' = β + (b − μ)·γ/√(σ² + ε), computed in float64.
    """
    # torch declares these attributes wider than the arguments that set them
    sizes: tuple[Any, Any, Any, Any] = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    fused = nn.Conv2d(conv.in_channels, conv.out_channels, *sizes, conv.groups, padding_mode=conv.padding_mode).to(conv.weight)
    scale, bias = _batch_norm_as_affine(bn)
    with torch.no_grad():
        fused.weight.copy_(conv.weight.double() * scale.view(-1, 1, 1, 1))
        bias_of(fused).copy_(bias if conv.bias is None else bias + scale * conv.bias.double())
    return fused


def bias_of(conv: nn.Conv2d | nn.ConvTranspose2d) -> Tensor:
    """The bias (C,) of a convolution that has one."""
    if conv.bias is None:
        raise ValueError("expected a convolution with a bias")
    return conv.bias


def _batch_norm_as_affine(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and offset, float64 (C,), of a batch norm in eval mode."""
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("a batch norm without running statistics cannot be folded")
    with torch.no_grad():
        scale = bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)
        return scale, bn.bias.double() - bn.running_mean.double() * scale
