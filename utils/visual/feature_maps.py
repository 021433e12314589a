"""What every layer of a network makes of an image, as one image a layer: the first channels side by side."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn

CHANNELS, COLUMNS = 32, 8
LEAST_SIDE_PX = 64  # small maps are enlarged to it


def save_feature_maps(layers: nn.Sequential, run: Callable[[], object], folder: Path) -> int:
    """Runs the network once and writes ``<row>_<layer>.png`` for every layer whose output is a map.

    Args:
        layers: by row.
        run: calls the network on a batch; its first image is shown.
        folder: made if it is not there.

    Returns:
        How many images were written.
    """
    maps: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                maps.setdefault(name, output[0, :CHANNELS].float().cpu())  # (C, H, W); a CPU may take a batch in parts

        return hook

    hooks = [layer.register_forward_hook(keep(f"{row:03d}_{type(layer).__name__}")) for row, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    folder.mkdir(parents=True, exist_ok=True)
    for name, channels in maps.items():
        (folder / f"{name}.png").write_bytes(cv2.imencode(".png", _tiled(channels.numpy()))[1].tobytes())
    return len(maps)


def _tiled(channels: np.ndarray) -> np.ndarray:
    """Channels (C, H, W), each stretched to its own range, as one BGR image."""
    low, high = channels.min(axis=(1, 2), keepdims=True), channels.max(axis=(1, 2), keepdims=True)
    grey = (np.nan_to_num((channels - low) / np.maximum(high - low, 1e-12)) * 255).astype(np.uint8)
    zoom = -(-LEAST_SIDE_PX // max(grey.shape[1:]))
    grey = grey.repeat(zoom, axis=1).repeat(zoom, axis=2)
    count, height, width = grey.shape
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    sheet = np.zeros((rows * (height + 1), columns * (width + 1)), np.uint8)
    for i, tile in enumerate(grey):
        y, x = i // columns * (height + 1), i % columns * (width + 1)
        sheet[y : y + height, x : x + width] = tile
    return cv2.applyColorMap(sheet, cv2.COLORMAP_VIRIDIS)
