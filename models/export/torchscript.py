"""The format ``torchscript``: a traced network in one archive, its metadata in the extra file ``config.txt``."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from models.export.archive import copy_checked
from models.export.facts import ExportFacts
from models.export.registry import ExportFormat, OpenedFile, register_format
from utils.errors import UserError, first_line, last_line

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
    """Loads an archive onto ``device``, after its code has been read.

    Raises:
        UserError: no TorchScript, a damaged one, or one that does more than an exported network.
    """
    return _opened(*load_archive(path, device, extra=CONFIG_FILE), path, device)


def open_trusted_torchscript(path: Path, device: torch.device) -> OpenedFile:
    """The same for a file of the caller's own: whatever its code does, it does.

    Raises:
        UserError: no TorchScript, or a damaged one.
    """
    return _opened(*load_archive(path, device, extra=CONFIG_FILE, trust=True), path, device)


def load_archive(path: Path, device: torch.device, *, extra: str, trust: bool = False) -> tuple[torch.jit.ScriptModule, str]:
    """The module of an archive, and the text of an extra file in it; empty if it has none of that name.

    Args:
        extra: name of the extra file.
        trust: whether the archive's code may be anything, as torch runs it.

    Raises:
        UserError: as ``open_torchscript``.
    """
    import torch

    texts = {extra: ""}
    with tempfile.TemporaryDirectory() as folder, torchscript_warnings():
        checked = path
        if not trust:
            checked = Path(folder) / "checked.torchscript"
            texts[extra] = copy_checked(path, checked, extra=extra)
        try:
            module = torch.jit.load(str(checked), map_location=device, _extra_files=texts if trust else None).eval()
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path}: not a TorchScript export, or a damaged one ({first_line(error)})") from None
    return module, texts[extra]


def _opened(module: torch.jit.ScriptModule, config: str, path: Path, device: torch.device) -> OpenedFile:
    import torch

    from utils.memory import is_out_of_memory

    facts = ExportFacts.from_json(config, source=str(path))
    if device.type != "cpu":
        move_constants(module, device)
    dtype = next((p.dtype for p in module.parameters()), torch.float32)

    def run(images: Tensor) -> Sequence[Tensor]:
        try:
            output = module(images.to(device, dtype))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise UserError(f"{path}: cannot be run ({last_line(error)})") from None
        return (output,) if isinstance(output, torch.Tensor) else tuple(output if isinstance(output, (list, tuple)) else ())

    return OpenedFile(run, facts)


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
        open_trusted=open_trusted_torchscript,
        help="a traced network, run by torch and libtorch",
    )
)
