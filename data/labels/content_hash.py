"""A hash of what a training learns from, wherever its files lie: image names in their order, sizes and labels."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.labels.table import LabelTable

LEFT_OUT = ("has_label_file", "rows", "problems")  # of the files, not of the labels


def content_hash(image_files: Sequence[str | Path], table: LabelTable) -> str:
    """The sha256 of the names of the images, without their folders, and of their labels, in this order."""
    digest = hashlib.sha256()
    for file in image_files:
        digest.update(Path(file).name.encode(errors="surrogateescape") + b"\0")
    for field in dataclasses.fields(table):
        value = getattr(table, field.name)
        if field.name not in LEFT_OUT and value is not None:
            array = np.ascontiguousarray(value)
            digest.update(f"{field.name} {array.dtype.str} {array.shape}".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()
