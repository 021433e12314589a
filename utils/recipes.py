"""Which hyper-parameter file a model starts from when none is given."""

from __future__ import annotations

from pathlib import Path

FAMILIES = (("v5", "scratch-low"), ("v7", "scratch.p5"), ("v8", "v8"), ("v9", "scratch-high"), ("gelan", "scratch-high"))


def family_hyp(cfg_name: str, dialect: str, anchor_based: bool) -> str:
    """The hyp file of the family that a model YAML's name tells, or else its dialect and head."""
    for part, recipe in FAMILIES:
        if part in cfg_name.lower():
            return f"hyp.{recipe}.yaml"
    return "hyp.v8.yaml" if dialect == "v8" else "hyp.scratch-low.yaml" if anchor_based else "hyp.scratch-high.yaml"


def find_hyp(name: str | Path, folder: Path) -> Path:
    """A hyp file given by path, or by the last part of one that lies in ``folder``."""
    beside = folder / Path(name).name
    return beside if not Path(name).exists() and beside.is_file() else Path(name)
