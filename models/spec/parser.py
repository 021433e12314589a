"""Model YAML files to specs: finds the file, reads its dialect, and checks every key and row.

The dialects are those of ``models/spec/dialects.py``. What the rows build is decided in ``models/spec/planning.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.spec.config_files import find_config
from models.spec.dialects import dialect_of
from tasks.keypoints import KEYS as KEYPOINT_KEYS
from tasks.keypoints import Keypoints, read_keypoints
from utils.errors import UserError, nearest
from utils.reading.limits import LARGEST_MULTIPLE, MAX_CLASSES, MOST_CHANNELS, MOST_REPEATS, MOST_ROWS
from utils.reading.yaml_text import read_yaml, shown

log = logging.getLogger(__name__)
SCALING_KEYS = frozenset(["depth_multiple", "width_multiple", "scales", "scale"])
KNOWN_KEYS = SCALING_KEYS | {"nc", "ch", "anchors", "activation", "backbone", "head", "fused", "dialect", "end2end", "reg_max"}
KNOWN_KEYS |= frozenset(KEYPOINT_KEYS)
TOLERATED_KEYS = frozenset(["yaml_file", "names", "max_channels"])  # written by other programs; redundant here
LARGEST_REG_MAX = 64


@dataclass(frozen=True)
class Row:
    """One row of a YAML, as written, with its place."""

    source: int | tuple[int, ...]
    number: int
    module: str
    args: tuple[Any, ...]
    section: str


@dataclass(frozen=True)
class ModelSpec:
    """A model YAML after reading: everything that a network is built from.

    Attributes:
        origin: file name for messages.
        nc: number of classes.
        ch: number of input channels.
        depth, width, max_channels: the multiples in force, and the cap of the v8 dialect (None: no cap).
        anchors: anchor sizes per level in px, or None.
        anchors_per_cell: how many anchors a cell has, listed or only counted (``anchors: 3``); 0 where the file has no ``anchors:``.
        activation: text of the network's default activation, or None.
        dialect: ``"v5"``, ``"v8"`` or ``"v9"``: the program for which the file is written.
        scale: letter of the scale in force, empty without ``scales``.
        scales: the table of a v8 file.
        rows: backbone and head.
        fused: the network's layers are folded, as deploy() leaves them.
        end2end: the head ``Detect`` has a one-to-one branch beside the one-to-many one.
        reg_max: bins of a box side's distribution; None where the file leaves them to the head.
        keypoints: of a network for pose estimation; None for others.
    """

    origin: str
    nc: int
    ch: int
    depth: float
    width: float
    max_channels: int | None
    anchors: tuple[tuple[float, ...], ...] | None
    anchors_per_cell: int
    activation: str | None
    dialect: str
    scale: str
    scales: Mapping[str, Any]
    rows: tuple[Row, ...]
    fused: bool = False
    end2end: bool = False
    reg_max: int | None = None
    keypoints: Keypoints | None = None

    def to_dict(self) -> dict[str, Any]:
        """A plain dictionary that :func:`read_spec` reads back to an equal spec (for checkpoints and saved YAMLs)."""
        out: dict[str, Any] = {"nc": self.nc, "ch": self.ch}
        if self.scales:
            out |= {"scales": {k: list(v) for k, v in self.scales.items()}, "scale": self.scale}
        else:
            out |= {"depth_multiple": self.depth, "width_multiple": self.width}
        if self.anchors is not None:
            out["anchors"] = [list(level) for level in self.anchors]
        elif self.anchors_per_cell:
            out["anchors"] = self.anchors_per_cell
        if self.activation:
            out["activation"] = self.activation
        if self.fused:
            out["fused"] = True
        if self.end2end:
            out["end2end"] = True
        if self.reg_max is not None:
            out["reg_max"] = self.reg_max
        if self.keypoints is not None:
            out |= self.keypoints.settings
        for section in ("backbone", "head"):
            out[section] = [_plain_row(row) for row in self.rows if row.section == section]
        if _dialect(out, self.rows, self.origin) != self.dialect:  # rows that showed it may be gone (deploy, edits)
            out["dialect"] = self.dialect
        return out


def load_spec(
    cfg: str | Path | Mapping[str, Any],
    *,
    nc: int | None = None,
    ch: int | None = None,
    scale: str | None = None,
    keypoints: Keypoints | None = None,
) -> ModelSpec:
    """Reads a model YAML given by path or bare name, or a dictionary of the same form.

    Args:
        nc: classes, instead of the file's; ``ch`` channels likewise.
        keypoints: of the data, instead of the file's; of no effect on a file without keypoints.
        scale: letter of a v8 file's scale, instead of the one in the name.

    Raises:
        UserError: no such file, two files of one name, not YAML, or a key or row that is wrong.
    """
    data, origin = _read_yaml(cfg, scale=scale)
    spec = read_spec(data, origin=origin, nc=nc, ch=ch)
    return spec if spec.keypoints is None or keypoints is None else replace(spec, keypoints=keypoints)


def named_channels(cfg: str | Path | Mapping[str, Any]) -> int | None:
    """The input channels that a model YAML names (``ch``); None where it leaves them open. Raises UserError as :func:`load_spec` does."""
    data, origin = _read_yaml(cfg, quiet=True)
    return _whole(origin, "ch", data["ch"], least=1) if "ch" in data else None


def _read_yaml(cfg: str | Path | Mapping[str, Any], *, scale: str | None = None, quiet: bool = False) -> tuple[Mapping[str, Any], str]:
    """The mapping of a model YAML, with the scale of its name, and what messages call it."""
    if isinstance(cfg, Mapping):
        return cfg, str(cfg.get("yaml_file", "model dictionary"))
    path, letter = find_config(cfg, quiet=quiet)
    data: Mapping[str, Any] = read_yaml(path, expected="keys such as nc, backbone and head")
    if scale or letter:
        data = {**data, "scale": scale or letter}
    family = data.get("yaml_file")  # of a run's model.yaml: the file that it was made from, which chooses the recipe
    return data, f"{path.name} ({family})" if family else path.name


def read_spec(data: Mapping[str, Any], *, origin: str, nc: int | None = None, ch: int | None = None) -> ModelSpec:
    """Checks a YAML's keys and rows and resolves scale, classes and channels. Raises UserError naming file and key or row."""
    for key in data:
        if key not in KNOWN_KEYS | TOLERATED_KEYS:
            hint = nearest(str(key), KNOWN_KEYS) or "known are " + ", ".join(sorted(KNOWN_KEYS))
            raise UserError(f"{origin}: unknown key {key!r}; {hint}")
    nc = _whole(origin, "nc", nc if nc is not None else data.get("nc", 80), least=1, most=MAX_CLASSES)
    ch = _whole(origin, "ch", ch if ch is not None else data.get("ch", 3), least=1, most=MOST_CHANNELS)
    scale, depth, width, cap = _scaling(data, origin)
    anchors, per_cell = _anchors(data.get("anchors"), origin)
    activation = data.get("activation")
    if activation is not None and not isinstance(activation, str):
        raise UserError(f"{origin}: activation should be text such as nn.SiLU(), not {activation!r}")
    rows = tuple(
        _row(row, f"{origin}: {section} row {i}", section)
        for section in ("backbone", "head")
        for i, row in enumerate(_rows_of(data, section, origin))
    )
    if not rows:
        raise UserError(f"{origin}: has no rows; backbone and head should be lists of [from, number, module, args]")
    return ModelSpec(
        origin, nc, ch, depth, width, cap, anchors, per_cell, activation, _dialect(data, rows, origin), scale,
        dict(data.get("scales") or {}), rows, bool(data.get("fused", False)), _switch(origin, "end2end", data.get("end2end", False)),
        None if data.get("reg_max") is None else _whole(origin, "reg_max", data["reg_max"], least=1, most=LARGEST_REG_MAX),
        read_keypoints(data, source=origin),
    )  # fmt: skip


