"""From a model YAML to a network: read the spec, edit its rows where asked, construct the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.edit.rows import edit
from models.model import Model
from models.spec.parser import load_spec
from models.spec.registry import load_plugin
from tasks.keypoints import Keypoints
from utils.reading.limits import LARGEST_NETWORK


def build_model(
    cfg: str | Path | Mapping[str, Any],
    *,
    nc: int | None = None,
    ch: int | None = None,
    names: Sequence[str] | None = None,
    plugins: Sequence[str | Path] = (),
    attention: str | Sequence[str] = (),
    attention_init: str = "",
    keypoints: Keypoints | None = None,
    most_values: int = LARGEST_NETWORK,
) -> Model:
    """Builds a network from a model YAML (path, bare name or dictionary), freshly initialised and in training mode.

    Args:
        cfg: such as ``"yolov9-c-FocalModulation.yaml"``.
        nc: number of classes; the YAML's if not given.
        ch: number of input channels; the YAML's (3 if it has none) if not given.
        names: class names; ``class0`` … if not given.
        plugins: Python files of the caller's whose blocks the YAML uses.
        attention: modules to insert, such as ``["FocalModulation@9", "EMA@detect"]``: :func:`models.edit.rows.edit`.
        attention_init: ``"identity"`` starts them as exact no-ops.
        keypoints: of the data, for a network for pose estimation; the YAML's if not given.
        most_values: of parameters and buffers; a larger network is refused before it takes the memory.

    Raises:
        UserError: what is wrong with the YAML, a row or a name.
    """
    for path in plugins:
        load_plugin(path)
    if names is not None and nc is None:
        nc = len(names)
    spec = load_spec(cfg, nc=nc, ch=ch, keypoints=keypoints)
    if attention or attention_init:
        spec = edit(spec, insert=attention, init=attention_init).spec
    return Model(spec, names=names, most_values=most_values)
