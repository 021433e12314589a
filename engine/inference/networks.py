"""Weights on the command line to what is run: one file or several, checkpoints or exported, plain or with test-time augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.inference.ensemble import Ensemble
from engine.memory_format import ready_to_infer
from models.export import formats
from models.export.model import ExportedModel, load_exported
from models.spec.registry import load_plugin
from utils.errors import UserError

if TYPE_CHECKING:
    from models.model import Model


@dataclass(frozen=True)
class LoadOptions:
    """How files of weights are opened.

    Attributes:
        plugins: Python files of the caller's with modules and export formats.
        download: whether published weights that are not on disk are fetched.
        half: whether the network is to run in float16, which exported files cannot.
        trust: whether the code in exported files is run unread.
        nms: whether the branch whose predictions go through suppression is taken where there is one without.
    """

    plugins: Sequence[str] = ()
    download: bool = False
    half: bool = False
    trust: bool = False
    nms: bool = False


def load_networks(files: Sequence[str | Path], *, device: torch.device, options: LoadOptions) -> Model | Ensemble | ExportedModel:
    """The network of the file, or all of several as one.

    Raises:
        UserError: A file cannot be used, or the files do not go together.
    """
    networks = [load_network(Path(f), device=device, options=options) for f in files]
    return networks[0] if len(networks) == 1 else Ensemble(networks, sources=[str(f) for f in files])


def load_network(path: Path, *, device: torch.device, options: LoadOptions) -> Model | ExportedModel:
    """A network ready for inference: a checkpoint's without auxiliary branches and fused, or an exported file."""
    if is_exported(path, plugins=options.plugins):
        if options.half:
            raise UserError(f"--half: {path} is run in the precision it was exported in; leave --half out")
        exported = load_exported(path, device=device, trust=options.trust)
        if options.nms and exported.one_to_one:
            instead = "export it with --nms (not RT-DETR), or leave --nms out"
            raise UserError(f"--nms: {path} holds the detections of a one-to-one branch; {instead}")
        return exported
    from models import load_model
    from models.checkpoints.published import ensure_weights

    ensure_weights(path, download=options.download)
    model = load_model(path, plugins=options.plugins)
    deployed = model.deploy(for_suppression=options.nms)
    if options.nms and deployed.head.one_to_one:
        why = deployed.head.never_suppressed
        only = f": {why};" if why else " is deployed, with a one-to-one branch only; give the weights of the training, or"
        raise UserError(f"--nms: {path}{only} leave --nms out")
    if options.nms and not model.head.one_to_one:
        why = "nothing is suppressed in" if model.task.whole_image else "without a one-to-one branch, suppression is usual for"
        print(f"--nms: has no effect: {why} {path}")
    return ready_to_infer(deployed, device)


def is_exported(path: str | Path, *, plugins: Sequence[str] = ()) -> bool:
    """Whether the file is an exported network, of a built-in format or of one that a plugin registers, rather than a checkpoint."""
    for plugin in plugins:
        load_plugin(plugin)
    return formats.is_exported(path)
