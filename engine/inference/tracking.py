"""Objects followed from frame to frame: each detection of a video or stream gets the number of its object (``--track``).

The trackers are those of the package ``trackers`` (Apache-2.0), which is installed on request only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, cast

import torch

from data.sources.frames import Frame
from tasks import Task
from utils.boxes import xyxy_to_ltwh
from utils.cli.detect_arguments import TRACKERS
from utils.errors import UserError, first_line
from utils.types import Detections

TRACK = "track"  # the field of detections: (n,) int64, the object's number from 1; 0 for one that is not confirmed yet
FRAME_RATE = 30.0  # where a source has none, such as a folder of images


@dataclass
class Tracking:
    """The trackers of a run, one for each video, stream or folder of images, and the files of their tracks; a context manager.

    Attributes:
        kind: which tracker, a key of ``TRACKERS``.
        task: of the detections; trackers and files get the axis-aligned boxes about what they cover.
        folder: where ``<video>.csv`` is written, a row for each confirmed object of a frame as in the MOT challenge: frame and object from
            1, left, top, width and height in px, score, class from 0, -1, -1.
        count: files that were written.
    """

    kind: str
    folder: Path
    task: Task
    count: int = 0
    _trackers: dict[str, Any] = field(default_factory=dict)  # by video
    _first: dict[str, int] = field(default_factory=dict)  # of a folder of images: the place of the first among all files
    _files: dict[str, TextIO] = field(default_factory=dict)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()

    def follow(self, frame: Frame, found: Detections, *, stem: str, number: int | None, fps: float) -> Detections:
        """The detections with the numbers of their objects as the field ``track``; writes the rows of this frame.

        Args:
            stem: what the results of this video are called; images of one folder are one video.
            number: of a video's frame, from 1; images are counted here, with those that could not be read.
            fps: frames a second, as far as they are used.
        """
        source = frame.output_name if frame.video else str(Path(frame.path).parent)
        if source not in self._trackers:
            self._trackers[source] = new_tracker(self.kind, fps or FRAME_RATE)
            self._files[source] = self._opened(stem if frame.video else f"{Path(source).resolve().name or 'images'}")
        if number is None:
            number = frame.index - self._first.setdefault(source, frame.index) + 1
        boxes = self.task.shapes(found).extents
        tracks = _numbers(self._trackers[source], found.replace(boxes=boxes))
        numbered = found.replace(fields={**found.fields, TRACK: tracks})
        self._files[source].writelines(mot_rows(numbered.replace(boxes=boxes), number))
        self._files[source].flush()
        return numbered

    def _opened(self, stem: str) -> TextIO:
        self.folder.mkdir(parents=True, exist_ok=True)
        path, number = self.folder / f"{stem}.csv", 1
        taken = {file.name for file in self._files.values()}
        while str(path) in taken:
            number += 1
            path = self.folder / f"{stem}_{number}.csv"
        self.count += 1
        return open(path, "w", encoding="utf-8", newline="")  # closed on exit


def require_trackers() -> Any:
    """The package ``trackers``. Raises UserError with the command that installs it."""
    try:
        import trackers
    except ImportError as error:
        reason = "" if getattr(error, "name", "") == "trackers" else f" ({first_line(error)})"
        raise UserError(f"--track: needs the package trackers: pip install trackers{reason}") from None
    return trackers


def check_tracking(task: Task, kind: str) -> None:
    """Refuses a tracker for a task whose result is one of the whole image, and without the package."""
    if kind and task.whole_image:
        raise UserError(f"--track: trackers follow objects, and the task {task.name!r} has one result an image; leave it out")
    if kind:
        require_trackers()


def new_tracker(kind: str, fps: float) -> Any:
    """A tracker that has seen nothing. Raises UserError where the package, or this tracker in it, is not there."""
    package = require_trackers()
    if not hasattr(package, TRACKERS[kind]):
        raise UserError(f"--track {kind}: the installed version of trackers has no {TRACKERS[kind]}: pip install --upgrade trackers")
    return getattr(package, TRACKERS[kind])(frame_rate=fps)


def mot_rows(found: Detections, frame: int) -> list[str]:
    """Rows of the MOT challenge's files for the confirmed objects of a frame, which counts from 1."""
    sure = found[found.fields[TRACK] > 0]
    columns = zip(sure.fields[TRACK].tolist(), xyxy_to_ltwh(sure.boxes).tolist(), sure.scores.tolist(), sure.classes.tolist())
    return [f"{frame},{track},{x:.2f},{y:.2f},{w:.2f},{h:.2f},{score:.4f},{c},-1,-1\n" for track, (x, y, w, h), score, c in columns]


def labelled(found: Detections, names: Sequence[str]) -> tuple[Detections, Sequence[str]]:
    """Detections and names as a task draws them: with tracks, each object has a colour and a name (``person #3``) of its own."""
    if TRACK not in found.fields:
        return found, names
    tracks, classes = found.fields[TRACK].tolist(), found.classes.tolist()
    keys = [track or -1 - c for track, c in zip(tracks, classes)]  # unconfirmed ones look like their class
    texts: Mapping[int, str] = {key: names[c] + (f" #{track}" if track else "") for key, track, c in zip(keys, tracks, classes)}
    without = {name: value for name, value in found.fields.items() if name != TRACK}
    return found.replace(classes=torch.tensor(keys, dtype=torch.long), fields=without), cast("Sequence[str]", texts)


def _numbers(tracker: Any, found: Detections) -> torch.Tensor:
    """(n,) the object of each detection, from 1; 0 where the tracker has not confirmed it."""
    import numpy as np
    import supervision

    given = supervision.Detections(
        xyxy=found.boxes.float().numpy().reshape(-1, 4), confidence=found.scores.float().numpy(), class_id=found.classes.numpy(),
        data={"row": np.arange(len(found))},
    )  # fmt: skip
    numbers = torch.zeros(len(found), dtype=torch.long)
    tracked = tracker.update(given)  # may come in another order, and without some
    if len(tracked) and tracked.tracker_id is not None:
        rows = torch.from_numpy(np.asarray(tracked.data["row"], dtype=np.int64))
        numbers[rows] = torch.from_numpy(tracked.tracker_id.astype(np.int64)) + 1
    return numbers.clamp(min=0)
