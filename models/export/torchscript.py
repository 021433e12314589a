"""The format ``torchscript``: a traced network in one archive, its metadata in the extra file ``config.txt``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from models.export.facts import ExportFacts
from models.export.registry import ExportFormat, OpenedFile, register_format
from utils.errors import UserError, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models.export.source import ExportSource

CONFIG_FILE = "config.txt"  # the extra file in the archive


def write_torchscript(source: ExportSource, path: Path) -> None:
    """Traces the network; names and sizes go into the archive as ``config.txt``."""
    import torch

    with torchscript_warnings():
        traced = torch.jit.trace(source.network, source.example, check_trace=False)  # parity.compare() checks more
        traced.save(str(path), _extra_files={CONFIG_FILE: json.dumps(source.facts.to_metadata())})


def open_torchscript(path: Path, device: torch.device) -> OpenedFile:
    """Loads an archive onto ``device``.

    Raises:
        UserError: no TorchScript, or damaged.
    """
    import torch

    extra = {CONFIG_FILE: ""}
    try:
        with torchscript_warnings():
            module = torch.jit.load(str(path), map_location=device, _extra_files=extra).eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path}: not a TorchScript export, or a damaged one ({first_line(error)})") from None
    try:
        metadata = json.loads(extra[CONFIG_FILE] or "{}")
    except json.JSONDecodeError:
        raise UserError(f"{path}: its {CONFIG_FILE} cannot be understood; export it again with export.py") from None
    if device.type != "cpu":
        move_constants(module, device)
    dtype = next((p.dtype for p in module.parameters()), torch.float32)

    def run(images: Tensor) -> Sequence[Tensor]:
        output = module(images.to(device, dtype))
        return (output,) if isinstance(output, torch.Tensor) else tuple(o for o in output if isinstance(o, torch.Tensor))

    return OpenedFile(run, ExportFacts.from_metadata(metadata, source=str(path)))


def move_constants(module: torch.jit.ScriptModule, device: torch.device) -> None:
    """Makes the graph create its own tensors (grids of cells) on ``device``: a trace stores the device it ran on, and loading keeps it."""
    for part in module.modules():
        if not part._c._has_method("forward"):  # type: ignore
            continue  # a container that the trace never calls
        for node in part.graph.findAllNodes("prim::Constant"):  # type: ignore
            if node.output().type().kind() == "DeviceObjType":
                node.s_("value", str(device))


@contextmanager
def torchscript_warnings() -> Iterator[None]:
    """Hides the deprecation notices of TorchScript, which users have files of and which the ONNX exporter still builds on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`?torch\.jit\.", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"`?torch\.jit\.", category=DeprecationWarning)
        yield


TORCHSCRIPT = register_format(
    ExportFormat(
        name="torchscript",
        suffix=".torchscript",
        write=write_torchscript,
        open=open_torchscript,
        help="a traced network, run by torch and libtorch",
    )
)
