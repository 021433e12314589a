"""A dataset YAML in any common form, or a folder of class folders, as one frozen value: where the images are, and the classes' names.

Nothing in the file is ever executed: a ``download:`` entry is only shown to the user when images are missing.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.labels.paths import as_written
from data.tools.shape_crops import ensure_shape_crops
from data.tools.shape_outlines import ensure_shape_outlines
from data.tools.shape_points import ensure_shape_points
from data.tools.shapes import ensure_shapes
from data.tools.shapes_obb import ensure_shapes_obb
from tasks.keypoints import KEYS as KEYPOINT_KEYS
from tasks.keypoints import Keypoints, read_keypoints
from utils.errors import UserError, nearest, nearest_file
from utils.reading.limits import MAX_CHANNELS, MAX_CLASSES, MAX_NAME_CHARS
from utils.reading.text_files import user_path
from utils.reading.yaml_text import read_yaml, shown

log = logging.getLogger(__name__)
SPLITS = ("train", "val", "test")
KEYS = (*SPLITS, "path", "names", "nc", "ch", "channels", "bits", "download", "annotations", "flip_idx", *KEYPOINT_KEYS)
ALIKE = 0.78  # how much like one of KEYS another key is for a slip of the pen, by difflib; files also have keys of other programs
SPLIT_FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
HERE = Path(__file__).resolve().parent
EMBEDDED: dict[str, Callable[[Path], Path]] = {
    "shapes.yaml": ensure_shapes, "shapes-seg.yaml": ensure_shape_outlines, "shapes-pose.yaml": ensure_shape_points,
    "shapes-obb.yaml": ensure_shapes_obb, "shapes-cls.yaml": ensure_shape_crops,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """The content of a dataset YAML, with every path absolute. Links in paths are not followed: labels are found by the names in a path.

    Attributes:
        yaml_path: the file it was read from.
        root: the folder that relative paths were resolved against first.
        names: class names in class order (``("item",)`` when all classes are treated as one).
        nc: number of classes the model learns.
        label_nc: number of classes in the label files; differs from ``nc`` only with ``single_cls``.
        train: image folders, image files or .txt lists of the training images; ``val`` and ``test`` likewise, empty if the file has none.
        ch: image channels.
        ch_given: whether the file names them; else a model that names others decides.
        bits: 8 or 16 a value; None where the images decide.
        download: the file's ``download:`` entry as text, for messages only.
        single_cls: whether all classes count as one.
        annotations: by split, the COCO JSON that the file says to take labels from.
        flip_idx: for each keypoint the index of its left-right counterpart; None if the file has none.
        keypoints: what the keypoints of the objects are; None if the labels have none.
        class_names: the names before ``single_cls``, which class folders have.
    """

    yaml_path: Path
    root: Path
    names: tuple[str, ...]
    nc: int
    label_nc: int
    train: tuple[Path, ...]
    val: tuple[Path, ...]
    test: tuple[Path, ...]
    ch: int = 3
    ch_given: bool = False
    bits: int | None = None
    download: str | None = None
    single_cls: bool = False
    annotations: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    flip_idx: tuple[int, ...] | None = None
    keypoints: Keypoints | None = None
    class_names: tuple[str, ...] = ()

    @property
    def kpt_shape(self) -> tuple[int, int] | None:
        """Keypoints of an object, and values of each (2: x y, 3: x y visibility); None if the labels have none."""
        return self.keypoints.shape if self.keypoints else None

    @property
    def label_settings(self) -> Mapping[str, Any]:
        """What the file says of its labels to a task, as plain values by key."""
        return self.keypoints.settings if self.keypoints else {}

    def sources(self, split: str) -> tuple[Path, ...]:
        """The sources of ``train``, ``val`` or ``test``.

        Raises:
            UserError: the file has no such split, or a source is not there.
        """
        if split not in SPLITS:
            raise UserError(f"split {split!r} is unknown, one of {', '.join(SPLITS)} is expected")
        sources: tuple[Path, ...] = getattr(self, split)
        if not sources:
            raise UserError(f"{self.yaml_path}: no {split!r} entry, it should name a folder of images or a .txt list")
        missing = [p for p in sources if not p.exists()]
        if missing:
            raise _missing(self.yaml_path, split, missing, self.download)
        return sources

    def annotations_json(self, split: str) -> Path | None:
        """The COCO file of a split: the one that the dataset file names, else ``annotations/instances_<split>.json`` below the root or
        beside the images' folder, or ``_annotations.coco.json`` in it; None where there is none.

        With keypoints ``annotations/person_keypoints_<split>.json`` comes first.
        """
        if split in self.annotations:
            return self.annotations[split]
        source = next(iter(getattr(self, split)), None)
        if source is None:
            return None
        stems = [source.stem] * (source.stem != "images") + [source.parent.name, split]
        folders = dict.fromkeys((self.root, source.parent, source.parent.parent))
        kinds = ["person_keypoints"] * (self.keypoints is not None) + ["instances"]
        found = [folder / "annotations" / f"{kind}_{stem}.json" for kind in kinds for folder in folders for stem in stems]
        found += [source / "_annotations.coco.json"]
        return next((path for path in found if path.is_file()), None)


def load_dataset_spec(path_or_name: str | Path, *, single_cls: bool = False, need: Iterable[str] | None = None) -> DatasetSpec:
    """Reads a dataset YAML, given by path or by bare name (``coco``, ``shapes.yaml``), and checks that its images are there.

    A folder in place of a file holds a folder for each class under ``train`` and ``val`` (``test``), as classification data sets do; a file
    without names takes them from such folders, too.

    Relative sources are tried against ``path``, which is itself tried against the YAML's folder and then the working directory.
    ``../train/images`` without ``path`` (Roboflow's exports) is also tried without the dots. The embedded data set is generated
    when its YAML is asked for the first time.

    Args:
        path_or_name: the file, or the name of one that lies under ``data/``.
        single_cls: treat all classes as one, called ``item`` unless there is only one anyway.
        need: the splits that have to exist. Default: those of train and val that the file mentions, at least one.

    Raises:
        UserError: no such file, not a mapping, names and ``nc`` that disagree, or images that are not there; the message names every
            path tried.
    """
    yaml_path = find_dataset_yaml(path_or_name)
    if yaml_path.is_dir():
        return class_folder_spec(yaml_path, single_cls=single_cls, need=need)
    raw = read_yaml(yaml_path, as_written=("names",), expected="train, val and names")
    for key in raw:
        if key not in KEYS and (meant := difflib.get_close_matches(str(key).lower(), KEYS, n=1, cutoff=ALIKE)):
            log.warning("%s: the key %s is not read; did you mean %r?", yaml_path, shown(key), meant[0])
    if draw := EMBEDDED.get(yaml_path.name if yaml_path.resolve().parent == HERE else ""):
        _generate_embedded(HERE / yaml_path.stem, draw)
    download = None if raw.get("download") is None else str(raw["download"]).strip()
    roots = _roots(yaml_path, raw.get("path"))
    resolved: dict[str, tuple[Path, ...]] = {}
    missing: dict[str, list[Path]] = {}
    for split in SPLITS:
        resolved[split], missing[split] = _resolve_split(yaml_path, split, raw.get(split), roots)
    if need is None:
        need = [s for s in ("train", "val") if resolved[s]]
        if not need:
            raise UserError(f"{yaml_path}: neither 'train' nor 'val', each should name a folder of images, a .txt list, or a list of these")
    for split in need:
        if not resolved[split]:
            hint = nearest(split, [key for key in raw if isinstance(key, str) and key not in SPLITS]).replace("did you mean", "is it")
            what = hint or "it should name a folder of images or a .txt list"
            raise UserError(f"{yaml_path}: no {split!r} entry, {what}")
        if missing[split]:
            raise _missing(yaml_path, split, missing[split], download)
    folders = class_folder_names(resolved["train"]) if raw.get("names") is None and raw.get("nc") is None else ()
    names = _checked_names(yaml_path, folders) if folders else _read_names(yaml_path, raw)
    label_nc, class_names = len(names), names
    if single_cls:
        names = names if label_nc == 1 else ("item",)
    root = next((r for r in roots if r.is_dir()), roots[0])
    return DatasetSpec(
        yaml_path=yaml_path, root=root, names=names, nc=len(names), label_nc=label_nc, ch=_read_ch(yaml_path, raw),
        ch_given="ch" in raw or "channels" in raw, bits=_read_bits(yaml_path, raw), download=download, single_cls=single_cls,
        annotations=_read_annotations(yaml_path, raw, roots), flip_idx=_read_flip_idx(yaml_path, raw),
        keypoints=read_keypoints(raw, source=str(yaml_path)), class_names=class_names, **resolved,
    )  # fmt: skip


def class_folder_spec(folder: Path, *, single_cls: bool = False, need: Iterable[str] | None = None) -> DatasetSpec:
    """A data set that is a folder: under each split a folder for each class, whose names, in order, are the classes of ``train``.

    Without ``val`` (or ``valid``, ``validation``) the images of ``test`` validate.

    Raises:
        UserError: a split that is needed is not there, or has no folder of a class.
    """
    found = {split: next((p for name in SPLIT_FOLDERS[split] if (p := folder / name).is_dir()), None) for split in SPLITS}
    found["val"] = found["val"] or found["test"]
    for split in need if need is not None else ("train", "val"):
        if found[split] is None:
            raise UserError(f"{folder}: no folder {split!r}; a data set that is a folder has one for each class under train/ and val/")
    sources: dict[str, tuple[Path, ...]] = {split: (path,) if path is not None else () for split, path in found.items()}
    names = class_folder_names(sources["train"] or sources["val"])
    if not names:
        raise UserError(f"{folder}: no folder of a class below {(sources['train'] or sources['val'])[0]}; of other data sets give the YAML")
    class_names = _checked_names(folder, names)
    shown_names = ("item",) if single_cls and len(names) > 1 else class_names
    return DatasetSpec(
        yaml_path=folder, root=folder, names=shown_names, nc=len(shown_names), label_nc=len(names), single_cls=single_cls,
        class_names=class_names, train=sources["train"], val=sources["val"], test=sources["test"],
    )  # fmt: skip


def class_folder_names(sources: Sequence[Path]) -> tuple[str, ...]:
    """Names of the folders right below the sources, sorted; hidden ones are no classes."""
    names: set[str] = set()
    for source in sources:
        try:
            with os.scandir(source) as entries:
                names.update(e.name for e in entries if e.is_dir() and not e.name.startswith((".", "__")))
        except OSError:
            continue  # a list, or a folder that cannot be read, which listing its images reports
    return tuple(sorted(names))


def _generate_embedded(folder: Path, draw: Callable[[Path], Path]) -> None:
    try:
        draw(folder)
    except OSError as error:
        raise UserError(f"the embedded data set cannot be drawn into {folder}: {error.strerror or error}; python -m data.shapes FOLDER "
                        "draws it elsewhere") from error  # fmt: skip


def _missing(yaml_path: Path, split: str, tried: list[Path], download: str | None) -> UserError:
    places = ", ".join(str(p) for p in tried)
    hint = f"; its 'download:' entry, which is never run here, says: {' '.join(download.split())}" if download else ""
    return UserError(f"{yaml_path}: images of {split!r} not found, tried {places}{hint}")


def find_dataset_yaml(path_or_name: str | Path) -> Path:
    """The dataset file for a path or a bare name; a folder is one that holds folders of splits.

    Raises:
        UserError: there is none; the message names every path tried.
    """
    given = user_path(path_or_name, "dataset file")
    tried = [given]
    if given.suffix not in (".yaml", ".yml"):
        tried.append(given.with_name(given.name + ".yaml"))
    tried += [HERE / p.name for p in tried]
    for path in tried:
        if path.is_file():
            return as_written(path)
    if given.is_dir():
        return as_written(given)
    if given.exists():
        raise UserError(f"dataset file {path_or_name}: a YAML file is expected, this is a device or pipe")
    places = ", ".join(dict.fromkeys(map(str, tried)))
    raise UserError(f"dataset file {path_or_name} not found, tried {places}; {nearest_file(given, HERE)}")


def _roots(yaml_path: Path, path: object) -> list[Path]:
    """The folders that relative sources are tried against, the most likely first; that of the file a linked YAML leads to is one."""
    folders = [yaml_path.parent, yaml_path.resolve().parent]
    if path is None or path == "":
        return list(dict.fromkeys([*folders, Path.cwd()]))
    if isinstance(path, bool) or not isinstance(path, (str, int)):
        raise UserError(f"{yaml_path}: path: a folder is expected, not {shown(path)}; put a name that looks like a number in quotes")
    given = user_path(str(path), f"{yaml_path}: path")
    if given.is_absolute():
        return [as_written(given)]
    return list(dict.fromkeys(as_written(folder / given) for folder in (*folders, Path.cwd())))


def _resolve_split(yaml_path: Path, split: str, value: object, roots: list[Path]) -> tuple[tuple[Path, ...], list[Path]]:
    """Resolved sources of a split (the first guess where nothing exists) and the paths tried for those that are missing."""
    if value is None or value == "":
        return (), []
    entries = value if isinstance(value, (list, tuple)) else [value]
    found, missing = [], []
    for entry in entries:
        if not isinstance(entry, (str, Path)):
            raise UserError(f"{yaml_path}: {split}: a folder or .txt list is expected, not {shown(entry)}")
        tried = _candidates(user_path(entry, f"{yaml_path}: {split}"), roots)
        hit = next((p for p in tried if os.path.exists(p)), None)
        found.append(hit or tried[0])
        missing += [] if hit else tried
    return tuple(found), missing


def _candidates(entry: Path, roots: list[Path]) -> list[Path]:
    """Where a source may lie: below each root, and without leading dots (a Roboflow export names ``../train/images``); in place of a
    list, the folder of its name (COCO's archives have no ``train2017.txt``)."""
    if entry.is_absolute():
        return [as_written(entry)]
    parts = list(entry.parts)
    while parts and parts[0] in ("..", "."):
        parts.pop(0)
    forms = [entry] + ([Path(*parts)] if parts and entry.parts[0] == ".." else [])
    if entry.suffix == ".txt":
        forms += [entry.parent / "images" / entry.stem, entry.with_suffix("")]
    return list(dict.fromkeys(as_written(root / form) for form in forms for root in roots))


def _read_annotations(yaml_path: Path, raw: dict[str, Any], roots: list[Path]) -> dict[str, Path]:
    """The COCO files that ``annotations:`` names, by split."""
    given = raw.get("annotations") or {}
    if not isinstance(given, dict) or not all(k in SPLITS and isinstance(v, str) for k, v in given.items()):
        raise UserError(
            f"{yaml_path}: annotations: {shown(given)}, a COCO file for a split is expected: {{train: FILE.json, val: FILE.json}}"
        )
    found = {}
    for split, name in given.items():
        tried = _candidates(user_path(name, f"{yaml_path}: annotations: {split}"), roots)
        hit = next((p for p in tried if os.path.isfile(p)), None)
        if hit is None:
            raise UserError(f"{yaml_path}: annotations: {split}: not found, tried {', '.join(map(str, tried))}")
        found[split] = hit
    return found


def _read_names(yaml_path: Path, raw: dict[str, Any]) -> tuple[str, ...]:
    """Class names in order from a list, a dict or ``nc`` alone."""
    names, nc = raw.get("names"), raw.get("nc")
    if nc is not None and (isinstance(nc, bool) or not isinstance(nc, int) or not 1 <= nc <= MAX_CLASSES):
        raise UserError(f"{yaml_path}: nc: {shown(nc)}, a whole number from 1 to {MAX_CLASSES} is expected")
    if names is None:
        if nc is None:
            raise UserError(f"{yaml_path}: neither 'names' nor 'nc'; names: [cat, dog] or names: {{0: cat, 1: dog}} is expected")
        return tuple(f"class{i}" for i in range(nc))
    if isinstance(names, dict):
        names = _ordered(yaml_path, names)
    if not isinstance(names, (list, tuple)) or not names:
        raise UserError(f"{yaml_path}: names: a list or a mapping from class number to name is expected, not {shown(names)}")
    if len(names) > MAX_CLASSES:
        raise UserError(f"{yaml_path}: names: {len(names)} classes, at most {MAX_CLASSES} are read")
    if nc is not None and nc != len(names):
        raise UserError(f"{yaml_path}: nc: {nc} but names has {len(names)} entries; make them agree or leave nc out")
    return _checked_names(yaml_path, names)


def _checked_names(yaml_path: Path, names: Sequence[object]) -> tuple[str, ...]:
    """The names as they were written. Raises UserError for one that is none: empty, a list, several lines, the name of another class."""
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        where = f"{yaml_path}: names: class {index}"
        if name is None or not str(name).strip():
            raise UserError(f"{where} has no name")
        if not isinstance(name, str):
            raise UserError(f"{where}: a name is expected, not {shown(name)}; names: [cat, dog] or names: {{0: cat, 1: dog}} is right")
        if len(name) > MAX_NAME_CHARS or "\n" in name or "\t" in name:
            raise UserError(f"{where}: one line of at most {MAX_NAME_CHARS} characters without tabs is expected, not {shown(name)}")
        if name in first:
            raise UserError(f"{where} is called {shown(name)} like class {first[name]}; give each class a name of its own")
        first[name] = index
    return tuple(map(str, names))


def _ordered(yaml_path: Path, names: dict[str, Any]) -> list[Any]:
    if wrong := next((k for k in names if not (k.isascii() and k.isdecimal() and len(k) <= len(str(MAX_CLASSES)))), None):
        raise UserError(f"{yaml_path}: names: keys must be class numbers 0, 1, 2 …, not {shown(wrong)}")
    by_index = {int(k): v for k, v in names.items()}
    absent = sorted(set(range(len(names))) - set(by_index))
    if absent:
        raise UserError(f"{yaml_path}: names: {len(names)} classes, but no entry for class {absent[0]}; keys must be 0 to {len(names) - 1}")
    return [by_index[i] for i in range(len(names))]


def _read_ch(yaml_path: Path, raw: dict[str, Any]) -> int:
    ch = raw.get("ch", raw.get("channels", 3))
    if isinstance(ch, bool) or not isinstance(ch, int) or not 1 <= ch <= MAX_CHANNELS:
        raise UserError(f"{yaml_path}: ch: {shown(ch)}, the number of image channels is expected, from 1 to {MAX_CHANNELS}")
    return ch


def _read_bits(yaml_path: Path, raw: dict[str, Any]) -> int | None:
    bits = raw.get("bits")
    if bits is not None and (not isinstance(bits, int) or bits not in (8, 16)):
        raise UserError(f"{yaml_path}: bits: {shown(bits)}, 8 or 16 is expected (or leave it out: the images tell)")
    return bits


def _read_flip_idx(yaml_path: Path, raw: dict[str, Any]) -> tuple[int, ...] | None:
    given = raw.get("flip_idx")
    if given is None:
        return None
    count = len(given) if isinstance(given, list) else 0
    keypoints = read_keypoints(raw, source=str(yaml_path))
    if count and keypoints is not None and count != keypoints.count:
        raise UserError(f"{yaml_path}: flip_idx: {count} indices, but kpt_shape has {keypoints.count} keypoints; one for each is expected")
    if not count or not all(type(i) is int and 0 <= i < count and given[i] == k for k, i in enumerate(given)):
        pair = [1, 0, *range(2, count)] if count > 1 else [0]
        raise UserError(
            f"{yaml_path}: flip_idx: {shown(given)}, the index of each keypoint's left-right counterpart is expected, from 0 to "
            f"{max(count - 1, 0)}, such as {shown(pair)}"
        )
    return tuple(given)
