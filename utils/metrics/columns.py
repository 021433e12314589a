"""The columns that detection metrics fill in results.csv, and which of them best.pt is chosen by; a plugin may add to both.

Example:
    >>> @register_column("metrics/AP75")
    ... def ap75(metrics):
    ...     return metrics.map_at(0.75)
    >>> choose_best_by({"metrics/AP75": 1.0})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from utils.errors import UserError, nearest

if TYPE_CHECKING:
    from utils.metrics.metrics import Metrics

ColumnValue: TypeAlias = "Callable[[Metrics], float]"

TITLES = {
    "metrics/precision": "P", "metrics/recall": "R", "metrics/accuracy_top1": "top-1", "metrics/accuracy_top5": "top-5",
}  # fmt: skip
METRIC_COLUMNS: dict[str, ColumnValue] = {}
FITNESS_WEIGHTS: dict[str, float] = {}


def column_title(name: str) -> str:
    """A column as tables and the console name it: ``P``, ``mAP@0.5:0.95`` for ``metrics/mAP_0.5:0.95``."""
    plain, kind = (name[:-3], name[-3:]) if name.endswith(("(B)", "(M)", "(P)")) else (name, "")
    return TITLES.get(plain, plain.removeprefix("metrics/").replace("mAP_", "mAP@")) + kind


def register_column(name: str) -> Callable[[ColumnValue], ColumnValue]:
    """Decorator that adds a column to results.csv, to the loggers and to the curves.

    Args:
        name: ``metrics/`` and a word.

    Raises:
        UserError: the name is taken, or does not begin with ``metrics/``.
    """
    if name in METRIC_COLUMNS or not name.startswith("metrics/"):
        reason = "is registered already" if name in METRIC_COLUMNS else "must begin with metrics/"
        raise UserError(f"metric column {name!r} {reason}")

    def enter(value: ColumnValue) -> ColumnValue:
        METRIC_COLUMNS[name] = value
        return value

    return enter


def choose_best_by(weights: Mapping[str, float]) -> None:
    """Makes the fitness, which best.pt is chosen by, the weighted sum of these columns, in place of the weights so far.

    Raises:
        UserError: a column is not registered.
    """
    for name in weights:
        if name not in METRIC_COLUMNS:
            hint = nearest(name, METRIC_COLUMNS) or f"known are {', '.join(METRIC_COLUMNS)}"
            raise UserError(f"metric column {name!r} is unknown; {hint}")
    FITNESS_WEIGHTS.clear()
    FITNESS_WEIGHTS.update(weights)


def fitness(columns: Mapping[str, Any]) -> Any:
    """What best.pt is chosen by: the weighted sum of columns, each a number or an array."""
    return sum(weight * columns[name] for name, weight in FITNESS_WEIGHTS.items())


register_column("metrics/precision")(lambda metrics: metrics.precision)
register_column("metrics/recall")(lambda metrics: metrics.recall)
register_column("metrics/mAP_0.5")(lambda metrics: metrics.map50)
register_column("metrics/mAP_0.5:0.95")(lambda metrics: metrics.map)
choose_best_by({"metrics/mAP_0.5": 0.1, "metrics/mAP_0.5:0.95": 0.9})  # as YOLOv5, v7 and v9 weigh them
