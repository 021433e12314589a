"""The command line that converts annotations: COCO JSON, VOC XML and DOTA text to YOLO label files, and these to COCO JSON.

Example:
    python -m data.convert coco-to-yolo annotations/instances_train2017.json --images train2017 --out converted
    python -m data.convert yolo-to-coco mine.yaml --split val --out instances_val.json
    python -m data.convert voc-to-yolo VOC2012/Annotations --images VOC2012/JPEGImages --out converted
    python -m data.convert dota-to-yolo DOTA/train/labelTxt --images DOTA/train/images --out converted

What is invalid is left out and named, one line each; files that exist are not written over without --exist-ok.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.tools.coco_to_yolo import coco_to_yolo
from data.tools.dota_to_yolo import dota_to_yolo
from data.tools.voc_to_yolo import voc_to_yolo
from data.tools.yolo_to_coco import yolo_to_coco
from utils.cli.parser import OneLineParser
from utils.cli.script import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 0: converted, 1: converted without what was named, 2: not converted."""
    arguments = _parser().parse_args(argv)

    def body() -> int:
        problems = arguments.run(arguments)
        for problem in problems:
            print(problem.line(), file=sys.stderr)
        return 1 if problems else 0

    return run_command("data.convert", body, failed=2)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m data.convert", description="Converts annotations; what is invalid is named.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    folder = "folder to write: labels/, images/ and data.yaml, which train.py takes as --data"
    for add_command in (_add_coco_to_yolo, _add_yolo_to_coco, _add_voc_to_yolo, _add_dota_to_yolo):
        command = add_command(commands)
        written = "JSON file to write" if add_command is _add_yolo_to_coco else folder
        command.add_argument("--out", type=Path, required=True, help=written)
        command.add_argument("--exist-ok", action="store_true", help="write over files that exist")
    return parser


def _add_coco_to_yolo(commands: Any) -> argparse.ArgumentParser:
    coco: argparse.ArgumentParser = commands.add_parser("coco-to-yolo", help="COCO instances JSON to YOLO label files")
    coco.add_argument("jsons", nargs="+", type=Path, metavar="JSON", help="instances files, a split each")
    coco.add_argument("--images", nargs="+", type=Path, default=[], metavar="DIR", help="folder of the images of each, linked or copied")
    coco.add_argument("--segments", action="store_true", help="write polygons; pieces of an object are joined")
    coco.set_defaults(run=lambda a: coco_to_yolo(a.jsons, a.out, images=a.images, segments=a.segments, exist_ok=a.exist_ok))
    return coco


def _add_yolo_to_coco(commands: Any) -> argparse.ArgumentParser:
    yolo: argparse.ArgumentParser = commands.add_parser("yolo-to-coco", help="a YOLO data set's split to a COCO instances JSON")
    yolo.add_argument("data", metavar="DATA.yaml", help="dataset file, or its name under data/")
    yolo.add_argument("--split", default="val", choices=("train", "val", "test"), help="which one to convert (default: val)")
    yolo.set_defaults(run=lambda a: yolo_to_coco(a.data, a.out, split=a.split, exist_ok=a.exist_ok))
    return yolo


def _add_voc_to_yolo(commands: Any) -> argparse.ArgumentParser:
    voc: argparse.ArgumentParser = commands.add_parser("voc-to-yolo", help="a folder of VOC XML files to YOLO label files")
    voc.add_argument("annotations", type=Path, metavar="XML-DIR", help="folder of XML files")
    voc.add_argument("--images", type=Path, metavar="DIR", help="folder of the images, linked or copied")
    voc.add_argument("--names", nargs="+", default=[], help="classes in order (default: all that occur, sorted)")
    voc.add_argument("--split", default="train", help="name of the folders written (default: train)")
    voc.add_argument("--one-based", action="store_true", help="px count from 1 and the last is included: the original VOC archives")
    voc.add_argument("--difficult", action="store_true", help="keep objects marked as difficult")
    voc.set_defaults(
        run=lambda a: voc_to_yolo(
            a.annotations, a.out, images=a.images, names=a.names, split=a.split, one_based=a.one_based, difficult=a.difficult,
            exist_ok=a.exist_ok,
        )
    )  # fmt: skip
    return voc


def _add_dota_to_yolo(commands: Any) -> argparse.ArgumentParser:
    dota: argparse.ArgumentParser = commands.add_parser("dota-to-yolo", help="a folder of DOTA's text files to YOLO label files of corners")
    dota.add_argument("annotations", type=Path, metavar="TXT-DIR", help="folder of text files (labelTxt)")
    dota.add_argument("--images", type=Path, metavar="DIR", required=True, help="folder of the images, linked or copied")
    dota.add_argument("--names", nargs="+", default=[], help="classes in order (default: all that occur, sorted)")
    dota.add_argument("--split", default="train", help="name of the folders written (default: train)")
    dota.add_argument("--difficult", action="store_true", help="keep objects marked as difficult")
    dota.set_defaults(
        run=lambda a: dota_to_yolo(
            a.annotations, a.out, images=a.images, names=a.names, split=a.split, difficult=a.difficult, exist_ok=a.exist_ok
        )
    )  # fmt: skip
    return dota
