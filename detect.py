"""Detects objects: arguments -> DetectConfig -> engine.inference.detect.

Example:
    python detect.py --weights runs/train/exp/weights/best.pt --source photos/ --save-txt
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from utils.cli.detect_arguments import DetectConfig, parse_arguments
from utils.errors import UserError
from utils.process_exit import exit_process

if TYPE_CHECKING:
    from engine.inference.detect import Report

__all__ = ["DetectConfig", "detect", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    try:
        detect(parse_arguments(argv))
    except UserError as error:
        print(f"detect.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("detect.py: stopped; what was saved so far is complete", file=sys.stderr)
        return 130
    return 0


def detect(config: DetectConfig) -> Report:
    """Finds objects in everything that ``config.source`` names; see :func:`engine.inference.detect.detect`."""
    from engine.inference.detect import detect

    return detect(config)


if __name__ == "__main__":
    exit_process(main())