def _dialect(data: Mapping[str, Any], rows: Sequence[Row], origin: str) -> str:
    return dialect_of(data, [row.module for row in rows], rows[-1].args, origin=origin)


def _row(row: Any, where: str, section: str) -> Row:
    if not isinstance(row, (list, tuple)) or len(row) != 4:
        raise UserError(f"{where}: should be [from, number, module, args], not {shown(row)}")
    source, number, module, args = row
    if isinstance(source, (list, tuple)) and source and all(_is_int(s) for s in source):
        source = tuple(source)
    elif not _is_int(source):
        raise UserError(f"{where}: from should be a row number or a list of them, not {shown(source)}")
    if not _is_int(number) or not 1 <= number <= MOST_REPEATS:
        raise UserError(f"{where}: number should be 1 or more and at most {MOST_REPEATS}, not {shown(number)}")
    if not isinstance(module, str):
        raise UserError(f"{where}: module should be a name, not {shown(module)}")
    if not isinstance(args, (list, tuple)):
        raise UserError(f"{where}: args should be a list, not {shown(args)}")
    return Row(source, number, module, tuple(args), section)


def _rows_of(data: Mapping[str, Any], section: str, origin: str) -> Sequence[Any]:
    rows = data.get(section) or []
    if not isinstance(rows, (list, tuple)):
        raise UserError(f"{origin}: {section} should be a list of rows, not {type(rows).__name__}")
    if len(rows) > MOST_ROWS:
        raise UserError(f"{origin}: {section} has {len(rows)} rows; at most {MOST_ROWS} are read")
    return rows


