"""Models through torch.hub: ``custom`` loads a checkpoint; every model YAML has an entry of its name (``yolov9_c_FocalModulation``),
and one for each scale that it has (``yolo11n_seg``).

Example:
    model = torch.hub.load("path/to/this/folder", "custom", "best.pt", source="local")
    results = model(["bus.jpg", array])
    results.print(); results[0].boxes
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

dependencies = ["torch", "torchvision", "numpy", "cv2", "yaml", "PIL"]


def custom(
    path: str, autoshape: bool = True, device: str = "", plugins: Sequence[str] = (), download: bool = False, _verbose: bool = True
) -> Any:
    """Loads a checkpoint of this project, YOLOv5, v7, v9 or ultralytics, bare weights, or an exported file.

    Args:
        path: a ``.pt`` or ``.safetensors`` file.
        autoshape: return a model that takes images of any kind and returns results; otherwise the Model itself.
        device: ``cpu``, ``0`` …; by default a GPU if there is one.
        plugins: Python files with modules that the model uses.
        download: fetch published weights that are not on disk.
        _verbose: print a line about the loaded model.

    Raises:
        UserError: as ``load_model``.
    """
    from engine.inference.image_model import load_model

    hub = load_model(path, device=device, plugins=plugins, download=download)
    if _verbose:
        print(f"{path}: {len(hub.names)} classes, {sum(p.numel() for p in hub.parameters()) / 1e6:.1f} M parameters, on {hub.device}")
    return hub if autoshape else hub.model


def __dir__() -> list[str]:
    """Entry points, for torch.hub.list and torch.hub.load."""
    return [*globals(), *_configs()]


def __getattr__(name: str) -> Callable[..., Any]:
    configs = _configs()
    if name not in configs:
        raise AttributeError(f"hubconf has no entry {name!r}")
    return _entry(name, configs[name])


def _entry(name: str, config: str) -> Callable[..., Any]:
    """Makes the entry point of one model YAML."""

    def entry(
        pretrained: bool = False,
        classes: int | None = None,
        autoshape: bool = True,
        device: str = "",
        download: bool = False,
        _verbose: bool = True,
    ) -> Any:
        from engine.inference.image_model import ImageModel
        from models import build_model
        from utils.distributed import select_device
        from utils.errors import UserError

        if pretrained:
            weights = f"{Path(config).stem}.pt"
            loaded = custom(weights, autoshape, device=device, download=download, _verbose=_verbose)
            if classes not in (None, known := len(loaded.names)):
                hint = "train with --weights for others, or leave pretrained out"
                raise UserError(f"{name}: {weights} knows {known} classes, not {classes}; {hint}")
            return loaded
        model = build_model(config, nc=classes).eval()
        return (ImageModel(model.deploy()) if autoshape else model).to(select_device(device))

    entry.__name__ = name
    entry.__doc__ = (
        f"{config}, freshly initialised, with the YAML's number of classes if none is given; "
        f"with pretrained the published {Path(config).stem}.pt, which download fetches."
    )
    return entry


@cache
def _configs() -> dict[str, str]:
    """Entry name -> name of a model YAML, with a scale letter where it has scales."""
    from models.listing import list_models

    return {re.sub(r"\W", "_", name): f"{name}.yaml" for name in list_models()}
