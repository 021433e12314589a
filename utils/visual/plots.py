"""The images of a run: curves, confusion matrix, labels, batches, results; figures are as wide as a paper's column or page."""

from __future__ import annotations

import csv
import math
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
from utils.visual.draw import draw_boxes, draw_text, text_width, viewable
from utils.visual.figures import COLOURS, COLUMN, PAGE, Style, add_legend, drawing, name_legend
from utils.visual.names import short_name, shown_name

MAX_IMAGES = 16
TILE_PX = (320, 640)  # the longer side of a tile is brought into this range
MOSAIC_PX = 1920
BORDER_16_BITS = 114 * 257  # what images are padded with; it says nothing about their range
LEGEND_CLASSES = 20  # more would not be legible
WORST_CLASSES = 60  # that a figure of accuracies shows
MOST_BARS_NAMED = 50
LEGEND_COLUMNS = 22  # of a name in a legend of two columns
CELL_CLASSES = 31  # of a confusion matrix with numbers in its cells
SPIKE = 4.0  # how many times further out than the bulk of a curve a value is left outside its panel


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
    side = min(max(COLUMN, 1.2 + 0.36 * n), PAGE)
    size = 8.0 if n <= 12 else max(2.5, 72 * 0.62 * side / n)
    with drawing(path, side, 0.92 * side, texts=names) as figure:
        axes = figure.add_subplot()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        figure.colorbar(image, ax=axes, fraction=0.045, pad=0.02, label="share of the true class")
        if n <= CELL_CLASSES:
            _cell_numbers(axes, confusion, shares, size=min(size, 7.0) if n > 7 else 7.0)
        labels = [*(shown_name(name, most=18) for name in names), "background"][:n]
        axes.set_xticks(range(n), labels, rotation=90 if n > 6 else 30, fontsize=min(size, 7), ha="center" if n > 6 else "right",
                        rotation_mode="default" if n > 6 else "anchor")  # fmt: skip
        axes.set_yticks(range(n), labels, fontsize=min(size, 7))
        axes.set(xlabel="True", ylabel="Predicted")


def plot_class_accuracy(metrics: ClassificationMetrics, path: str | Path) -> None:
    """A bar for each class, worst at the top, as long as its top-1 accuracy, with its number of images; of many classes the worst."""
    accuracy = metrics.by_class[:, 0]
    order = np.argsort(accuracy, kind="stable")[: np.count_nonzero(metrics.images)]  # NaN, a class without images, comes last
    shown = order[:WORST_CLASSES][::-1]
    part = f"the {len(shown)} worst of {len(order)} classes" if len(shown) < len(order) else "by class"
    with drawing(path, PAGE, max(1.6, 0.8 + 0.2 * len(shown)), texts=metrics.names) as figure:
        axes = figure.add_subplot()
        axes.barh(range(len(shown)), accuracy[shown], color=COLOURS[2])
        for place, c in enumerate(shown):
            axes.text(1.02, place, f"{accuracy[c]:.3f} of {metrics.images[c]}", va="center", fontsize=7)
        axes.set_yticks(range(len(shown)), [shown_name(metrics.names[c]) for c in shown])
        axes.axvline(metrics.top1, color="0.3", linewidth=1, linestyle="--")
        axes.set(xlabel="top-1 accuracy", xlim=(0, 1.18), title=f"Top-1 {metrics.top1:.3f} (dashed), {part}")
        axes.set_xticks(np.arange(0, 1.01, 0.2))
        axes.spines[["top", "right"]].set_visible(False)


def plot_class_counts(labels: Iterable[NDArray], names: Sequence[str], path: str | Path) -> None:
    """How many images each class has, a bar for each; ``labels`` as for :func:`plot_labels`, of which only the classes count."""
    classes = np.concatenate([np.zeros((0, 5)), *labels])[:, 0].astype(int)
    counts = np.bincount(classes, minlength=len(names))
    with drawing(path, min(max(4.0, 0.25 * len(names)), 16.0), 3.2, texts=names, dpi=200) as figure:
        axes = figure.add_subplot()
        bars = axes.bar(range(len(counts)), counts, color=COLOURS[2])
        if len(names) <= MOST_BARS_NAMED:
            many = len(names) > 3
            axes.set_xticks(range(len(names)), [*map(shown_name, names)], rotation=45 if many else 0, ha="right" if many else "center")
            axes.bar_label(bars, fontsize=7)
        axes.set(title=f"{int(counts.sum())} images of {len(names)} classes", ylabel="images")
        axes.spines[["top", "right"]].set_visible(False)