def _scaling(data: Mapping[str, Any], origin: str) -> tuple[str, float, float, int | None]:
    if "scales" not in data:
        if "scale" in data:
            raise UserError(f"{origin}: has no scales, so its name cannot carry the scale letter {data['scale']!r}")
        depth, width = (_positive(origin, key, data.get(key, 1.0)) for key in ("depth_multiple", "width_multiple"))
        return "", depth, width, None
    scales = data["scales"]
    if not isinstance(scales, Mapping) or not scales:
        raise UserError(f"{origin}: scales should be a table such as {{n: [0.33, 0.25, 1024]}}")
    scale = str(data.get("scale") or next(iter(scales)))
    if not data.get("scale") and len(scales) > 1:
        log.warning("%s: no scale letter in the name, so the first scale is read: %s", origin, scale)
    if scale not in scales:
        raise UserError(f"{origin}: has no scale {scale!r}; it has {', '.join(map(str, scales))}")
    values = scales[scale]
    if not isinstance(values, (list, tuple)) or len(values) != 3:
        raise UserError(f"{origin}: scale {scale} should be [depth, width, max_channels], not {values!r}")
    depth, width = (_positive(origin, f"scales.{scale}", v) for v in values[:2])
    return scale, depth, width, _whole(origin, f"scales.{scale}", values[2], least=1)


def _anchors(value: Any, origin: str) -> tuple[tuple[tuple[float, ...], ...] | None, int]:
    """Anchor sizes per level (None for an anchor-free file), and how many a cell has; ``anchors: 3`` gives only the latter."""
    if value is None:
        return None, 0
    if _is_int(value):
        return None, _whole(origin, "anchors", value, least=1)
    levels = value if isinstance(value, (list, tuple)) else []
    sizes = [v for level in levels if isinstance(level, (list, tuple)) for v in level]
    even = all(isinstance(level, (list, tuple)) and len(level) == len(levels[0]) and len(level) % 2 == 0 for level in levels)
    if not sizes or not even or not all(isinstance(v, (int, float)) and v > 0 for v in sizes):
        raise UserError(f"{origin}: anchors should be an integer or a list of levels [w1, h1, w2, h2, …] of one length, not {value!r}")
    return tuple(tuple(level) for level in levels), len(levels[0]) // 2


def _plain_row(row: Row) -> list[Any]:
    source = list(row.source) if isinstance(row.source, tuple) else row.source
    return [source, row.number, row.module, [dict(a) if isinstance(a, Mapping) else a for a in row.args]]


def _whole(origin: str, key: str, value: Any, *, least: int, most: int | None = None) -> int:
    if not _is_int(value) or value < least or (most is not None and value > most):
        bound = f"of at least {least}" if most is None else f"between {least} and {most}"
        raise UserError(f"{origin}: {key} should be a whole number {bound}, not {shown(value)}")
    return value


def _positive(origin: str, key: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= LARGEST_MULTIPLE:
        raise UserError(f"{origin}: {key} should be a positive number, at most {LARGEST_MULTIPLE:g}, not {shown(value)}")
    return float(value)


def _switch(origin: str, key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{origin}: {key} should be True or False, not {shown(value)}")
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
