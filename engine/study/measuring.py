"""Measures the weights of a finished training that a study compares; runs as a process of its own after train.py.

    python -m engine.study.measuring RUN_FOLDER last DEVICE

As val.py does: the deployed network in float32 on the validation images, by COCO's rule. Beside ``study_metrics.json`` the detections and
objects of detection are kept as ``detections.npz``; the evaluation's own noise is estimated by resampling the images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.evaluation.evaluate import evaluate
from engine.evaluation.ground_truth import split_truth
from engine.evaluation.validate import choose_device, evaluation_options, load_weights, open_data
from engine.study.run_files import JOB_FILE, METRICS_FILE, read_json, write_json
from tasks.base import MetricResult
from utils.cli.script import run_script
from utils.cli.val_arguments import ValConfig
from utils.files import atomic_write
from utils.metrics.average_precision import CURVE_POINTS
from utils.metrics.metrics import MetricAccumulator, Metrics
from utils.metrics.resampling import image_noise

DETECTIONS_FILE = "detections.npz"
RECALLS = np.linspace(0, 1, 1001)
DIGITS = 6


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    folder, compare, device = argv if argv is not None else sys.argv[1:]
    return run_script("study measurement", lambda: measure(Path(folder), compare, device=device))


def measure(folder: Path, compare: str, *, device: str = "") -> None:
    """Writes ``study_metrics.json``, and ``detections.npz`` where boxes alone are compared.

    Args:
        compare: ``last`` or ``best``.
        device: as ``--device``.

    Raises:
        UserError: the weights or the data set cannot be used.
    """
    flags = read_json(folder / JOB_FILE)["flags"]
    weights = str(folder / "weights" / f"{compare}.pt")
    shared = {key: flags[key] for key in ("data", "workers", "single_cls", "min_items") if key in flags}
    config = ValConfig(weights=weights, imgsz=flags["imgsz"], plugins=tuple(flags.get("plugins", ())), device=device, **shared)
    target = choose_device(config)
    config, model = load_weights(config, target)
    spec, loader = open_data(config, model)
    annotations = split_truth(spec, config.task, task=model.task)
    metric = model.task.metric(spec.names, rule=config.ap_rule)
    options = evaluation_options(config, model, loader, device=target, annotations=annotations)
    metrics = evaluate(model, loader, options, metric=metric)
    print(metrics.table())
    noise = image_noise(metric) if isinstance(metric, MetricAccumulator) else {}
    if type(metric) is MetricAccumulator:  # others compare more than boxes, for which the file has no place
        with atomic_write(folder / DETECTIONS_FILE) as partial:
            state = metric.state()
            np.savez_compressed(
                partial, images=np.array([str(i) for i in state["images"]]), detections=state["detections"], truth=state["truth"]
            )  # fmt: skip
    rule = getattr(metrics, "rule", "")
    write_json(folder / METRICS_FILE, {"compare": compare, "rule": rule, "image_noise": noise, **measured_values(metrics)})


def measured_values(metrics: MetricResult) -> dict[str, Any]:
    """The metrics as ``RunRecord`` holds them; NaN of classes without objects. A task's own measure is what classes and curves are of."""
    own = getattr(metrics, "own", metrics)
    if isinstance(own, Metrics):
        return {**_measured_objects(own), "metrics": metrics.columns}
    per_class = {name: {"AP": float(value)} for name, value in zip(getattr(metrics, "names", ()), metrics.class_ap)}
    return {"metrics": metrics.columns, "per_class": per_class, "per_size": {}, "pr_curves": {}}


def _measured_objects(metrics: Metrics) -> dict[str, Any]:
    per_class, curves = {}, {}
    at_recall = metrics.curves.precision_at_recall
    present = np.flatnonzero(~np.isnan(at_recall).any(axis=1))  # not of a class whose objects all are ignored
    for c, name in enumerate(metrics.names):
        values = {
            "P": metrics.precision_per_class[c], "R": metrics.recall_per_class[c], "AP50": metrics.ap[c, 0], "AP75": metrics.ap[c, 5],
            "AP": metrics.ap[c].mean(),
        }  # fmt: skip
        per_class[name] = {**{key: float(value) for key, value in values.items()}, "objects": float(metrics.instances[c])}
        if c in present:
            curves[name] = _at_recalls(at_recall[c])
    if len(present):
        curves["all"] = _at_recalls(at_recall[present].mean(axis=0))
    sizes = dict(zip(("small", "medium", "large"), metrics.map_by_size))
    return {"per_class": per_class, "per_size": sizes, "pr_curves": curves}


def _at_recalls(precision: Any) -> list[float]:
    return [round(float(value), DIGITS) for value in np.interp(RECALLS, CURVE_POINTS, precision)]


if __name__ == "__main__":
    sys.exit(main())
