"""``python -m models.edit``: edits a model YAML, shows the result and writes it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from models.edit.graph_table import graph_table, spec_yaml, write_spec
from models.edit.rows import Edited, edit
from models.model import Model
from models.spec.parser import load_spec
from models.spec.registry import load_plugin
from utils.cli.parser import OneLineParser
from utils.cli.script import run_script
from utils.errors import UserError
from utils.sizes import MAX_SIDE_PX


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    args = _parser().parse_args(argv)

    def body() -> None:
        for path in args.plugins:
            load_plugin(path)
        spec = load_spec(args.cfg, nc=args.nc, scale=args.scale)
        _show_and_write(edit(spec, insert=args.insert, replace=args.replace, remove=args.remove, init=args.init), args)

    return run_script("models.edit", body)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="python -m models.edit", description="inserts, replaces and removes rows of a model YAML")
    parser.add_argument("cfg", help="model YAML, path or bare name")
    parser.add_argument("--insert", nargs="+", default=[], metavar="SPEC", help="FocalModulation@9, EMA@4,6, EMA@detect, 'EMA@9(factor=8)'")
    parser.add_argument("--replace", nargs="+", default=[], metavar="SPEC", help="C2f=C2f_EMA@6,8")
    parser.add_argument("--remove", nargs="+", default=[], metavar="ROW", help="rows whose readers then read what they read")
    parser.add_argument("--init", choices=["identity"], default="", help="start inserted modules as an exact no-op")
    parser.add_argument("--show", action="store_true", help="print the rows with shapes, parameters and readers")
    parser.add_argument("--imgsz", type=int, default=640, help="px, for the shapes")
    parser.add_argument("--out", metavar="FILE", help="write the YAML here")
    parser.add_argument("--nc", type=int, help="number of classes, the YAML's if not given")
    parser.add_argument("--scale", help="letter of a v8 file's scale, instead of the one in the name")
    parser.add_argument("--plugins", nargs="*", default=[], help="Python files with blocks of your own")
    return parser


def _show_and_write(edited: Edited, args: argparse.Namespace) -> None:
    if not 1 <= args.imgsz <= MAX_SIDE_PX:
        raise UserError(f"--imgsz {args.imgsz}: a side from 1 to {MAX_SIDE_PX} px is needed, such as 640")
    model = Model(edited.spec)  # fails, if it cannot be built, before anything is written
    if args.show:
        print(graph_table(model, imgsz=-(-args.imgsz // model.stride) * model.stride))
    for change in edited.changes:
        print(change)
    if args.out:
        write_spec(args.out, edited.spec, notes=edited.notes)
        print(f"written to {args.out}")
    elif not args.show:
        print(spec_yaml(edited.spec, notes=edited.notes), end="")


if __name__ == "__main__":
    sys.exit(main())
