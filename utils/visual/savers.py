"""Writers of detection results: annotated images and videos, label files, tables, crops; each is written as soon as its frame is done."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TextIO

import cv2
import numpy as np

from utils.errors import UserError
from utils.metrics.coco_eval import category_ids_of
from utils.text_table import csv_cell
from utils.types import Detections

CROP_GAIN, CROP_PAD_PX = 1.02, 10  # how much more than the box a crop shows
WRITABLE = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # other images are saved as .jpg
DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in "0123456789¹²³")}  # of Windows, with any suffix
LONGEST_NAME = 200  # bytes
CSV_COLUMNS = ("Image Name", "Prediction", "Confidence", "Frame", "X1", "Y1", "X2", "Y2")


@dataclass(frozen=True)
class SaveOptions:
    """Which files are written. If none are, no folder is needed."""

    images: bool = True
    txt: bool = False
    csv: bool = False
    json: bool = False
    conf: bool = False  # a last column in the label files
    crops: bool = False

    @property
    def any(self) -> bool:
        return self.images or self.txt or self.csv or self.json or self.crops


class _Video(NamedTuple):
    """A video that is being written."""

    writer: cv2.VideoWriter
    size_wh: tuple[int, int]  # px


class ResultKind(Protocol):
    """What is asked of a task (``tasks.base.Task``) where its results are written."""

    @property
    def whole_image(self) -> bool: ...

    def result_rows(self, detections: Detections, hw: tuple[int, int], *, names: Sequence[str], with_confidence: bool = False) -> list[str]:
        """Rows of a text file."""

    def json_entries(self, detections: Detections) -> list[dict[str, Any]]:
        """What a JSON file says of each detection besides class and score."""

    def shapes(self, detections: Detections) -> Any:
        """What detections cover, with axis-aligned ``extents`` (n, 4) xyxy px."""


def cut_out(task: ResultKind, found: Detections) -> Detections:
    """The detections that become images of their own, with the boxes to cut: of a result of the whole image only the best class."""
    shown = found[:1] if task.whole_image else found
    return shown.replace(boxes=task.shapes(shown).extents)


@dataclass
class ResultWriter:
    """Writes the results of one run into a folder; a context manager, since videos and the table stay open meanwhile.

    Images of one name from several folders do not overwrite one another: the second is called ``name_2``.

    Attributes:
        stems: what results are called, by source; sources that are not in it are named as they come.
        videos_at_once: how many videos are written side by side; a further one ends the one that was begun first.
        written: how many files or, of the table, rows there are by kind: ``images``, ``videos``, ``labels``, ``crops``, ``rows``,
            ``entries``.
    """

    folder: Path
    names: Sequence[str]
    options: SaveOptions
    task: ResultKind
    written: dict[str, int] = field(default_factory=dict)
    videos_at_once: int = 1
    stems: dict[str, str] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)  # sources whose name was taken, and what their results are called
    _taken: set[str] = field(default_factory=set)  # in lower case, as some file systems know no other
    _label_files: dict[str, str] = field(default_factory=dict)  # stem of a label file -> its source
    _crop_folders: dict[str, str] = field(default_factory=dict)  # class name -> folder
    _videos: dict[str, _Video] = field(default_factory=dict)  # by source, in the order they were begun
    _table: TextIO | None = None
    _entries: TextIO | None = None

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Ends all files.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        for video in self._videos.values():
            video.writer.release()
        self._videos.clear()
        try:
            if self._table is not None:
                self._table.close()
            if self.options.json and kind is None:
                self._begin_entries()  # a file without entries where no image came
            if self._entries is not None:
                self._entries.write("]\n")
                self._entries.close()
        except OSError as failure:
            if kind is None:  # what ended the run says more
                raise self._unwritable(failure) from None

    def write(
        self, path: str, image: np.ndarray, found: Detections, *, drawn: np.ndarray, frame: int | None = None, fps: float = 0.0
    ) -> None:
        """Saves what is wanted of one image or video frame.

        Args:
            path: the file it came from, or what a stream is called.
            image: (H, W, 3) uint8 RGB, as it was read; crops are cut from it.
            found: boxes in px of ``image``.
            drawn: ``image`` with the boxes on it.
            frame: its number within a video; None for an image.
            fps: frames a second of the video that is written.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        stem = self.stem(path)
        try:
            if self.options.images and frame is None:
                suffix = Path(path).suffix.lower()
                self._image(self.folder / f"{stem}{suffix if suffix in WRITABLE else '.jpg'}", drawn, "images")
            elif self.options.images:
                self._video_frame(path, drawn, fps)
            if self.options.txt:
                self._labels(self.folder / "labels" / f"{self._label_stem(path, stem, frame)}.txt", image.shape[:2], found)
            if self.options.csv:
                self._rows(f"{stem}{Path(path).suffix}" if path in self.renamed else Path(path).name, frame, found)
            if self.options.json:
                self._write_entries(Path(path), stem, frame, found)
            if self.options.crops:
                self._crops(stem, image, found)
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"{self.folder}: cannot be written ({error.strerror or error})")

    def stem(self, path: str) -> str:
        """The source's name without suffix; another source of that name gets a number."""
        if path not in self.stems:
            stem = as_file_name(Path(path).stem)
            self.stems[path] = self._unique(stem, stem)
            if self.stems[path] != stem:
                self.renamed[path] = self.stems[path]
        return self.stems[path]

    def _label_stem(self, path: str, stem: str, frame: int | None) -> str:
        """That of a video's frame has its number; where an image or another video has that name, one more number."""
        wanted = stem if frame is None else f"{stem}_{frame}"
        number, name = 1, wanted
        while self._label_files.setdefault(name.lower(), path) != path:
            number += 1
            name = f"{wanted}_{number}"
        return name

    def _image(self, path: Path, image_rgb: np.ndarray, kind: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        done, encoded = cv2.imencode(path.suffix, cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR))
        if not done:
            raise UserError(f"{path}: OpenCV cannot write an image of {image_rgb.shape[1]}x{image_rgb.shape[0]} px in this format")
        path.write_bytes(encoded.tobytes())  # not cv2.imwrite, which fails in silence and does not take every path
        self._count(kind)

    def _video_frame(self, source: str, image_rgb: np.ndarray, fps: float) -> None:
        height, width = image_rgb.shape[:2]
        video = self._videos.get(source)
        if video is not None and video.size_wh != (width, height):  # a camera that came back with another size
            self._videos.pop(source).writer.release()
            video = None
        if video is None:
            while len(self._videos) >= self.videos_at_once:
                self._videos.pop(next(iter(self._videos))).writer.release()
            video = self._videos[source] = self._begin_video(self.stem(source), (width, height), fps)
        video.writer.write(cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR))

    def _begin_video(self, stem: str, size_wh: tuple[int, int], fps: float) -> _Video:
        path = self.folder / f"{self._unique(f'/video/{stem}', stem)}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps or 30.0, size_wh)
        if not writer.isOpened():
            raise UserError(f"{path}: OpenCV cannot write a video here; give --nosave, or another --project")
        self._count("videos")
        return _Video(writer, size_wh)

    def _labels(self, path: Path, hw: tuple[int, ...], found: Detections) -> None:
        """The task's rows; no file where nothing was found."""
        if not len(found.boxes):
            path.unlink(missing_ok=True)  # of an earlier run with --exist-ok
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = self.task.result_rows(found, (hw[0], hw[1]), names=self.names, with_confidence=self.options.conf)
        path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        self._count("labels")

    def _rows(self, name: str, frame: int | None, found: Detections) -> None:
        if self._table is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._table = open(self.folder / "predictions.csv", "w", newline="", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 - closed on exit
            csv.writer(self._table).writerow(CSV_COLUMNS)
        writer: Any = csv.writer(self._table)
        for box, score, label in zip(self.task.shapes(found).extents.tolist(), found.scores.tolist(), found.classes.tolist()):
            row = [csv_cell(name), csv_cell(self.names[label]), f"{score:.4f}", "" if frame is None else frame]
            writer.writerow(row + [f"{value:.1f}" for value in box])
        self.written["rows"] = self.written.get("rows", 0) + len(found.boxes)
        self._table.flush()

    def _begin_entries(self) -> TextIO:
        if self._entries is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._entries = open(self.folder / "predictions.json", "w", encoding="utf-8")  # noqa: SIM115 - closed on exit
            self._entries.write("[")
        return self._entries

    def _write_entries(self, path: Path, stem: str, frame: int | None, found: Detections) -> None:
        """COCO's results format, with names beside the numbers; the image's number is that in its file's name, or else the name."""
        file, ids = self._begin_entries(), category_ids_of(self.names)
        image: dict[str, Any] = {"image_id": int(stem) if stem.isdecimal() and stem.isascii() else stem, "file_name": path.name}
        if frame is not None:
            image = {**image, "image_id": f"{stem}_{frame}", "frame": frame}
        entries = self.task.json_entries(found)
        for entry, label, score in zip(entries, found.classes.tolist(), found.scores.tolist()):
            whole = {**image, "category_id": ids[label], "category": self.names[label], "score": round(score, 5), **entry}
            file.write(f"{',' if self.written.get('entries') else ''}\n{json.dumps(whole)}")
            self._count("entries")
        file.flush()

    def _crops(self, stem: str, image: np.ndarray, found: Detections) -> None:
        shown = cut_out(self.task, found)
        for box, label in zip(shown.boxes.tolist(), shown.classes.tolist()):
            folder = self.folder / "crops" / self._crop_folder(self.names[label])
            self._image(folder / f"{self._unique(f'{folder.name}/{stem}', stem)}.jpg", crop_of(image, box), "crops")

    def _crop_folder(self, class_name: str) -> str:
        """A folder for each class, also where two names differ in letter case only, or in what a file name cannot have."""
        if class_name not in self._crop_folders:
            name = as_file_name(class_name)
            self._crop_folders[class_name] = self._unique(f"/crops/{name}", name)
        return self._crop_folders[class_name]

    def _unique(self, key: str, name: str) -> str:
        number, key = 1, key.lower()
        while (candidate := key if number == 1 else f"{key}_{number}") in self._taken:
            number += 1
        self._taken.add(candidate)
        return name if number == 1 else f"{name}_{number}"

    def _count(self, kind: str) -> None:
        self.written[kind] = self.written.get(kind, 0) + 1


def crop_of(image: np.ndarray, box_xyxy: Sequence[float]) -> np.ndarray:
    """The part of an image (H, W, C) that a box in px shows, with a margin."""
    height, width = image.shape[:2]
    x1, y1, x2, y2 = box_xyxy
    half_w, half_h = ((b - a) * CROP_GAIN / 2 + CROP_PAD_PX / 2 for a, b in ((x1, x2), (y1, y2)))
    left, top = max(int((x1 + x2) / 2 - half_w), 0), max(int((y1 + y2) / 2 - half_h), 0)
    right, bottom = min(int((x1 + x2) / 2 + half_w), width), min(int((y1 + y2) / 2 + half_h), height)
    return image[top:bottom, left:right]


def unique_stems(paths: Sequence[str]) -> dict[str, str]:
    """What the results of each image are called: its stem; of images with equal stems the path below the common folder, if need be with
    the suffix."""
    common = os.path.commonpath([os.path.dirname(p) for p in paths]) if len({Path(p).anchor for p in paths}) == 1 else ""
    inner = {p: Path(os.path.relpath(p, common) if common else p.removeprefix(Path(p).anchor)) for p in paths}
    choices = {p: [_as_path(c) for c in (i.stem, i.with_suffix(""), i)] for p, i in inner.items()}
    counts = [Counter(wanted[level].lower() for wanted in choices.values()) for level in range(3)]
    found: dict[str, str] = {}
    taken: set[str] = set()
    for path, wanted in choices.items():
        name = best = next((w for w, count in zip(wanted, counts) if count[w.lower()] == 1), wanted[-1])
        number = 1
        while name.lower() in taken:
            number += 1
            name = f"{best}_{number}"
        taken.add(name.lower())
        found[path] = name
    return found


def _as_path(path: str | Path) -> str:
    return "/".join(map(as_file_name, Path(path).parts))


def as_file_name(name: str) -> str:
    """A class, image or camera name as a file or folder may be called on any system: without characters that mean something in paths,
    no name of a device, of a length that leaves room for a number and a suffix."""
    clean = re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f-\x9f\ud800-\udfff]', "_", name)
    clean = clean.encode("utf-8")[:LONGEST_NAME].decode("utf-8", "ignore").strip(". ") or "_"
    return f"_{clean}" if clean.partition(".")[0].rstrip().upper() in DEVICES else clean
