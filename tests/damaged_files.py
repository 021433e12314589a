"""Damaged images and label files of about 25 kinds found in real data sets."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

GOOD_ROW = "0 0.5 0.5 0.25 0.25\n"
Damage = Callable[[Path, Path], None]  # changes a valid PNG file or its valid label file


def image_bytes(seed: int, suffix: str = ".png") -> bytes:
    """An encoded noise image of 64 px, different for each seed."""
    return cv2.imencode(suffix, np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8))[1].tobytes()


def image_is(data: bytes) -> Damage:
    return lambda image, _: image.write_bytes(data) and None


def label_is(data: str | bytes) -> Damage:
    raw = data.encode() if isinstance(data, str) else data
    return lambda _, label: label.write_bytes(raw) and None


def _replaced_by_folder(image: Path, _: Path) -> None:
    image.unlink()
    image.mkdir()


def _label_folder(_: Path, label: Path) -> None:
    label.unlink()
    label.mkdir()


def _dangling(image: Path, _: Path) -> None:
    image.unlink()
    image.symlink_to(image.with_name("nowhere"))


def _pipe(image: Path, _: Path) -> None:
    image.unlink()
    os.mkfifo(image)


PNG, JPEG = image_bytes(10_000), image_bytes(10_001, ".jpg")
FLIPPED = PNG[:300] + bytes([PNG[300] ^ 255]) + PNG[301:]
# By kind. Each makes the reader skip its image and nothing else.
IMAGE_SKIPPED: dict[str, Damage] = {
    "png cut short": image_is(PNG[: len(PNG) // 2]),
    "jpeg cut short": image_is(JPEG[: len(JPEG) // 2]),
    "png with a flipped byte": image_is(FLIPPED),
    "no bytes": image_is(b""),
    "text as image": image_is(b"This is not an image.\n" * 20),
    "web page": image_is(b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
    "folder named like an image": _replaced_by_folder,
    "link to nowhere": _dangling,
    "pipe": _pipe,
    "too small": image_is(cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes()),
    "negative coordinate": label_is("0 -0.5 0.5 0.2 0.2\n"),
    "px coordinates": label_is(GOOD_ROW + "0 320 240 64 48\n"),
    "NaN": label_is("0 nan 0.5 0.2 0.2\n"),
    "infinity": label_is("0 0.5 inf 0.2 0.2\n"),
    "4 columns": label_is("0 0.5 0.5 0.2\n"),
    "6 columns": label_is("0 0.5 0.5 0.2 0.2 0.9\n"),
    "letters": label_is("cat 0.5 0.5 0.2 0.2\n"),
    "commas": label_is("0,0.5,0.5,0.2,0.2\n"),
    "class -1": label_is("-1 0.5 0.5 0.2 0.2\n"),
    "class beyond names": label_is("7 0.5 0.5 0.2 0.2\n"),
    "class 1.5": label_is("1.5 0.5 0.5 0.2 0.2\n"),
    "class 1e300": label_is("1e300 0.5 0.5 0.2 0.2\n"),
    "UTF-16": label_is(GOOD_ROW.encode("utf-16")),
    "binary": label_is(bytes(range(256))),
    "label is a folder": _label_folder,
}
# Each makes the reader drop one row and report it; the image stays.
ROW_DROPPED: dict[str, Damage] = {
    "duplicate rows": label_is(GOOD_ROW * 3),
    "no area": label_is(GOOD_ROW + "1 0.5 0.5 0 0.2\n"),
    "polygon of two points": label_is(GOOD_ROW + "1 0.1 0.1 0.5 0.5 0.1 0.1\n"),
}
# Unusual but valid.
UNUSUAL: dict[str, Damage] = {
    "empty lines": label_is("\n \n\t\n"),
    "byte order mark": label_is(b"\xef\xbb\xbf" + GOOD_ROW.encode()),
    "jpeg named png": image_is(JPEG),
    "Windows line ends": label_is(GOOD_ROW.replace("\n", "\r\n")),
}


def write_damaged(root: Path, *, each: int, good: int) -> tuple[Path, dict[str, str]]:
    """Writes a data set with ``each`` images of every kind and ``good`` valid ones; val has 4 valid images.

    Returns:
        The dataset file, and the kind of damage by image stem.
    """
    kinds: dict[str, str] = {}
    for split in ("train", "val"):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
    damages = IMAGE_SKIPPED | ROW_DROPPED | UNUSUAL
    planned = [(f"{k:02d}_{i}", kind) for k, kind in enumerate(damages) for i in range(each)]
    for number, (stem, kind) in enumerate([*planned, *((f"good_{i}", "") for i in range(good))]):
        image, label = root / f"images/train/{stem}.png", root / f"labels/train/{stem}.txt"
        image.write_bytes(image_bytes(number))
        label.write_text(GOOD_ROW)
        if kind:
            damages[kind](image, label)
            kinds[stem] = kind
    for i in range(4):
        (root / f"images/val/{i}.png").write_bytes(image_bytes(20_000 + i))
        (root / f"labels/val/{i}.txt").write_text(f"{i % 2} 0.5 0.5 0.25 0.25\n")
    path = root / "data.yaml"
    path.write_text("train: images/train\nval: images/val\nnames: [thing, other]\n")
    return path, kinds
