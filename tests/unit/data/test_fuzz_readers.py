"""Damaged and random files of every kind that data are read from: each is read or refused in one line, within bounds.

The number of tries is fixed, and so are the seeds: what fails here fails again.
"""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
import warnings
from functools import partial

import cv2
import numpy as np
import pytest
from PIL import Image

from data.images.reading import ImageError, decode_image, probe_image
from data.labels.coco import read_coco_labels
from data.labels.files import label_path, list_images
from data.labels.voc import read_voc
from data.labels.yolo import read_image_labels, read_labels
from data.tools.convert import coco_to_yolo, voc_to_yolo
from tests.bands import write_tiff
from utils.errors import UserError

TRIES = 60
SIDE = 16
PEAK_BYTES = 2**28  # far above what these files need, far below what their headers may claim

NUMBERS = ["0", "1", "-1", "0.5", "1.0005", "2", "1e-9", "1e400", "nan", "inf", "0x10", "1_0", "١", "", "a", "9" * 400, "1e", "--1", "true"]
TEXTS = [
    "", "\0", "\n", "\r", "\ud800", "\x1b[31m", "a" * 5000, "../../x", "/",
    "\\", "C:\\x", ".", "..", "é", "％ｄ", "{}", "%s", "images/", "\u2028",
]  # fmt: skip
VALUES = [
    None, True, 0, -1, 2**63, 10**400, 0.5, -1e308, float("inf"), float("nan"), "", "1", "x" * 999, [], [[]], {}, [None] * 4, {"id": 1},
]  # fmt: skip


def rng(seed):
    return np.random.default_rng((20262, seed))


def pick(r, choices):
    return choices[int(r.integers(len(choices)))]


def damaged(data, r):
    """Bytes with some of them changed, cut out, repeated, or the end missing."""
    out = bytearray(data)
    for _ in range(int(r.integers(1, 6))):
        at, kind = int(r.integers(len(out) + 1)), int(r.integers(5))
        if kind == 0 and out:
            out[at % len(out)] = int(r.integers(256))
        elif kind == 1:
            del out[at : at + int(r.integers(1, 20))]
        elif kind == 2:
            out[at:at] = out[at : at + int(r.integers(1, 40))]
        elif kind == 3 and len(out) > 8:
            place = at % (len(out) - 4)
            out[place : place + 4] = struct.pack(pick(r, ["<I", ">I"]), pick(r, [0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1]))
        elif r.random() < 0.3:
            del out[at:]
    return bytes(out)


def check_lines(problems, folder):
    """Each is one printable line about a file."""
    for problem in problems:
        assert str(folder) in problem.path
        assert len(problem.message.splitlines()) == 1, problem
        assert len(problem.message) < 10_000


def in_one_line(read, kind):
    """What a reader returns; None where it refuses, which it does in one line."""
    try:
        return read()
    except kind as error:
        message = str(error)
    assert len(message.splitlines()) == 1, message
    return None


@pytest.fixture(autouse=True)
def bounded():
    """No try takes much memory of Python or numpy."""
    warnings.simplefilter("ignore")
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < PEAK_BYTES


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    cv2.imwrite(str(inside / "a.png"), np.zeros((SIDE, SIDE, 3), np.uint8))
    return inside


@pytest.mark.parametrize("kpt_shape", [None, "[2, 3]"])
def test_label_files(folder, kpt_shape):
    from data.labels.pose import row_parser
    from tasks import DETECT

    parse_row = row_parser(DETECT, (2, 3) if kpt_shape else None) or DETECT.parse_row
    for seed in range(TRIES):
        r = rng(seed)
        rows = [" ".join(pick(r, NUMBERS) for _ in range(int(r.integers(1, 14)))) for _ in range(4)]
        data = damaged("\n".join([*rows, "0 0.5 0.5 0.25 0.25"]).encode(errors="surrogatepass"), r)
        (folder / "a.txt").write_bytes(data)
        found = read_image_labels(str(folder / "a.png"), parse_row=parse_row)
        check_lines(found.problems, folder)
        assert np.isfinite(found.boxes_cxcywh).all()
        assert ((found.boxes_cxcywh >= 0) & (found.boxes_cxcywh <= 1)).all()
        assert (found.classes >= 0).all()


def test_lists(folder):
    for seed in range(TRIES):
        r = rng(seed)
        entries = ["a.png", "./a.png", "data/a.png", *(pick(r, TEXTS) + pick(r, ["a.png", "", "/a.png"]) for _ in range(4))]
        encoding = pick(r, ["utf-8", "utf-16", "utf-32", "utf-16-le", "latin-1"])
        (folder / "a.txt").write_bytes(damaged("\n".join(entries).encode(encoding, errors="replace"), r))
        files = in_one_line(lambda: list_images([folder / "a.txt"]), UserError) or []
        assert all(os.path.isabs(f) and label_path(f) for f in files)
        check_lines(read_labels(files, progress=False).problems, "")


