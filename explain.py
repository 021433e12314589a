"""Shows what a network looks at: arguments -> ExplainConfig -> engine.explain.run.

Example:
    python explain.py --weights best.pt --source images/                        # maps of all detections, and every attention module
    python explain.py --weights best.pt --source a.jpg --target 0 --method gradcam++ eigencam --rows 4 6 -1
    python explain.py --weights best.pt --compare other.pt --source a.jpg        # the same object, two networks
    python explain.py --weights best.pt --errors --data mydata.yaml              # what it does wrong, and what each kind of error costs
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from utils.cli.explain_arguments import ExplainConfig, parse_arguments
from utils.cli.script import run_script

if TYPE_CHECKING:
    from engine.explain.run import Report

__all__ = ["ExplainConfig", "explain", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    return run_script("explain.py", lambda: explain(parse_arguments(argv)), interrupted="stopped; figures so far are complete")


def explain(config: ExplainConfig) -> Report:
    """Explains everything that ``config.source`` names; see :func:`engine.explain.run.explain_source`."""
    from engine.explain.run import explain_source

    return explain_source(config)


if __name__ == "__main__":
    sys.exit(main())
