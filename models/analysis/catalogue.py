"""The attention catalogue as a page: a table made from the registry, with costs that are counted and measured.

    python -m models.catalogue --write docs/attention.md

Name, aliases and paper stand at ``@register``, the sentence in the docstring; the rest is computed.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from models.analysis.operations import multiply_adds
from models.spec import channel_rules as rules
from models.spec.channel_rules import ChannelRule
from models.spec.registry import BLOCKS, BlockSpec
from models.spec.row_arguments import what_it_takes
from utils.cli.parser import OneLineParser
from utils.cli.script import run_script
from utils.errors import UserError
from utils.text_table import markdown_table

CHANNELS, SIDE = 256, 40  # of the map that costs are given for
FAR = (512, 1024)  # sides between which the growth shows that the largest term has
HEADER = ("module", "paper", "what it does", "parameters", "M mult-adds", "ms", "grows as")
TIME = HEADER.index("ms")
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")


@dataclass(frozen=True)
class Entry:
    """One row of the table; ``milliseconds`` is None where no time was taken."""

    name: str
    aliases: tuple[str, ...]
    paper: str
    sentence: str
    parameters: int
    multiply_adds: int
    growth: str
    milliseconds: float | None = None

    def cells(self) -> tuple[str, ...]:
        """The row as text, in the order of HEADER."""
        name = ", ".join(f"`{n}`" for n in (self.name, *self.aliases))
        took = "" if self.milliseconds is None else f"{self.milliseconds:.1f}"
        cost = (f"{self.parameters:,}", f"{self.multiply_adds / 1e6:,.1f}", took, self.growth)
        return (name, _linked(self.paper), self.sentence, *cost)


def page(*, timed: bool = True) -> str:
    """The page as Markdown."""
    rows = [entry.cells() for entry in entries(timed=timed)]
    options = [(f"`{name}`", f"`{text}`") for name in _catalogued() if (text := _options(BLOCKS[name]))]
    others = [(f"`{name}`", _linked(spec.paper), sentence(spec)) for name, spec in _published_parts()]
    return "\n\n".join(
        [
            INTRODUCTION,
            markdown_table(HEADER, rows),
            OPTIONS_HEADING,
            markdown_table(("module", "options and defaults"), options),
            PARTS_HEADING,
            markdown_table(("name", "paper", "what it is"), others),
        ]
    ) + "\n"  # fmt: skip


def entries(*, timed: bool) -> list[Entry]:
    """All attention modules of this project that have a paper, by name."""
    return [_entry(BLOCKS[name], timed=timed) for name in _catalogued()]


def _catalogued() -> list[str]:
    return [name for name in same_width_names() if BLOCKS[name].kind == "attention" and BLOCKS[name].built_in and BLOCKS[name].paper]


def _options(spec: BlockSpec) -> str:
    """What a row may say behind the width, in the order of the constructor."""
    behind: dict[ChannelRule, int] = {rules.out_width: 2, rules.out_width_repeated: 3}
    return what_it_takes(spec.cls, behind=behind.get(spec.channels, 1))


def same_width_names() -> list[str]:
    """Canonical names of all same-width modules, and of the attention layers that choose their output width and so can keep it."""
    free = (rules.out_width_repeated, rules.out_width)
    return [s.name for s in BLOCKS.values() if s.channels is rules.same_width or (s.kind == "attention" and s.channels in free)]


def build_same_width(name: str, channels: int) -> nn.Module:
    """The module as a row with no arguments (or only its width) builds it."""
    spec = BLOCKS[name]
    return spec.cls(channels) if spec.channels is rules.same_width else spec.cls(channels, channels)


def sentence(spec: BlockSpec) -> str:
    """What a block does: its file's idea where the file holds one block, else the beginning of its own docstring."""
    module = sys.modules[spec.cls.__module__]
    alone = sum(getattr(other.cls, "__module__", "") == module.__name__ for other in BLOCKS.values()) == 1
    text = (inspect.getdoc(module) if alone else inspect.getdoc(spec.cls)) or ""
    first = re.split(r"; \(B, ", text)[0]
    first = re.split(r"(?<=[^.][.])\s(?=[A-Z])", " ".join(first.split("\n\n")[0].split()))[0]
    return first.rstrip(".").replace("|", r"\|").replace("``", "`")


def _entry(spec: BlockSpec, *, timed: bool) -> Entry:
    torch.manual_seed(0)
    module = build_same_width(spec.name, CHANNELS).eval()
    return Entry(
        name=spec.name,
        aliases=spec.aliases,
        paper=spec.paper,
        sentence=sentence(spec),
        parameters=sum(p.numel() for p in module.parameters()),
        multiply_adds=count(module, SIDE),
        growth=growth(module),
        milliseconds=_milliseconds(module) if timed else None,
    )


