"""The screen, or a part of it, as a source: captured whenever the network is ready."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np

from data.sources.frames import Frame, FrameSource, VideoInfo
from utils.errors import UserError

_FORMS = "screen, 'screen N', 'screen LEFT TOP WIDTH HEIGHT' or 'screen N LEFT TOP WIDTH HEIGHT' is expected"


def is_screen(source: str) -> bool:
    """Whether a source names the screen."""
    return source.lower().split()[:1] == ["screen"]


class ScreenSource(FrameSource):
    """Frames of the screen, endlessly.

    Attributes:
        area: what is captured: left, top, width and height in px of the desktop.
    """

    def __init__(self, source: str, **settings: Any) -> None:
        """
        Args:
            source: ``screen``, the number of a screen (0, the default: all of them as one), and left, top, width and height of a part
                in px of that screen, as far as they are given.
            settings: as ``FrameSource`` takes them.

        Raises:
            UserError: the package mss is not installed, there is no display, no such screen, or nothing of it in that part.
        """
        super().__init__(**settings)
        if self.vid_stride > 1:
            raise UserError(f"--vid-stride {self.vid_stride}: the screen is captured whenever the network is ready; leave it out")
        self.check_channels("screen")
        number, part = _parse_screen(source)
        self.shown = f"screen {number}"
        self.area = _screen_area(source, number, part)

    def __len__(self) -> int:
        """One."""
        return 1

    def batches(self) -> Generator[Sequence[Frame], None, None]:
        """One frame at a time."""
        with _open_screen(self.shown) as capture:
            for number in count():
                image = self.from_bgr(np.asarray(capture.grab(self.area))[:, :, :3])  # the fourth channel is not used
                info = VideoInfo(0.0, image.shape[1], image.shape[0], number, 0)
                yield [Frame(self.shown, image, self.boxed(image), 0, 1, info, self.shown.replace(" ", ""))]


def _parse_screen(source: str) -> tuple[int, tuple[int, ...] | None]:
    """The number of the screen, and left, top, width and height of a part of it (None: all of it)."""
    try:
        values = [int(word) for word in source.split()[1:]]
    except ValueError:
        raise UserError(f"--source {source}: {_FORMS}") from None
    if len(values) not in (0, 1, 4, 5):
        raise UserError(f"--source {source}: {_FORMS}")
    return (values[0] if len(values) in (1, 5) else 0), (tuple(values[-4:]) if len(values) > 1 else None)


def _screen_area(source: str, number: int, part: tuple[int, ...] | None) -> dict[str, int]:
    """Left, top, width and height in px of the desktop; raises UserError where the screen does not have the part."""
    with _open_screen(source) as capture:
        screens = capture.monitors
    if not 0 <= number < len(screens):
        raise UserError(f"--source {source}: there is no screen {number}; known are 0 (all as one) to {len(screens) - 1}")
    screen = screens[number]
    if part is None:
        return {key: int(screen[key]) for key in ("left", "top", "width", "height")}
    left, top, width, height = part
    if min(left, top) < 0 or min(width, height) < 1 or left + width > screen["width"] or top + height > screen["height"]:
        whole = f"{screen['width']}x{screen['height']} px"
        raise UserError(f"--source {source}: {width}x{height} px at ({left}, {top}) do not lie within screen {number} of {whole}")
    return {"left": screen["left"] + left, "top": screen["top"] + top, "width": width, "height": height}


@contextmanager
def _open_screen(source: str) -> Iterator[Any]:
    """The screen, opened for capture; to be used in the thread that opened it."""
    try:
        import mss
    except ImportError:
        raise UserError(f"--source {source}: the screen is read through the package mss: pip install mss") from None
    try:
        with (getattr(mss, "MSS", None) or mss.mss)() as capture:  # the newer name first
            yield capture
    except mss.ScreenShotError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--source {source}: there is no display that can be read here ({reason}); give a file or a stream") from None
