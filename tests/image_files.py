"""Small data sets on disk: noise images with the labels that a test gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

Row = tuple[float, ...]  # class, centre x, centre y, width, height; normalised
Splits = Mapping[str, Sequence[Sequence[Row]]]


def write_images(folder: Path, labels: Splits, *, names: Sequence[str] = ("thing",), side: int = 64) -> Path:
    """Writes a data set with an image for each list of label rows, and returns its YAML.

    Args:
        folder: new folder.
        labels: by split, for each image its rows.
        names: of the classes.
        side: px of the square images.
    """
    rng = np.random.default_rng(0)
    for split, images in labels.items():
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for i, rows in enumerate(images):
            cv2.imwrite(str(folder / f"images/{split}/{i}.png"), rng.integers(0, 255, (side, side, 3), dtype=np.uint8))
            text = "".join(" ".join(f"{v:g}" for v in row) + "\n" for row in rows)
            (folder / f"labels/{split}/{i}.txt").write_text(text)
    path = folder / "data.yaml"
    path.write_text(f"train: images/train\nval: images/val\nnames: {list(names)}\n")
    return path