def count(module: nn.Module, side: int) -> int:
    """Multiply-adds of a square map; its tensors have no values, only shapes are worked out."""
    return multiply_adds(copy.deepcopy(module).to("meta"), torch.empty(1, CHANNELS, side, side, device="meta"))


def growth(module: nn.Module) -> str:
    """How multiply-adds grow with the number of pixels N: the largest term's power, to the nearest half.

    At least N, since a map is read whatever is multiplied.
    """
    near, far = (count(module, side) for side in FAR)
    power = math.log(far / near) / math.log((FAR[1] / FAR[0]) ** 2) if near else 0.0
    half = max(round(2 * power) / 2, 1.0)
    return {1.0: "N", 2.0: "N²"}.get(half, f"N^{half:g}")


def _milliseconds(module: nn.Module, *, repeats: int = 5) -> float:
    """Processor time of a forward pass on one thread, the fastest of several: what other programs disturb least."""
    x, threads = torch.randn(1, CHANNELS, SIDE, SIDE), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            module(x)
            return 1e3 * min(_seconds(lambda: module(x)) for _ in range(repeats))
    finally:
        torch.set_num_threads(threads)


def _seconds(call: Callable[[], object]) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start


def _published_parts() -> list[tuple[str, BlockSpec]]:
    """Backbones and necks, whole and by stage."""
    return [(name, spec) for name, spec in BLOCKS.items() if spec.kind in ("backbone", "neck") and spec.built_in]


def _linked(paper: str) -> str:
    return ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", paper)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = OneLineParser(prog="python -m models.catalogue", description="the attention catalogue as a page")
    parser.add_argument("--write", type=Path, metavar="FILE", help="where the page goes; it is printed if not given")
    args = parser.parse_args(argv)

    def body() -> None:
        text = page()
        if args.write is None:
            print(text)
            return
        try:
            args.write.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--write {args.write}: cannot be written ({error.strerror})") from error

    return run_script("models.catalogue", body)


INTRODUCTION = f"""# The attention catalogue

This page is made from the registry by `python -m models.catalogue --write docs/attention.md`; change a docstring or a `@register` line, not
the table.

Every module takes (B, C, H, W) maps of any height and width and gives the same shape, so a row such as `[-1, 1, CBAM, []]` puts it anywhere
([models.md](models.md#same-width-modules)); `C2f_CBAM`, `C3_CBAM`, `RepNCSPELAN4_CBAM`, `C3k2_CBAM`, `C2PSA_CBAM`, `A2C2f_CBAM` … put it
inside a block.
Spellings of other projects mean the same: `CBAMBlock`, `GAM_Attention`, `C2fCBAM`, `C2f-CBAM`.

- `A2C2f`, `ACmix`, `BoT3`, `BoTPaperBlock`, `BottleneckTransformer`, `C2PSA`, `C2fPSA`, `C3AH`, `C3TR`, `TransformerBlock`, `iRMB`: rows
  name their width, which all but the two with PSA can also change: `[-1, 3, BoT3, [1024]]`.
- What else a row may say: [options](#options). A module of your own: [own_modules.md](own_modules.md).

Costs are those of the defaults on one map of {CHANNELS} x {SIDE} x {SIDE}: multiply-adds at operator level with attention counted
([what counts](models.md#what-a-network-costs)), and processor milliseconds of a forward pass on one thread of the machine that wrote the
page, good for comparing rows only. *Grows as* is the power with which the multiply-adds grow with the number of pixels N when N is large,
windows and options at their defaults.

Every module passes one contract: any size, no state between calls, a gradient for every parameter, finite in half precision, copies, two
training steps that agree bit for bit with `torch.use_deterministic_algorithms` on, `torch.compile` without graph breaks, and TorchScript
and ONNX (opset 17, free height and width) that agree with torch.

Time and memory of training, forward and backward, beside the papers' formulas written out:
[benchmarks/README.md](../benchmarks/README.md#attention-bench_attentionpy)."""
OPTIONS_HEADING = """## Options

A row gives options by place, in this order, or better by name: `[-1, 1, EMA, [{factor: 16}]]`; in `C2f_EMA` and its like only by name. Only
what differs from the default need be written. What an option means is said in the module's docstring, under `models/layers/attention/`."""
PARTS_HEADING = """## Backbones and necks

Published networks by row, under their published parameter names where these exist; ready-made YAMLs are in `models/configs/attention/`."""
