"""Images and annotations that never end or expand without end: devices, pipes, TIFFs of many pages, arrays of a claimed size."""

from __future__ import annotations

import os
import struct

import cv2
import numpy as np
import pytest

from data.images import tiff
from data.images.reading import ImageError, probe_image, read_image
from data.labels.files import list_images
from data.labels.voc import read_voc
from data.labels.yolo import read_labels
from data.sources.files import FileSource, find_files
from data.tools.convert import main as convert
from tests.bands import write_tiff
from utils.errors import UserError

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no such device")


@pytest.fixture
def endless(tmp_path):
    """A folder with an image, and a link to a device and a pipe for each kind of file."""
    cv2.imwrite(str(tmp_path / "good.png"), np.zeros((20, 20, 3), np.uint8))
    for suffix in ("png", "npy", "tif", "jpg"):
        os.symlink("/dev/zero", tmp_path / f"zero.{suffix}")
        os.mkfifo(tmp_path / f"pipe.{suffix}")
    return tmp_path


def test_devices_and_pipes_are_no_images(endless):
    files = [f for f in list_images([endless]) if not f.endswith("good.png")]
    assert len(files) == 6  # arrays count only where there are no other images
    for file in [*files, str(endless / "zero.npy"), str(endless / "pipe.npy")]:
        for open_image in (read_image, probe_image):
            with pytest.raises(ImageError, match="not a file"):
                open_image(file)
    table = read_labels([str(endless / "good.png"), *files], progress=False)
    assert table.usable.tolist() == [True] + [False] * 6


def test_detection_skips_devices_and_pipes(endless):
    os.mkfifo(endless / "clip.mp4")
    said = []
    source = FileSource(tuple(find_files(str(endless))), imgsz=64, stride=32, on_skip=said.append)
    assert [os.path.basename(f.path) for batch in source.batches() for f in batch] == ["good.png"]
    assert len(said) == 7
    assert all("not a file" in line for line in said)


def test_label_and_annotation_files_that_never_end_are_refused(endless, capsys):
    for name in ("good.txt", "a.xml", "a.json"):
        os.symlink("/dev/zero", endless / name)
    (problem,) = read_labels([str(endless / "good.png")], progress=False).problems
    assert problem.message == "label file cannot be read: not a file"
    assert "not a file" in str(read_voc(endless / "a.xml", one_based=False, difficult=False).problems[0])
    assert convert(["coco-to-yolo", str(endless / "a.json"), "--out", str(endless / "out")]) == 2
    assert "a.json: cannot be read (not a file)" in capsys.readouterr().err


def test_label_file_of_unusual_size_is_refused(tmp_path, monkeypatch):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((20, 20, 3), np.uint8))
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n" * 9)
    monkeypatch.setattr("data.labels.yolo.MAX_LABEL_BYTES", 100)
    (problem,) = read_labels([str(tmp_path / "a.png")], progress=False).problems
    assert problem.message.startswith("label file cannot be read: larger than")


def set_next(path, at_page, target):
    """Makes a directory of a little-endian TIFF point to another one, by number; returns the file's bytes."""
    data = bytearray(path.read_bytes())
    starts, (start,) = [], struct.unpack_from("<I", data, 4)
    while start:
        starts.append(start)
        (start,) = struct.unpack_from("<I", data, start + 2 + 12 * struct.unpack_from("<H", data, start)[0])
    end = starts[at_page] + 2 + 12 * struct.unpack_from("<H", data, starts[at_page])[0]
    data[end : end + 4] = struct.pack("<I", starts[target] if target is not None else 2**32 - 8)
    path.write_bytes(data)
    return np.frombuffer(bytes(data), np.uint8)


@pytest.mark.parametrize(("at_page", "target"), [(0, 0), (1, 0), (1, 1), (0, None)])
@pytest.mark.parametrize("samples", [1, 3, 4])
def test_only_the_first_page_is_read(tmp_path, samples, at_page, target, monkeypatch):
    pages = [np.full((20, 30, samples), value, np.uint8) for value in (7, 9)]
    data = set_next(write_tiff(tmp_path / "a.tif", pages), at_page, target)
    one = tiff.without_other_pages(data)
    assert len(list(tiff._directories(memoryview(one.tobytes()), "<"))) == 1
    image = read_image(tmp_path / "a.tif")
    assert image.shape == (20, 30, 3)
    assert (image == 7).all()
    monkeypatch.setattr(tiff, "_read_page", lambda *_: pytest.fail("decoded"))
    if target is not None:
        with pytest.raises(ImageError, match=r"\d channels, 7 are expected"):
            read_image(tmp_path / "a.tif", channels=7)


def test_tiff_of_five_samples_is_not_decoded_to_be_refused(tmp_path, monkeypatch):
    write_tiff(tmp_path / "a.tif", [np.zeros((20, 30, 5), np.uint8)] * 3)
    monkeypatch.setattr(tiff, "_read_page", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="5 channels, 3 are expected"):
        read_image(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="15 channels, 7 are expected"):
        read_image(tmp_path / "a.tif", channels=7)


def test_tiff_with_a_value_of_a_million_numbers_in_every_tag_is_bounded(tmp_path):
    entries = [struct.pack("<HHII", tag, 1, 2_000_000, 0) for tag in range(256, 290) for _ in range(1000)]
    head = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries))
    (tmp_path / "a.tif").write_bytes(head + b"".join(entries) + bytes(2_000_000))
    with pytest.raises(ImageError):
        read_image(tmp_path / "a.tif", channels=4)


def test_array_that_claims_more_than_its_file_holds_is_refused_before_memory_is_taken(tmp_path):
    for shape in ((10**6, 10**6, 3), (2**31, 2**31), (-5, 20), (10**30, 10**30)):
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
        (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(100))
        with pytest.raises(UserError, match=r"a\.npy: "):
            read_image(tmp_path / "a.npy")
