"""What all sources of detect.py have in common: they yield frames, letterboxed for the network, in batches of one shape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from data.augment.centre_crop import fitted
from data.augment.letterbox import LetterboxedImage
from data.images.pixels import as_hwc
from data.images.reading import CONVERTED, ImageError
from utils.sizes import round_up_to_stride

VIDEO_SUFFIXES = frozenset((".asf", ".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"))
STREAM_LIST_SUFFIX = ".streams"


class VideoInfo(NamedTuple):
    """What is known about the video of a frame."""

    fps: float  # of the file or camera; 0 where unknown
    width: int  # px
    height: int  # px
    number: int  # of the frame among those that the source yields, from 0
    frames: int  # of the whole video at the given stride; 0 where unknown (a camera, a screen)


@dataclass(frozen=True, eq=False)
class Frame:
    """One image for the network.

    Attributes:
        path: of the image or video; a URL without its secrets, ``webcam0``, ``screen 1``.
        image: (H, W, C) uint8 or uint16, the original; RGB where C is 3.
        boxed: the same, letterboxed for the network.
        index: of the file or stream among all, from 0.
        total: number of files or streams.
        video: none for an image.
        name: of the results, unique among streams; empty: the path's.
    """

    path: str
    image: np.ndarray
    boxed: LetterboxedImage
    index: int
    total: int
    video: VideoInfo | None
    name: str = ""

    @property
    def output_name(self) -> str:
        """The file name, or a path that ends with it, from which results take their names."""
        return self.name or self.path


class FrameSource(ABC):
    """Yields frames in batches of one letterboxed shape: single ones from files, the newest of all streams together.

    Attributes:
        hw: height and width that images are fitted into, px, multiples of ``stride``.
        stride: of the model, px.
        auto: whether borders reach only to the next multiple of the stride.
        whole_image: whether images are cropped to ``hw``, not letterboxed.
        vid_stride: of a video or stream, one frame in so many is yielded.
        on_skip: called with one line for each file or stream that cannot be read.
        channels: of the images.
        at_once: number of videos that are read side by side; files are read one after another.
    """

    at_once = 1

    def __init__(
        self,
        *,
        imgsz: int | tuple[int, int],
        stride: int = 32,
        vid_stride: int = 1,
        auto_letterbox: bool = True,
        whole_image: bool = False,
        on_skip: Callable[[str], None] = print,
        channels: int = 3,
    ) -> None:
        height, width = (imgsz, imgsz) if isinstance(imgsz, int) else imgsz
        self.hw = (round_up_to_stride(height, stride), round_up_to_stride(width, stride))
        self.stride, self.auto, self.vid_stride = stride, auto_letterbox, vid_stride
        self.whole_image, self.on_skip, self.channels = whole_image, on_skip, channels

    @abstractmethod
    def batches(self) -> Generator[Sequence[Frame], None, None]:
        """Batches of frames whose letterboxed shapes agree; closing the generator releases files, cameras and threads.

        Raises:
            UserError: nothing of the source can be read.
        """

    def __iter__(self) -> Iterator[Frame]:
        """The frames one by one."""
        with closing(self.batches()) as batches:
            for frames in batches:
                yield from frames

    def boxed(self, image: np.ndarray) -> LetterboxedImage:
        """An image (H, W, C) as the network's input: letterboxed, or cropped for a result of the whole image."""
        return fitted(image, self.hw, whole_image=self.whole_image, auto=self.auto, stride=self.stride)

    def from_bgr(self, bgr: np.ndarray) -> np.ndarray:
        """(H, W, C) grey or RGB of a frame (H, W, 3) that OpenCV decoded from a video."""
        return as_hwc(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB if self.channels == 3 else cv2.COLOR_BGR2GRAY))

    def check_channels(self, name: str) -> None:
        """Raises ImageError where the network takes a number of channels that no video, camera or screen has."""
        if self.channels not in CONVERTED:
            raise ImageError(f"{name}: a video has 3 channels, {self.channels} are expected; give images")