def plot_labels(labels: Iterable[NDArray], names: Sequence[str], path: str | Path) -> None:
    """What is labelled: objects per class, boxes on top of one another, where centres lie, how large boxes are.

    Args:
        labels: Per image (n, 5) [class, cx, cy, w, h], normalised.
        names: Of the classes.
        path: File to write.
    """
    rows = np.concatenate([np.zeros((0, 5)), *labels])
    classes, boxes = rows[:, 0].astype(int), rows[:, 1:]
    with drawing(path, PAGE, 6.4, texts=names, dpi=200) as figure:
        counts, outlines, centres, sizes = figure.subplots(2, 2).flat
        number = np.bincount(classes, minlength=len(names))
        bars = counts.bar(range(len(number)), number, color=COLOURS[2])
        if len(names) <= 30:
            many = len(names) > 3
            shown = [shown_name(name, most=18) for name in names]
            counts.set_xticks(
                range(len(names)), shown, rotation=45 if many else 0, ha="right" if many else "center", rotation_mode="anchor"
            )
            counts.bar_label(bars, fontsize=6, rotation=90 if len(names) > 12 else 0)
            counts.margins(y=0.15)
        counts.set(title=f"{len(rows)} objects", ylabel="objects")
        canvas = np.full((800, 800, 3), 255, dtype=np.uint8)
        chosen = np.random.default_rng(0).permutation(len(rows))[:1000]
        centred = torch.from_numpy(np.concatenate((np.full((len(chosen), 2), 0.5), boxes[chosen, 2:]), axis=1))
        draw_boxes(canvas, cxcywh_to_xyxy(centred * 800).numpy(), [""] * len(chosen), classes[chosen].tolist(), line_thickness=1)
        outlines.imshow(canvas)
        outlines.axis("off")
        outlines.set_title("shapes" if len(chosen) == len(rows) else f"shapes of {len(chosen)}")
        for axes, x, y, title, axis_names in (
            (centres, boxes[:, 0], boxes[:, 1], "centres", ("x", "y")),
            (sizes, boxes[:, 2], boxes[:, 3], "sizes", ("width", "height")),
        ):
            axes.hist2d(x, y, bins=50, range=((0, 1), (0, 1)), cmap="Blues", rasterized=True)
            axes.set(xlabel=f"{axis_names[0]} (of the image)", ylabel=f"{axis_names[1]} (of the image)", title=title)
        centres.invert_yaxis()


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
    half = (len(metrics) + 1) // 2
    groups = [[k for k in values if k.startswith("train/")] + metrics[:half], [k for k in values if k.startswith("val/")] + metrics[half:]]
    columns = max(len(g) for g in groups) or 1
    with drawing(path, max(PAGE, 1.45 * columns), 3.4, dpi=200) as figure:
        handles: dict[str, Any] = {}
        panels = figure.subplots(2, columns, squeeze=False)
        for axes_row, keys in zip(panels, groups):
            for axes, key in zip(axes_row, keys):
                handles.update(_result_panel(axes, epochs, values[key]))
                axes.set_title(shown_name(key.removeprefix("metrics/")), fontsize=7)
            for axes in axes_row[len(keys) :]:
                axes.axis("off")
        for axes in panels[-1]:
            axes.set_xlabel("epoch", fontsize=7)
        add_legend(figure, list(handles.values()), list(handles), columns=3)


def _result_panel(axes: Any, epochs: NDArray, values: NDArray) -> dict[str, Any]:
    """One column over the epochs; a spike is marked at the edge, so that the rest stays visible. Gives what its legend names."""
    known = np.isfinite(values)
    x, y = epochs[known], values[known]
    handles = {"of each epoch": axes.plot(x, y, ".-", color=COLOURS[5], linewidth=0.8, markersize=2.5)[0]}
    low, high = (0.0, 1.0) if y.size and 0 <= y.min() <= y.max() <= 1 else shown_range(y)  # metrics have no spikes
    outside = (y > high) | (y < low)
    if len(y) > 5:
        inside = ~outside
        handles["smoothed over about 7 epochs"] = axes.plot(x[inside], _running_mean(y[inside]), color=COLOURS[4], linewidth=1.4)[0]
    if outside.any():
        axes.set_ylim(low, high)
        edge = np.where(y > high, high, low)[outside]
        handles["outside the panel"] = axes.plot(x[outside], edge, "^", color=COLOURS[0], markersize=4, clip_on=False)[0]
    axes.locator_params(axis="both", nbins=4)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize=6)
    axes.grid(alpha=0.3)
    return handles


def shown_range(values: NDArray) -> tuple[float, float]:
    """The range that a panel shows of finite values: all, but for spikes far outside of what nine tenths of them take."""
    if len(values) < 10:
        return -math.inf, math.inf
    low, high = np.percentile(values, (5, 95))
    if high - low <= 1e-9 * max(abs(high), abs(low)):  # nearly all equal: what differs is what there is to see
        return -math.inf, math.inf
    reach = SPIKE * (high - low)
    inside = values[(values >= low - reach) & (values <= high + reach)]
    if len(inside) == len(values):
        return -math.inf, math.inf
    margin = 0.05 * (inside.max() - inside.min())
    return float(inside.min() - margin), float(inside.max() + margin)


