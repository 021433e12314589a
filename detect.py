"""Detects objects: arguments -> DetectConfig -> engine.inference.detect.

Example:
    python detect.py --weights runs/train/exp/weights/best.pt --source photos/ --save-txt
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from utils.cli.detect_arguments import DetectConfig, parse_arguments
from utils.cli.script import run_script
from utils.process_exit import exit_process

if TYPE_CHECKING:
    from engine.inference.detect import Report

__all__ = ["DetectConfig", "detect", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    stopped = "stopped; what was saved so far is complete"
    return run_script("detect.py", lambda: detect(parse_arguments(argv)), interrupted=stopped)


def detect(config: DetectConfig) -> Report:
    """Finds objects in everything that ``config.source`` names; see :func:`engine.inference.detect.detect`."""
    from engine.inference.detect import detect

    return detect(config)


if __name__ == "__main__":
    exit_process(main())
