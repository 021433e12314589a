"""Attention inside aggregation blocks: ``C2f_EMA`` is C2f whose bottlenecks end in EMA, for all same-width modules and the blocks of HOSTS.

One mechanism for all: the plain block is built, and each of its inner blocks gets the module behind its convolutions, or behind its own
attention (``C2PSA_EMA``, ``A2C2f_EMA``), inside the residual. All keys of the plain block stay, so its weights load; the module's are
``….attention.*``. No class is made, and a name resolves only when a YAML uses it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.layers.attention.ops.identity import IdentityStart
from models.layers.attention.yolov10 import PSABlock
from models.layers.attention.yolov12 import ABlock
from models.layers.attention.yolov13 import DSBottleneck
from models.layers.compact import CIB
from models.layers.csp import Bottleneck, RepNBottleneck
from models.spec import channel_rules as rules
from models.spec.registry import BLOCKS, BlockSpec

BOTTLENECKS = (Bottleneck, RepNBottleneck)
# block -> its inner blocks that get the module
HOSTS: dict[str, tuple[type[nn.Module], ...]] = {
    **dict.fromkeys(("C2f", "C3", "C3k", "C3k2", "RepNCSPELAN4"), BOTTLENECKS),
    **dict.fromkeys(("DSC3k", "DSC3k2"), (DSBottleneck,)),
    "C2fCIB": (CIB,), "C2PSA": (PSABlock,), "C2fPSA": (PSABlock,), "A2C2f": (ABlock, Bottleneck),
}  # fmt: skip
# C2f_EMA; C2f-EMA and C3SE in other projects
NAME = re.compile(rf"(?P<outer>{'|'.join(sorted(HOSTS, key=len, reverse=True))})([_-]|(?=[A-Z]))(?P<inner>\w+)")


class AttendedBottleneck(nn.Module):
    """A bottleneck with a same-width module behind its last convolution; (B, c1, H, W) to (B, c2, H, W).

    Args:
        plain: the bottleneck, or another block of layers in a row with a residual (CIB); its layers keep their names.
        attention: the module.
    """

    def __init__(self, plain: nn.Module, attention: nn.Module) -> None:
        super().__init__()
        self.add = plain.add
        for name, layer in plain.named_children():
            self.add_module(name, layer)
        self.attention = attention  # the last of its children, which follow each other

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.children():
            y = layer(y)
        return x + y if self.add else y


class AttendedTransformer(nn.Module):
    """A block of attention and a perceptron with a same-width module behind the attention; (B, C, H, W) to the same.

    Args:
        plain: the block, whose layers keep their names.
        attention: the module.
    """

    def __init__(self, plain: PSABlock | ABlock, attention: nn.Module) -> None:
        super().__init__()
        self.add = getattr(plain, "add", True)
        self.perceptron = "ffn" if isinstance(plain, PSABlock) else "mlp"
        self.attn = plain.attn
        self.add_module(self.perceptron, plain.get_submodule(self.perceptron))
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(self.attn(x))
        x = x + y if self.add else y
        y = self.get_submodule(self.perceptron)(x)
        return x + y if self.add else y


@dataclass(frozen=True)
class Embedded:
    """Builds ``outer`` with ``inner`` in its inner blocks; registered in place of a class.

    Attributes:
        outer: the plain block's class; it receives the positional arguments and the options it has.
        inner: the module; it gets all other options of a row (``C2f_EMA, [128, True, {factor: 8}]``).
        hosts: classes of the inner blocks that get it.
        identity_start: each inner module starts as the identity, so that the block starts as the plain one.
    """

    outer: Callable[..., nn.Module]
    inner: BlockSpec
    hosts: tuple[type[nn.Module], ...] = BOTTLENECKS
    identity_start: bool = False

    @property
    def row_options(self) -> Callable[..., dict[str, Any]] | None:
        """What the plain block derives from its row (models/spec/planning.py), if anything."""
        return getattr(self.outer, "row_options", None)

    @property
    def __signature__(self) -> inspect.Signature:
        """The plain block's parameters, and the module's options by name."""
        own = inspect.signature(self.outer).parameters
        options = list(inspect.signature(self.inner.cls).parameters.values())[1 if self.inner.channels is rules.same_width else 2 :]
        named = [p.replace(kind=p.KEYWORD_ONLY) for p in options if p.name not in own and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        return inspect.Signature([*own.values(), *named])

    def __call__(self, *args: Any, **options: Any) -> nn.Module:
        own = inspect.signature(self.outer).parameters
        block = self.outer(*args, **{key: value for key, value in options.items() if key in own})
        rest = {key: value for key, value in options.items() if key not in own}
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, self.hosts):
                    setattr(parent, name, _attended(child, self._attention(child, rest)))
        return block

    def _attention(self, host: nn.Module, options: dict[str, Any]) -> nn.Module:
        width = [layer for layer in host.modules() if isinstance(layer, nn.Conv2d)][-1].out_channels
        widths = (width,) if self.inner.channels is rules.same_width else (width, width)
        module = self.inner.cls(*widths, **options)
        return IdentityStart(module) if self.identity_start else module


def _attended(host: nn.Module, attention: nn.Module) -> nn.Module:
    return AttendedTransformer(host, attention) if isinstance(host, (PSABlock, ABlock)) else AttendedBottleneck(host, attention)


@BLOCKS.resolver
def embedded(name: str) -> BlockSpec | None:
    """The block behind ``<outer>_<module>``, or None for other names."""
    spelled = NAME.fullmatch(name)
    if spelled is None or spelled["inner"] not in BLOCKS:
        return None
    outer_name, inner_name = spelled["outer"], spelled["inner"]
    outer, inner = BLOCKS[outer_name], BLOCKS[inner_name]
    if not _keeps_width(inner):
        return None
    return BlockSpec(name, Embedded(outer.cls, inner, HOSTS[outer_name]), outer.channels, paper=inner.paper, kind=outer.kind)


def _keeps_width(spec: BlockSpec) -> bool:
    """Whether a module can follow a convolution: it keeps its input's width, or is an attention module that can."""
    return spec.channels is rules.same_width or (spec.kind == "attention" and spec.channels in (rules.out_width, rules.out_width_repeated))
