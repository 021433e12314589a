"""What detect.py's sources have in common: frames, ready for the network, in groups that it looks at together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

import cv2
import numpy as np

from data.augment.letterbox import LetterboxedImage, letterbox
from data.images.pixels import as_hwc
from data.images.reading import CONVERTED, ImageError
from utils.sizes import round_up_to_stride

VIDEO_SUFFIXES = frozenset((".asf", ".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"))


class VideoInfo(NamedTuple):
    """What is known about the video that a frame is from."""

    fps: float  # of the file or camera; 0 where unknown
    width: int  # px
    height: int  # px
    number: int  # of the frame among those that are looked at, from 0
    frames: int  # of the whole video at the given stride; 0 where unknown (a camera, a screen)


class Frame(NamedTuple):
    """One image to look at."""

    path: str  # of the image or video; a URL without what is secret in it, ``webcam0``, ``screen 1``
    image: np.ndarray  # (H, W, C) uint8 or uint16, the original; RGB where C is 3
    boxed: LetterboxedImage  # the same, letterboxed for the network
    index: int  # of the file or stream among all, from 0
    total: int  # number of files or streams
    video: VideoInfo | None  # None for an image
    name: str = ""  # what results are called after, unique among streams; empty: the path

    @property
    def called(self) -> str:
        """The file name, or the path of one, that results take theirs from."""
        return self.name or self.path


class FrameSource(ABC):
    """Gives frames in groups of one letterboxed shape: single ones from files, the newest of all streams together.

    Attributes:
        hw: Height and width that images are fitted into, px, multiples of ``stride``.
        stride: Of the model, px.
        auto: Whether borders reach only to the next multiple of the stride.
        vid_stride: Of a video or stream, one frame in so many is looked at.
        report: Takes one line for each file or stream that cannot be read.
        channels: Of the images.
        at_once: How many videos come side by side; files come one after another.
    """

    at_once = 1

    def __init__(
        self,
        *,
        imgsz: int | tuple[int, int],
        stride: int = 32,
        vid_stride: int = 1,
        auto_letterbox: bool = True,
        report: Callable[[str], None] = print,
        channels: int = 3,
    ) -> None:
        height, width = (imgsz, imgsz) if isinstance(imgsz, int) else imgsz
        self.hw = (round_up_to_stride(height, stride), round_up_to_stride(width, stride))
        self.stride, self.auto, self.vid_stride, self.report, self.channels = stride, auto_letterbox, vid_stride, report, channels

    @abstractmethod
    def batches(self) -> Generator[Sequence[Frame], None, None]:
        """Groups of frames whose letterboxed shapes agree; closing the generator lets go of files, cameras and threads.

        Raises:
            UserError: Nothing of the source can be read.
        """

    def __iter__(self) -> Iterator[Frame]:
        """The frames one by one."""
        with closing(self.batches()) as batches:
            for frames in batches:
                yield from frames

    def boxed(self, image: np.ndarray) -> LetterboxedImage:
        """An image (H, W, C), letterboxed for the network."""
        return letterbox(image, self.hw, auto=self.auto, stride=self.stride)

    def from_bgr(self, bgr: np.ndarray) -> np.ndarray:
        """(H, W, C) grey or RGB of what OpenCV decodes from a video."""
        return as_hwc(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB if self.channels == 3 else cv2.COLOR_BGR2GRAY))

    def check_channels(self, name: str) -> None:
        """Raises ImageError where the network takes what no video, camera or screen has."""
        if self.channels not in CONVERTED:
            raise ImageError(f"{name}: a video has 3 channels, {self.channels} are expected; give images")
