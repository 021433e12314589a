"""From the text of ``--source`` to the source of frames that it names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.images.reading import is_image
from data.sources.files import FileSource, find_files
from data.sources.frames import STREAM_LIST_SUFFIX, FrameSource
from data.sources.screen import ScreenSource, is_screen
from data.sources.streams import StreamSource, listed_streams, stream_of
from data.sources.urls import is_url, redacted
from utils.errors import UserError


def open_source(
    source: str | Path,
    *,
    imgsz: int | tuple[int, int],
    stride: int = 32,
    vid_stride: int = 1,
    auto_letterbox: bool = True,
    whole_image: bool = False,
    on_skip: Callable[[str], None] = print,
    channels: int = 3,
) -> FrameSource:
    """The source of frames that a text names.

    Args:
        source: an image, a video, a folder of them, a glob, a .txt list of paths, a URL, a .streams list, a webcam's number, the screen.
        imgsz: side, or height and width, of the letterboxed image in px; rounded up to the stride.
        stride: of the model in px.
        vid_stride: of a video or stream, one frame in so many is yielded.
        auto_letterbox: pad only to the next multiple of the stride, not to the whole shape.
        whole_image: crop in place of the letterbox, as ``Task.whole_image`` says.
        on_skip: called with one line for each file or stream that is skipped.
        channels: of the images; any image is converted to grey (1) or RGB (3), other numbers are what the files must hold.

    Raises:
        UserError: not found, empty, or of a kind that is not supported.
    """
    text = str(source)
    if vid_stride < 1:
        raise UserError(f"--vid-stride {vid_stride}: a number of at least 1 is expected")
    settings: dict[str, Any] = {"imgsz": imgsz, "stride": stride, "vid_stride": vid_stride, "on_skip": on_skip, "channels": channels}
    settings |= {"auto_letterbox": auto_letterbox, "whole_image": whole_image}
    if is_url(text):
        if text.lower().startswith("http") and is_image(redacted(text)):
            return FileSource((text,), **settings)
        return StreamSource([stream_of(text, every_frame=True)], **settings)
    path = Path(text).expanduser()
    if path.suffix.lower() == STREAM_LIST_SUFFIX and path.is_file():
        return StreamSource(listed_streams(path), **settings)
    if is_screen(text) and not path.exists():
        return ScreenSource(text, **settings)
    if text.isdecimal() and not path.exists():
        return StreamSource([stream_of(text)], **settings)
    return FileSource(tuple(find_files(text)), **settings)
