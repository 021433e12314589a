"""Validates weights: arguments -> ValConfig -> engine.evaluation.validate -> evaluate(model, loader) -> metrics.

Example:
    python val.py --weights runs/train/exp/weights/best.pt --data mydata.yaml --imgsz 640 --save-json
    python val.py                        # the newest run's best.pt on the data set that it was trained on
    python val.py --weights best.onnx --data mydata.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from utils.cli.script import run_script
from utils.cli.val_arguments import ValConfig, parse_arguments

if TYPE_CHECKING:
    from tasks.base import MetricResult

__all__ = ["ValConfig", "main", "validate"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""

    def body() -> None:
        config = parse_arguments(argv)
        from engine.evaluation.validate import run_validation

        run_validation(config)

    return run_script("val.py", body)


def validate(config: ValConfig) -> MetricResult:
    """Validates the weights on a split; see :func:`engine.evaluation.validate.validate`."""
    from engine.evaluation.validate import validate

    return validate(config)


if __name__ == "__main__":
    sys.exit(main())
