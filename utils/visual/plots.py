"""The images of a run: curves, confusion matrix, labels, batches, results. Matplotlib is used without its global state."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.boxes import cxcywh_to_xyxy
from utils.errors import UserError
from utils.metrics.metrics import Metrics
from utils.metrics.top_k import ClassificationMetrics
from utils.visual.draw import colour_of, draw_boxes, draw_text, text_width, viewable

MAX_IMAGES = 16
TILE_PX = (320, 640)  # the longer side of a tile is brought into this range
MOSAIC_PX = 1920
BORDER_16_BITS = 114 * 257  # what images are padded with; it says nothing about their range
LONGEST_NAME = 40  # characters of a class's name in a figure
LEGEND_CLASSES = 20  # more would not be legible
WORST_CLASSES = 60  # that a figure of accuracies shows
MOST_BARS_NAMED = 50


def plot_batch(
    images: Tensor,
    path: str | Path,
    *,
    draw: Callable[[NDArray[np.uint8], int, float], NDArray[np.uint8]],
    paths: Sequence[str] = (),
    max_images: int = MAX_IMAGES,
) -> None:
    """The images of a batch side by side, with what belongs to them, as one image file.

    Args:
        images: (B, C, H, W) uint8 or uint16; the first three channels are shown, or the first in grey.
        path: File to write.
        draw: Takes a resized image (h, w, 3) RGB, its number in the batch and the factor it was resized by; gives what is shown.
        paths: Of the images; their names are written on the tiles.
        max_images: The most that are shown.
    """
    images = images[:max_images]
    count, _, h, w = images.shape
    per_row = math.ceil(math.sqrt(count)) if count else 1
    wanted = min(max(max(h, w), TILE_PX[0]), TILE_PX[1], MOSAIC_PX // per_row)
    scale = wanted / max(h, w)
    tile_h, tile_w = round(h * scale), round(w * scale)
    mosaic = np.full((math.ceil(count / per_row) * tile_h, per_row * tile_w, 3), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        smoothing = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        tile = draw(np.asarray(cv2.resize(as_rgb(image), (tile_w, tile_h), interpolation=smoothing), dtype=np.uint8), i, scale)
        if i < len(paths):
            _caption(tile, Path(paths[i]).name)
        cv2.rectangle(tile, (0, 0), (tile_w - 1, tile_h - 1), (255, 255, 255), 1)
        y, x = i // per_row * tile_h, i % per_row * tile_w
        mosaic[y : y + tile_h, x : x + tile_w] = tile
    write_image(path, mosaic)


def plot_curves(metrics: Metrics, folder: str | Path, *, prefix: str = "") -> None:
    """``PR_curve.png``, ``P_curve.png``, ``R_curve.png`` and ``F1_curve.png``, a line for each class and one for their mean.

    Args:
        metrics: What was measured.
        folder: Where they go.
        prefix: Of the file names: ``Mask`` gives ``MaskPR_curve.png``.
    """
    curves, folder = metrics.curves, Path(folder)
    at_recall = curves.precision_at_recall
    _plot_lines(folder / f"{prefix}PR_curve.png", curves.recall_axis, at_recall, metrics, "Recall", "Precision", values=metrics.ap[:, 0])
    for name, lines, title in (("P", curves.precision, "Precision"), ("R", curves.recall, "Recall"), ("F1", curves.f1, "F1")):
        _plot_lines(folder / f"{prefix}{name}_curve.png", curves.confidence, lines, metrics, "Confidence", title)


def plot_confusion(confusion: NDArray, names: Sequence[str], path: str | Path) -> None:
    """The confusion matrix (nc, nc), or (nc + 1, nc + 1) with background last: colours and fractions by what was there (columns), with
    counts where they can be read."""
    total = confusion.sum(axis=0, keepdims=True)
    shares = confusion / np.maximum(total, 1)
    n = len(confusion)
    labels = [*map(shown_name, names), "background"][:n]
    side = min(max(5.0, 2.5 + 0.55 * n), 14.0)
    figure = _figure(side * 1.15, side)
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, fraction=0.045, pad=0.02, label="share of the true class")
    if n <= 31:
        for row, column in np.argwhere(confusion > 0):
            share = shares[row, column]
            text = f"{share:.2f}\n{confusion[row, column]}" if n <= 15 else f"{share:.2f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=8 if n <= 15 else 6, color="white" if share > 0.5 else "black")
    size = 10 if n <= 31 else max(4, 400 // n)
    axes.set_xticks(range(n), labels, rotation=90 if n > 6 else 30, fontsize=size, ha="center" if n > 6 else "right")
    axes.set_yticks(range(n), labels, fontsize=size)
    axes.set_xlabel("True")
    axes.set_ylabel("Predicted")
    axes.set_title("Confusion matrix")
    _save(figure, path)


def plot_class_accuracy(metrics: ClassificationMetrics, path: str | Path) -> None:
    """A bar for each class, worst at the top, as long as its top-1 accuracy, with its number of images; of many classes the worst."""
    accuracy = metrics.by_class[:, 0]
    order = np.argsort(accuracy, kind="stable")[: np.count_nonzero(metrics.images)]  # NaN, a class without images, comes last
    shown = order[:WORST_CLASSES][::-1]
    figure = _figure(8, max(2.5, 1.2 + 0.32 * len(shown)))
    axes = figure.add_subplot()
    axes.barh(range(len(shown)), accuracy[shown], color=[_unit(colour_of(int(c))) for c in shown])
    for place, c in enumerate(shown):
        axes.text(1.02, place, f"{accuracy[c]:.3f} of {metrics.images[c]}", va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [shown_name(metrics.names[c]) for c in shown], fontsize=9)
    axes.axvline(metrics.top1, color="0.3", linewidth=1, linestyle="--")
    part = f"the {len(shown)} worst of {len(order)} classes" if len(shown) < len(order) else "by class"
    axes.set(xlabel="top-1 accuracy", xlim=(0, 1.18), title=f"Top-1 {metrics.top1:.3f} (dashed), {part}")
    axes.set_xticks(np.arange(0, 1.01, 0.2))
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_class_counts(labels: Iterable[NDArray], names: Sequence[str], path: str | Path) -> None:
    """How many images each class has, a bar for each; ``labels`` as for :func:`plot_labels`, of which only the classes count."""
    classes = np.concatenate([np.zeros((0, 5)), *labels])[:, 0].astype(int)
    counts = np.bincount(classes, minlength=len(names))
    figure = _figure(min(max(6.0, 0.35 * len(names)), 20.0), 5)
    axes = figure.add_subplot()
    bars = axes.bar(range(len(counts)), counts, color=[_unit(colour_of(i)) for i in range(len(counts))])
    if len(names) <= MOST_BARS_NAMED:
        many = len(names) > 3
        axes.set_xticks(range(len(names)), [*map(shown_name, names)], rotation=45 if many else 0, ha="right" if many else "center")
        axes.bar_label(bars, fontsize=8)
    axes.set(title=f"{int(counts.sum())} images of {len(names)} classes", ylabel="images")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path, dpi=120)


def plot_labels(labels: Iterable[NDArray], names: Sequence[str], path: str | Path) -> None:
    """What is labelled: objects per class, boxes on top of one another, where centres lie, how large boxes are.

    Args:
        labels: Per image (n, 5) [class, cx, cy, w, h], normalised.
        names: Of the classes.
        path: File to write.
    """
    rows = np.concatenate([np.zeros((0, 5)), *labels])
    classes, boxes = rows[:, 0].astype(int), rows[:, 1:]
    figure = _figure(10, 10)
    counts, outlines, centres, sizes = figure.subplots(2, 2).flat
    number = np.bincount(classes, minlength=len(names))
    bars = counts.bar(range(len(number)), number, color=[_unit(colour_of(i)) for i in range(len(number))])
    if len(names) <= 30:
        many = len(names) > 3
        counts.set_xticks(range(len(names)), [*map(shown_name, names)], rotation=45 if many else 0, ha="right" if many else "center")
        counts.bar_label(bars, fontsize=8)
    counts.set_title(f"{len(rows)} objects")
    canvas = np.full((800, 800, 3), 255, dtype=np.uint8)
    shown = np.random.default_rng(0).permutation(len(rows))[:1000]
    centred = torch.from_numpy(np.concatenate((np.full((len(shown), 2), 0.5), boxes[shown, 2:]), axis=1))
    draw_boxes(canvas, cxcywh_to_xyxy(centred * 800).numpy(), [""] * len(shown), classes[shown].tolist(), line_thickness=1)
    outlines.imshow(canvas)
    outlines.axis("off")
    outlines.set_title("shapes" if len(shown) == len(rows) else f"shapes of {len(shown)}")
    for axes, x, y, title, axis_names in (
        (centres, boxes[:, 0], boxes[:, 1], "centres", ("x", "y")),
        (sizes, boxes[:, 2], boxes[:, 3], "sizes", ("width", "height")),
    ):
        axes.hist2d(x, y, bins=50, range=((0, 1), (0, 1)), cmap="Blues")
        axes.set(xlabel=axis_names[0], ylabel=axis_names[1], title=title)
    centres.invert_yaxis()
    _save(figure, path, dpi=120)


def plot_results(results_csv: str | Path, path: str | Path) -> None:
    """Every loss and metric of ``results.csv`` over the epochs, with a smoothed line.

    Raises:
        UserError: The file has no rows.
    """
    with open(results_csv, newline="", encoding="utf-8") as file:
        rows = [{(k or "").strip(): v for k, v in row.items()} for row in csv.DictReader(file)]
    if not rows:
        raise UserError(f"{results_csv}: no rows to plot")
    values = {key: np.array([_number(row[key]) for row in rows]) for key in rows[0]}
    epochs = values.get("epoch", np.arange(len(rows), dtype=float))
    metrics = [k for k in values if k.startswith("metrics/")]
    groups = [[k for k in values if k.startswith("train/")] + metrics[:2], [k for k in values if k.startswith("val/")] + metrics[2:]]
    columns = max(len(g) for g in groups) or 1
    figure = _figure(2.6 * columns, 5.4)
    grid = figure.subplots(2, columns, squeeze=False)
    for axes_row, keys in zip(grid, groups):
        for axes, key in zip(axes_row, keys):
            known = ~np.isnan(values[key])
            axes.plot(epochs[known], values[key][known], ".-", color="#1f77b4", linewidth=1, markersize=4)
            if known.sum() > 5:
                axes.plot(epochs[known], _running_mean(values[key][known]), color="#ff7f0e", linewidth=2, alpha=0.8)
            axes.set_title(shown_name(key), fontsize=10)
            axes.grid(alpha=0.3)
        for axes in axes_row[len(keys) :]:
            axes.axis("off")
    for axes in grid[-1]:
        axes.set_xlabel("epoch")
    _save(figure, path)


def plot_trade_off(curves: Mapping[str, Sequence[tuple[float, float, str]]], path: str | Path, *, x: str, y: str) -> None:
    """One line a name through its points (x, y, what to write beside it)."""
    figure = _figure(8, 6)
    axes = figure.add_subplot()
    for i, points in enumerate(curves.values()):
        xs, ys, texts = zip(*points)
        axes.plot(xs, ys, marker="o", linewidth=1.5, color=_unit(colour_of(i)), label=str(i))
        for at_x, at_y, text in zip(xs, ys, texts):
            axes.annotate(shown_name(text), (at_x, at_y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    _name_lines(axes.legend(frameon=False, fontsize=9), list(curves))
    _save(figure, path)


def plot_evolution(rows: Sequence[Mapping[str, float]], keys: Sequence[str], path: str | Path) -> None:
    """Fitness over every hyper-parameter, a point a generation, later ones darker, the best one marked."""
    fitnesses = np.array([row["fitness"] for row in rows])
    best, columns = int(fitnesses.argmax()), 6
    figure = _figure(2.4 * columns, 2.1 * -(-len(keys) // columns))
    for axes, key in zip(figure.subplots(-(-len(keys) // columns), columns).flat, keys):
        values = np.array([row[key] for row in rows])
        axes.scatter(values, fitnesses, c=np.arange(len(rows)), cmap="Blues", vmin=-len(rows) / 2, s=12)
        axes.plot(values[best], fitnesses[best], "+", color="#d62728", markersize=12)
        axes.set_title(f"{key} = {values[best]:.4g}", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    _save(figure, path, dpi=100)


def as_rgb(image: Tensor) -> NDArray[np.uint8]:
    """One image (C, H, W) of a batch as (H, W, 3) uint8, ready to draw on."""
    array = image.cpu().numpy()
    if array.dtype not in (np.uint8, np.uint16):
        array = (array * 255).round().clip(0, 255).astype(np.uint8)
    return viewable(array.transpose(1, 2, 0), ignored=BORDER_16_BITS)


def write_image(path: str | Path, image_rgb: NDArray[np.uint8]) -> None:
    """Writes an RGB image (H, W, 3); any path that the system takes, in the format of its ending."""
    _, encoded = cv2.imencode(Path(path).suffix, cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR))
    Path(path).write_bytes(encoded.tobytes())


def _caption(tile: NDArray[np.uint8], text: str, *, height: int = 9) -> None:
    text = text if len(text) <= 40 else f"{text[:18]}...{text[-19:]}"
    bottom = tile.shape[0]
    strip = tile[bottom - height - 8 :, : text_width(text, height) + 8]
    strip[:] = strip // 3  # darkened, so that white text is legible on anything
    draw_text(tile, text, (4, bottom - 5), height=height, colour=(255, 255, 255))


def _plot_lines(
    path: Path, x: NDArray, lines: NDArray, metrics: Metrics, x_name: str, y_name: str, *, values: NDArray | None = None
) -> None:
    present = np.flatnonzero(~np.isnan(lines).any(axis=1))
    figure = _figure(9, 6)
    axes = figure.add_subplot()
    named = len(present) <= LEGEND_CLASSES
    texts: list[str] = []
    for c in present:
        texts += [metrics.names[c] + ("" if values is None else f" {values[c]:.3f}")] if named else []
        axes.plot(x, lines[c], linewidth=1.2, color=_unit(colour_of(int(c))) if named else "0.8", label=str(c) if named else None)
    if len(present):
        mean = lines[present].mean(axis=0)
        best = int(mean.argmax())
        summary = f"{mean[best]:.2f} at {x[best]:.3f}" if values is None else f"{metrics.map50:.3f} mAP@0.5"
        axes.plot(x, mean, linewidth=3, color="#1a1a8c", label="all")
        legend = axes.legend(bbox_to_anchor=(1.02, 1), loc="upper left", frameon=False, fontsize=9)
        _name_lines(legend, [*texts, f"all classes {summary}"])
    title = f"{y_name} over {x_name.lower()} (rule: {metrics.rule}, IoU 0.5)"
    axes.set(xlabel=x_name, ylabel=y_name, xlim=(0, 1), ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    _save(figure, path)


def shown_name(name: str, *, most: int = LONGEST_NAME) -> str:
    """A name from a file as matplotlib shows it: a dollar sign begins no formula, nothing breaks the line or the font, and the start
    and the end of a very long one."""
    name = name if len(name) <= most else f"{name[: most // 2]}…{name[-most // 2 + 1 :]}"
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name).replace("$", r"\$")


def _name_lines(legend: Any, names: Sequence[str]) -> None:
    """Writes names into a legend; as labels of lines those that begin with an underscore would be left out."""
    for text, name in zip(legend.get_texts(), names):
        text.set_text(shown_name(name))


def _figure(width: float, height: float) -> Any:
    """A figure of its own, without pyplot's register of figures and without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="tight")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | Path, *, dpi: int = 150) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a line for each character of a name; the figure shows boxes
        figure.savefig(str(path), dpi=dpi)


def _running_mean(values: NDArray, *, sigma: float = 3.0) -> NDArray:
    """A Gaussian mean that does not bend towards zero at the ends."""
    reach = np.arange(len(values))
    weights = np.exp(-(((reach[:, None] - reach) / sigma) ** 2) / 2)
    return weights @ values / weights.sum(axis=1)


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _unit(colour: tuple[int, int, int]) -> tuple[float, ...]:
    return tuple(channel / 255 for channel in colour)
