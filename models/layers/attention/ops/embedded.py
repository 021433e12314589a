"""Attention inside C2f, C3 and RepNCSPELAN4: ``C2f_EMA`` is C2f whose bottlenecks end in EMA, for every same-width module.

One mechanism for all: the plain block is built, and each of its bottlenecks gets the module behind its second convolution, inside the
residual. All keys of the plain block stay, so its weights load; the module's are ``….attention.*``. No class is made, and a name resolves
only when a YAML uses it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.layers.attention.ops.identity import IdentityStart
from models.layers.csp import Bottleneck, RepNBottleneck
from models.spec import channel_rules as rules
from models.spec.registry import BLOCKS, BlockSpec

OUTER = ("C2f", "C3", "RepNCSPELAN4")
NAME = re.compile(rf"(?P<outer>{'|'.join(OUTER)})([_-]|(?=[A-Z]))(?P<inner>\w+)")  # C2f_EMA; C2f-EMA and C3SE in other projects


class AttendedBottleneck(nn.Module):
    """A bottleneck with a same-width module behind its second convolution; (B, c1, H, W) to (B, c2, H, W).

    Args:
        plain: the bottleneck, whose layers keep their names.
        attention: the module.
    """

    def __init__(self, plain: Bottleneck | RepNBottleneck, attention: nn.Module) -> None:
        super().__init__()
        self.cv1, self.cv2, self.add = plain.cv1, plain.cv2, plain.add
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(self.cv2(self.cv1(x)))
        return x + y if self.add else y


@dataclass(frozen=True)
class Embedded:
    """Builds ``outer`` with ``inner`` in its bottlenecks; registered in place of a class.

    Attributes:
        outer: the plain block's class; it receives the positional arguments and the options it has.
        inner: the module; it gets all other options of a row (``C2f_EMA, [128, True, {factor: 8}]``).
        identity_start: each inner module starts as the identity, so that the block starts as the plain one.
    """

    outer: Callable[..., nn.Module]
    inner: BlockSpec
    identity_start: bool = False

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
                if isinstance(child, (Bottleneck, RepNBottleneck)):
                    setattr(parent, name, AttendedBottleneck(child, self._attention(child, rest)))
        return block

    def _attention(self, bottleneck: Bottleneck | RepNBottleneck, options: dict[str, Any]) -> nn.Module:
        width = bottleneck.cv2.conv.out_channels
        widths = (width,) if self.inner.channels is rules.same_width else (width, width)
        module = self.inner.cls(*widths, **options)
        return IdentityStart(module) if self.identity_start else module


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
    return BlockSpec(name, Embedded(outer.cls, inner), outer.channels, paper=inner.paper)


def _keeps_width(spec: BlockSpec) -> bool:
    """Whether a module can follow a convolution: it keeps its input's width, or is an attention module that can."""
    return spec.channels is rules.same_width or (spec.kind == "attention" and spec.channels in (rules.out_width, rules.out_width_repeated))
