"""Every image of a data set opened and checked, in parallel and in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

from data.images.reading import ImageError, probe_image
from data.labels.problems import CORRUPT, MISSING, Problem
from data.labels.table import ImageLabels

PROCESSES_FROM = 1000  # images; for fewer, starting processes takes longer than they save

Result = TypeVar("Result")


def map_images(
    function: Callable[[str], Result], image_files: Sequence[str], *, workers: int, title: str, progress: bool = True
) -> list[Result]:
    """``function`` of every image, in parallel and in order.

    Args:
        function: must be picklable.
        image_files: N images.
        workers: most threads, or processes where the images are many.
        title: of the progress bar.
        progress: whether to show it.
    """
    workers = max(1, min(workers, os.cpu_count() or 1))
    pool: Executor
    if len(image_files) >= PROCESSES_FROM and workers > 1:
        pool, chunk = ProcessPoolExecutor(workers), 64
    else:
        pool, chunk = ThreadPoolExecutor(workers), 1
    with pool:
        results = pool.map(function, image_files, chunksize=chunk)
        return list(tqdm(results, total=len(image_files), desc=title, unit="image", disable=not progress, leave=False))


def probe_labels(image_file: str, *, channels: int = 3) -> ImageLabels:
    """Checks one image: its size and no objects, or what is wrong with it."""
    try:
        return ImageLabels.background(probe_image(image_file, channels=channels), has_label_file=False)
    except ImageError as error:
        kind = CORRUPT if os.path.lexists(image_file) else MISSING
        problem = Problem(image_file, 0, str(error).removeprefix(f"{image_file}: "), True, kind)
        return ImageLabels.unusable(problem, has_label_file=False)