def coco_entry(r, entry):
    """An entry of a JSON with a value replaced, left out or added."""
    entry = dict(entry)
    key = pick(r, sorted(entry))
    if r.random() < 0.2:
        del entry[key]
    else:
        entry[key] = pick(r, [*VALUES, *TEXTS])
    return entry


def random_coco(r):
    content = {
        "images": [{"id": i, "file_name": n, "width": SIDE, "height": SIDE} for i, n in ((1, "a.png"), (2, "b.png"))],
        "annotations": [{"id": i, "image_id": 1 + i % 2, "category_id": 1, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0,
                         "segmentation": [[1, 2, 4, 2, 4, 6, 1, 6]]} for i in range(4)],
        "categories": [{"id": 1, "name": "thing"}],
    }  # fmt: skip
    for _ in range(int(r.integers(1, 4))):
        part = pick(r, ["images", "annotations", "annotations", "annotations", "categories"])
        if isinstance(content.get(part), list) and content[part] and r.random() < 0.9:
            at = int(r.integers(len(content[part])))
            old = content[part][at]
            content[part][at] = coco_entry(r, old) if isinstance(old, dict) and old and r.random() < 0.9 else pick(r, VALUES)
        else:
            content[part] = pick(r, VALUES)
    return json.dumps(content).encode(errors="surrogatepass")


def test_coco_files(folder):
    for seed in range(TRIES * 2):
        r = rng(seed)
        data = random_coco(r)
        path = folder / "a.json"
        path.write_bytes(damaged(data, r) if r.random() < 0.2 else data)
        table = in_one_line(partial(read_coco_labels, path, [str(folder / "a.png")], ["thing"], progress=False), UserError)
        check_lines(table.problems if table else (), "")
        convert = partial(coco_to_yolo, [path], folder / f"out{seed}", images=[folder], segments=True)
        check_lines(in_one_line(convert, UserError) or (), "")
    assert not [p for p in folder.parent.iterdir() if p != folder]


def test_deep_json(folder):
    for data in (b"[" * 100_000, b'{"images":' * 50_000, b'{"images": ' + b"9" * 10_000 + b"}"):
        (folder / "a.json").write_bytes(data)
        with pytest.raises(UserError, match=r"a\.json: not "):
            coco_to_yolo([folder / "a.json"], folder / "out")


VOC = """<annotation><filename>{}</filename><size><width>{}</width><height>{}</height></size><object><name>{}</name>
<difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object></annotation>"""


def test_voc_files(folder):
    (folder / "xml").mkdir()
    good = ["a.png", "16", "16", "thing", "0", "1", "2", "9", "9"]
    for seed in range(TRIES * 2):
        r = rng(seed)
        values = [pick(r, [*NUMBERS, *TEXTS]) if r.random() < 0.2 else v for v in good]
        data = VOC.format(*values).encode(pick(r, ["utf-8", "utf-16"]), errors="replace")
        path = folder / "xml/a.xml"
        path.write_bytes(damaged(data, r) if r.random() < 0.5 else data)
        found = read_voc(path, one_based=bool(seed % 2), difficult=True)
        check_lines(found.problems, folder)
        assert np.isfinite(found.boxes_xyxy).all()
        convert = partial(voc_to_yolo, folder / "xml", folder / f"out{seed}", images=folder)
        check_lines(in_one_line(convert, UserError) or (), "")
    (folder / "xml/a.xml").write_bytes(b"<a>" * 200_000)
    check_lines(read_voc(folder / "xml/a.xml", one_based=False, difficult=False).problems, folder)


def image_files(folder):
    """Small images of every format that is at hand."""
    colour = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "bmp", "gif", "webp", "tif", "ppm", "jp2", "mpo", "avif"):
        try:
            Image.fromarray(colour).save(folder / f"x.{suffix}")
        except (KeyError, ValueError, OSError):
            continue  # this Pillow cannot write it
    Image.fromarray(colour).save(folder / "exif.jpg", exif=Image.Exif().tobytes() or b"")
    np.save(folder / "x.npy", colour)
    write_tiff(folder / "many.tif", [colour[:, :, :1].astype(np.uint16)] * 5)
    return sorted(p for p in folder.iterdir() if p.stem in ("x", "exif", "many"))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_images(folder, channels, capfd):
    for k, path in enumerate(image_files(folder)):
        data = path.read_bytes()
        for seed in range(TRIES // 4):
            r = rng((k, seed))
            head = int(r.integers(1, 200)) if r.random() < 0.7 else len(data)  # headers decide most
            broken = damaged(data[:head], r) + data[head:]
            path.write_bytes(broken)
            hw = in_one_line(partial(probe_image, path, channels=channels), ImageError)
            assert hw is None or min(hw) >= 10
            decode = partial(decode_image, np.frombuffer(broken, np.uint8), path, channels=channels, dtype=None)
            image = in_one_line(decode, ImageError)
            assert image is None or image.shape[2] == channels
