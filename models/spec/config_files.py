"""The YAML file that a path or a bare name means: a file of the user's, or one of those under ``models/configs``."""

from __future__ import annotations

import logging
import re
import stat
from collections.abc import Collection
from pathlib import Path

from models.spec.families import respelled
from models.spec.names import absent_network, meant
from utils.errors import UserError
from utils.files import replacement

log = logging.getLogger(__name__)
CONFIGS = Path(__file__).parents[1] / "configs"
SCALED_NAME = re.compile(r"^(?P<family>.*?\d)(?P<scale>[a-z])(?P<rest>(?:[-_].*)?)$")
SCALES_KEY = re.compile(rb"^scales[ \t]*:", re.MULTILINE)
# Folders of published projects: commands of their pages work here as they stand.
PUBLISHED_FOLDERS = frozenset(
    ["models", "training", "deploy", "cfg"]
    + [f"models/{part}" for part in ("detect", "hub", "panoptic", "segment", "v3", "v5", "v8", "v9")]
    + [*(f"cfg/{part}" for part in ("baseline", "deploy", "training")), "ultralytics/cfg/models"]
    + [f"ultralytics/{part}/{family}" for part in ("models", "cfg/models") for family in ("v3", "v5", "v8", "v9", "v10", "11", "12", "26")]
)


def find_config(name: str | Path, *, quiet: bool = False) -> tuple[Path, str]:
    """The YAML that ``name`` means, and the scale letter in its name (empty if it has none).

    An existing path is taken as it is, and ``yolov8s-p2.yaml`` reads a ``yolov8-p2.yaml`` beside it, if it has scales. Otherwise the file
    name is searched for anywhere under ``models/configs``, first as written, then without its scale letter. A path whose folder does not
    exist is only searched for if the folder is one in which published projects keep their files.

    Args:
        quiet: a file of ``models/configs`` that is read in place of a path is not reported.

    Raises:
        UserError: nothing found (with the nearest name), no such folder, or two files of that name.
    """
    path = Path(name)
    if path.suffix in (".pt", ".pth", ".safetensors"):
        raise UserError(f"{name}: holds weights, where a model YAML is asked for; a run's is the model.yaml in its folder")
    if path.suffix not in (".yaml", ".yml"):
        path = path.with_name(path.name + ".yaml")
    if path.is_file():
        return path, ""
    if other := _other_kind(Path(name)) or _other_kind(path):
        raise UserError(f"{name}: is {other}, expected a model YAML")
    scaled = SCALED_NAME.match(path.stem)
    base = path.with_name(f"{scaled['family']}{scaled['rest']}.yaml") if scaled else path
    if scaled and _has_scales(base):
        return base, scaled["scale"]
    found, letter = _find_bundled(path, base, scaled["scale"] if scaled else "")
    in_place = replacement(path, found, published=PUBLISHED_FOLDERS)
    if in_place and not quiet:
        log.warning("%s", in_place)
    return found, letter


def bundled_names() -> set[str]:
    """The names of the files under ``models/configs``, without their suffix."""
    return {path.stem for path in CONFIGS.rglob("*.yaml")}


def _other_kind(path: Path) -> str:
    """What stands at a path that is no regular file; empty where nothing does, or where a bare name is that of a folder by chance."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return ""
    if stat.S_ISDIR(mode):
        return "a folder" if len(path.parts) > 1 or path.suffix else ""
    return "" if stat.S_ISREG(mode) else "a device or a pipe"


def _has_scales(path: Path) -> bool:
    """Whether a file is there and has a table of scales; others cannot be meant by a name with a scale letter."""
    try:
        return SCALES_KEY.search(path.read_bytes()) is not None
    except OSError:
        return False


def _find_bundled(path: Path, base: Path, scale: str) -> tuple[Path, str]:
    """The file under ``models/configs`` of a path's name, or of its name without the scale letter. Raises UserError as find_config does."""
    configs_by_name: dict[str, list[Path]] = {}
    for found in sorted(CONFIGS.rglob("*.yaml")):
        configs_by_name.setdefault(found.name, []).append(found)
    candidates = [(path.name, ""), (base.name, scale)]
    if path.parent.name == "deploy":  # YOLOv7 publishes training and deploy forms under one name in two folders
        candidates.insert(0, (f"{path.stem}-deploy.yaml", ""))
    for name, letter in candidates:
        paths = configs_by_name.get(name, [])
        if len(paths) > 1:
            raise UserError(f"{path.name} is the name of {len(paths)} files, give one with its folder: {', '.join(map(str, paths))}")
        if paths:
            return paths[0], letter
    unscaled = f"; {base} has no scales" if scale and base.is_file() else ""
    known = bundled_names()
    hint = absent_network(path.stem, known) or _meant(path.stem, known)
    raise UserError(f"{path}: no such model YAML, neither as a path nor under models/configs{unscaled}; {hint}".rstrip("; "))


def _meant(stem: str, known: Collection[str]) -> str:
    """The known name that an unknown one may mean: its family spelled as published, or the nearest by letters."""
    spelled = respelled(stem)
    scaled = SCALED_NAME.match(spelled)
    if spelled != stem and (spelled in known or (scaled and f"{scaled['family']}{scaled['rest']}" in known)):
        return f"did you mean {spelled!r}?"
    return meant(stem, known)
