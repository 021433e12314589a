"""Weights that others publish: who, where and under which licence; fetched only on request, and checked before they are kept."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

from models.checkpoints.torch_files import read_torch_file
from models.spec.config_files import bundled_names
from models.spec.families import NUMBERED, respelled
from models.spec.names import absent_network, meant
from utils import distributed
from utils.errors import UserError
from utils.files import atomic_write

LEAST_BYTES = 1 << 20  # the smallest published file is larger
LONGEST_WAIT = 1800  # s that other ranks wait for the one that downloads


class Release(NamedTuple):
    """Where files of one project lie."""

    project: str
    licence: str
    folder: str  # URL


V5 = Release("ultralytics/yolov5", "AGPL-3.0", "https://github.com/ultralytics/yolov5/releases/download/v7.0")
V7 = Release("WongKinYiu/yolov7", "GPL-3.0", "https://github.com/WongKinYiu/yolov7/releases/download/v0.1")
V9 = Release("WongKinYiu/yolov9", "GPL-3.0", "https://github.com/WongKinYiu/yolov9/releases/download/v0.1")
V10 = Release("THU-MIG/yolov10", "AGPL-3.0", "https://github.com/THU-MIG/yolov10/releases/download/v1.1")
V12 = Release("sunsmarterjie/yolov12", "AGPL-3.0", "https://github.com/sunsmarterjie/yolov12/releases/download/v1.0")
V13 = Release("iMoonLab/yolov13", "AGPL-3.0", "https://github.com/iMoonLab/yolov13/releases/download/yolov13")
ASSETS = Release("ultralytics", "AGPL-3.0", "https://github.com/ultralytics/assets/releases/download/v8.3.0")
NEWER_ASSETS = ASSETS._replace(folder="https://github.com/ultralytics/assets/releases/download/v8.4.0")

FOR_TASKS = ("", "-seg", "-pose", "-obb", "-cls")

PUBLISHED: dict[str, Release] = {
    **{f"yolov5{size}{form}.pt": V5 for size in "nsmlx" for form in ("", "6", "-seg", "-cls")},
    **{f"yolov5{size}{p6}u.pt": ASSETS for size in "nsmlx" for p6 in ("", "6")},
    **{f"yolov7{form}.pt": V7 for form in ("", "x", "-w6", "-e6", "-d6", "-e6e", "-tiny")},
    **{f"yolov7{form}_training.pt": V7 for form in ("", "x", "-w6", "-e6", "-d6", "-e6e")},
    **{f"yolov8{size}{task}.pt": ASSETS for size in "nsmlx" for task in FOR_TASKS},
    **{f"yolov9-{size}.pt": V9 for size in "tsmce"},
    **{f"yolov9-{size}-converted.pt": V9 for size in "tsmce"},
    **{f"gelan-{size}.pt": V9 for size in "smce"},
    **{f"yolov9{size}.pt": ASSETS for size in ("t", "s", "m", "c", "e", "c-seg", "e-seg")},
    **{f"yolov10{size}.pt": V10 for size in "nsmblx"},
    **{f"yolo11{size}{task}.pt": ASSETS for size in "nsmlx" for task in FOR_TASKS},
    **{f"yolo12{size}.pt": ASSETS for size in "nsmlx"},
    **{f"yolov12{size}.pt": V12 for size in "nsmlx"},
    **{f"yolov13{size}.pt": V13 for size in "nslx"},
    **{f"rtdetr-{size}.pt": ASSETS for size in "lx"},
    **{f"yolo26{size}{task}.pt": NEWER_ASSETS for size in "nsmlx" for task in FOR_TASKS},
}


def missing_weights(path: Path) -> str:
    """The line for a checkpoint that is not on disk: who publishes a file of that name, or the nearest name."""
    release = PUBLISHED.get(path.name)
    if release is None:
        hint = absent_network(path.stem, bundled_names()) or _hint(path)
        return f"{path}: no such checkpoint" + (f"; {hint}" if hint else "")
    return (
        f"{path}: not here; {release.project} publishes it at {release.folder}/{path.name} under {release.licence}: "
        "add --download to fetch it"
    )


def ensure_weights(path: str | Path, *, download: bool) -> None:
    """Fetches a published file that is not on disk, if ``download`` is set; of several ranks only the main one does.

    Raises:
        UserError: no publisher of a file of that name is known, it cannot be fetched, or what came is no checkpoint.
    """
    path = Path(path)
    if not download or not str(path) or path.exists():
        return
    release = PUBLISHED.get(path.name)
    if release is None:
        known = absent_network(path.stem, bundled_names()) or _meant(path.stem) or f"known are {', '.join(sorted(PUBLISHED)[:6])} …"
        raise UserError(f"--download: no publisher of {path.name} is known; {known}")
    if distributed.is_main():
        _fetch(release, path)
        return
    deadline = time.monotonic() + LONGEST_WAIT
    while not path.exists():
        if time.monotonic() > deadline:
            raise UserError(f"{path}: the main rank has not fetched it in {LONGEST_WAIT // 60} minutes")
        time.sleep(1)


def _hint(path: Path) -> str:
    """What to say of a file that nobody is known to publish; empty where its name is not like that of a published one."""
    if path.suffix != ".pt" or path.name in ("best.pt", "last.pt"):
        return ""
    if hint := _meant(path.stem):
        return f"of published ones, {hint}"
    return "not among the published files that --download fetches" if NUMBERED.match(path.stem) else ""


def _meant(stem: str) -> str:
    """The published name that an unknown one may mean: of the same family, task and form, never of a neighbour."""
    spelled = respelled(stem)
    if f"{spelled}.pt" in PUBLISHED:
        return f"did you mean '{spelled}.pt'?"
    return meant(stem, [Path(name).stem for name in PUBLISHED], suffix=".pt")


def _fetch(release: Release, path: Path) -> None:
    from torch.hub import download_url_to_file

    url = f"{release.folder}/{path.name}"
    print(f"{path.name}: {release.project} publishes it under {release.licence}; fetching {url}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            download_url_to_file(url, str(partial), progress=distributed.is_main())
            _check_download(partial, url)
    except URLError as error:  # no network, no such host, or an HTTP status
        raise UserError(f"--download: {url} cannot be fetched ({error.reason}); fetch it elsewhere and give its path") from None
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--download: {url} cannot be fetched ({' '.join(str(error).split())[:150]})") from None
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")


def _check_download(path: Path, url: str) -> None:
    """Refuses a web page, a stub and anything that torch did not write."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(64)
    if head.lstrip()[:1] == b"<":
        raise UserError(f"--download: {url} gave a web page, not a checkpoint")
    if size < LEAST_BYTES:
        raise UserError(f"--download: {url} gave {size} bytes, too few for a checkpoint")
    try:
        read_torch_file(path)
    except UserError as error:
        raise UserError(f"--download: {url} gave {str(error).replace(f'{path}: ', '')}") from None