def plot_trade_off(curves: Mapping[str, Sequence[tuple[float, float, str]]], path: str | Path, *, x: str, y: str) -> None:
    """One line a name through its points (x, y, what to write beside it)."""
    texts = [text for points in curves.values() for _, _, text in points]
    with drawing(path, 1.4 * COLUMN, COLUMN, texts=[*curves, *texts]) as figure:
        axes = figure.add_subplot()
        handles = []
        for i, points in enumerate(curves.values()):
            xs, ys, labels = zip(*points)
            style = Style.of(i)
            handles += axes.plot(xs, ys, marker=style.marker, linestyle=style.dashes, linewidth=1.2, markersize=4, color=style.colour)
            for at_x, at_y, text in zip(xs, ys, labels):
                axes.annotate(shown_name(text), (at_x, at_y), textcoords="offset points", xytext=(3, 3), fontsize=6)
        axes.set(xlabel=x, ylabel=y)
        axes.margins(0.1)
        axes.grid(alpha=0.3)
        add_legend(figure, handles, list(curves))


def plot_evolution(rows: Sequence[Mapping[str, float]], keys: Sequence[str], path: str | Path) -> None:
    """Fitness over every hyper-parameter, a point a generation, later ones darker, the best one marked."""
    fitnesses = np.array([row["fitness"] for row in rows])
    best, columns = int(fitnesses.argmax()), 6
    down = -(-len(keys) // columns)
    with drawing(path, 1.6 * PAGE, 1.5 * down + 0.3, dpi=150) as figure:
        panels = figure.subplots(down, columns, squeeze=False)
        points = marks = None
        for axes, key in zip(panels.flat, keys):
            values = np.array([row[key] for row in rows])
            points = axes.scatter(values, fitnesses, c=np.arange(len(rows)), cmap="Blues", vmin=-len(rows) / 2, s=10)
            marks = axes.plot(values[best], fitnesses[best], "+", color=COLOURS[4], markersize=10)[0]
            axes.set_title(f"{key} = {values[best]:.4g}")
            axes.tick_params(labelsize=6)
            axes.grid(alpha=0.3)
        for axes in panels.flat[len(keys) :]:
            axes.axis("off")
        if points is not None:
            add_legend(figure, [points, marks], ["a generation, later ones darker", "the best"])


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
    """A line for each class that has objects, and their mean; the legend stands below, as wide as the column."""
    present = np.flatnonzero(~np.isnan(lines).any(axis=1))
    named = len(present) <= LEGEND_CLASSES
    texts = [metrics.names[c] for c in present] if named else []
    with drawing(path, COLUMN, 2.7 + 0.13 * (-(-len(texts) // 2) + 1), texts=texts) as figure:
        axes = figure.add_subplot()
        handles: list[Any] = []
        for number, c in enumerate(present):
            style = Style.of(number + 1)  # black is the mean's
            look = {"color": style.colour, "linestyle": style.dashes} if named else {"color": "0.8"}
            handles += axes.plot(x, lines[c], linewidth=1.0, **look)
        if named and values is not None:
            texts = [f"{short_name(text, most=LEGEND_COLUMNS - 6)} {values[c]:.3f}" for text, c in zip(texts, present)]
        if not named and handles:
            handles, texts = handles[:1], [f"each of {len(present)} classes"]
        if len(present):
            mean = lines[present].mean(axis=0)
            best = int(mean.argmax())
            handles += axes.plot(x, mean, linewidth=2.2, color=COLOURS[0])
            texts.append(f"all: {mean[best]:.2f} at {x[best]:.3f}" if values is None else f"all: {metrics.map50:.3f} mAP@0.5")
            legend = figure.legend(handles, [str(i) for i in range(len(handles))], loc="outside lower center", frameon=False, ncols=2)
            name_legend(legend, texts, most=LEGEND_COLUMNS)
        axes.set(xlabel=x_name, ylabel=y_name, xlim=(0, 1), ylim=(0, 1.02), title=f"IoU 0.5, rule: {metrics.rule}")
        axes.grid(alpha=0.3)


def _cell_numbers(axes: Any, confusion: NDArray, shares: NDArray, *, size: float) -> None:
    """Share and, of few classes, count in every cell that has one."""
    few = len(confusion) <= 12
    for row, column in np.argwhere(confusion > 0):
        share = shares[row, column]
        text = f"{share:.2f}\n{confusion[row, column]}" if few else f"{share:.2f}".removeprefix("0")
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color="white" if share > 0.5 else "black")


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
