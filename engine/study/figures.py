"""The figures of a study as PNG and PDF, in colours that are told apart with any colour vision (Okabe & Ito), markers and dashes too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.study.records import Cost, RunRecord, Status, Study
from engine.study.statistics import POINTS, Analysis, Comparison, Paired, Summary, Verdict, finished, paired_differences
from engine.study.variant_costs import variant_cost
from utils.metrics.columns import column_title
from utils.visual.figures import COLOURS, Style, add_legend, drawing, figure_formats
from utils.visual.names import shown_name

Array = NDArray[np.float64]
VERDICT_COLOURS = {Verdict.BETTER: "#0072B2", Verdict.WORSE: "#D55E00", Verdict.NO_EVIDENCE: "#777777", Verdict.UNTESTED: "#BBBBBB"}
MOST_CLASSES = 20  # rows of the figure by class
PANELS = 4  # side by side
NARROWEST = 0.1  # points
MANY = 20  # variants that are drawn apart; more have the colours of three groups
SIZES = ("small", "medium", "large")
FORMATS = ("png", "pdf")


@dataclass(frozen=True)
class Drawn:
    """A figure in the making: where it goes, and the handles of its legend."""

    figure: Any
    handles: dict[str, Any] = field(default_factory=dict)


def learning_curves(study: Study, folder: Path) -> list[Path]:
    """The metric over the epochs: mean over seeds with a band of one standard deviation; nothing where no run kept its curve."""
    curves = {v: (epochs, POINTS * values) for v in study.variants for epochs, values in [_curves_of(study, v)] if len(values)}
    if not curves:
        return []
    with _drawing(study, folder / "learning_curves", 7.5, 4.5) as drawn:
        axes = drawn.figure.add_subplot()
        _bands(drawn, axes, study, curves)
        axes.set(xlabel="epoch", ylabel=f"{column_title(study.metric)} (points)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(_bands_title(curves), fontsize=10)
        axes.grid(alpha=0.3)
    return _files(folder / "learning_curves")


def pr_curves(study: Study, folder: Path) -> list[Path]:
    """Precision over recall at IoU 0.5, all classes: mean over seeds with a band; nothing where no run kept it."""
    kept = {v: [r.pr_curves["all"] for r in _of(study, v) if len(r.pr_curves.get("all", ()))] for v in study.variants}
    recall = np.linspace(0, 1, 1001)
    curves = {
        v: (recall, np.stack([np.interp(recall, np.linspace(0, 1, len(c)), np.asarray(c, dtype=float)) for c in found]))
        for v, found in kept.items() if found
    }  # fmt: skip
    if not curves:
        return []
    with _drawing(study, folder / "pr_curves", 7, 5) as drawn:
        axes = drawn.figure.add_subplot()
        _bands(drawn, axes, study, curves)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        axes.set_title(f"{_bands_title(curves)}; IoU 0.5, all classes", fontsize=9)
        axes.grid(alpha=0.3)
    return _files(folder / "pr_curves")


def trade_offs(study: Study, analysis: Analysis, folder: Path) -> list[Path]:
    """The metric against parameters, GFLOPs and latency: mean and standard deviation, and the Pareto front of the means."""
    costs = {v: variant_cost(r for r in study.records if r.variant == v) for v in study.variants}
    batches = sorted({batch for cost in costs.values() for batch in cost.latency_ms})
    kinds: list[tuple[str, str, Callable[[Cost], tuple[float, float] | None]]] = [
        ("parameters", "parameters (M)", lambda c: None if c.parameters is None else (c.parameters / 1e6, 0.0)),
        ("gflops", "GFLOPs (attention counted)", lambda c: None if c.gflops is None else (c.gflops, 0.0)),
    ]
    for b in batches:
        device = next((c.device for c in costs.values() if b in c.latency_ms and c.device), "")
        label = f"latency at batch {b} (ms{', ' + device if device else ''})"
        kinds.append((f"latency_batch{b}", label, partial(_latency, batch=b)))
    files = []
    for name, label, value in kinds:
        points = {s.variant: (place, s) for s in analysis.summaries if s.values and (place := value(costs[s.variant])) is not None}
        if points:
            files += _trade_off(study, folder / f"accuracy_{name}", label, points)
    return files


def difference_plot(study: Study, comparisons: Sequence[Comparison], path: Path) -> list[Path]:
    """Each comparison's difference with its 95 % interval, coloured by the verdict, each seed as a small point."""
    shown = [c for c in comparisons if c.paired.count]
    if not shown:
        return []
    values = {v: {r.seed: r.metrics[study.metric] for r in _of(study, v) if study.metric in r.metrics} for v in study.variants}
    other = shown[0].reference if {c.reference for c in shown} == {study.baseline} else "the control of each"
    with _drawing(study, path, 8.5, 1.3 + 0.42 * len(shown)) as drawn:
        axes = drawn.figure.add_subplot()
        for row, c in enumerate(shown):
            seeds = [POINTS * (values[c.variant][s] - values[c.reference][s]) for s in c.seeds]
            axes.plot(seeds, [row + 0.22] * len(seeds), ".", color="0.7", markersize=5, zorder=1)
            _interval(axes, c.paired, row, colour=VERDICT_COLOURS[c.verdict])
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(shown)), [shown_name(c.variant) for c in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        _widen(axes)
        axes.set_xlabel(f"difference to {shown_name(other)} in {column_title(study.metric)} (points)")
        axes.grid(axis="x", alpha=0.3)
        axes.set_title("95 % intervals (each by itself); grey points: seeds", fontsize=10)
        for verdict in dict.fromkeys(c.verdict for c in shown):
            drawn.handles[verdict.value] = axes.plot([], [], "o-", color=VERDICT_COLOURS[verdict])[0]
    return _files(path)


def class_differences(study: Study, folder: Path) -> list[Path]:
    """Difference of each class's AP to the baseline, a panel a variant; of many classes those with most objects."""
    objects: dict[str, float] = {}
    for r in finished(study.records):
        for name, row in r.per_class.items():
            objects[name] = max(objects.get(name, 0.0), row.get("objects", 0.0))
    names = list(objects)
    if len(names) > MOST_CLASSES:
        names = sorted(names, key=lambda name: -objects[name])[:MOST_CLASSES]
    title = "AP by class" + (f", the {MOST_CLASSES} of {len(objects)} with most objects" if len(names) < len(objects) else "")
    return _panels(study, folder / "class_differences", names, title=title, value=_class_ap)


def size_differences(study: Study, folder: Path) -> list[Path]:
    """Difference of the AP of small, medium and large objects to the baseline, a panel a variant."""
    names = [s for s in SIZES if any(math.isfinite(r.per_size.get(s, math.nan)) for r in finished(study.records))]
    title = "AP by size of objects (32² and 96² px²)"
    return _panels(study, folder / "size_differences", names, title=title, value=_size_ap)


def _panels(study: Study, path: Path, names: Sequence[str], *, title: str, value: Callable[..., float]) -> list[Path]:
    """Paired differences of several values, a row each, in a panel for every variant."""
    others = [v for v in study.variants if v != study.baseline]
    rows = {v: [_paired(study, v, partial(value, name=name)) for name in names] for v in others}
    rows = {v: pairs for v, pairs in rows.items() if any(p.count for p in pairs)}
    if not rows:
        return []
    across = min(len(rows), PANELS)
    down = -(-len(rows) // across)
    with _drawing(study, path, 2.2 + 2.3 * across, 0.9 + down * (0.75 + 0.24 * len(names)), texts=names) as drawn:
        grid = drawn.figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        for number, (axes, (variant, pairs)) in enumerate(zip(grid.flat, rows.items())):
            for row, paired in enumerate(pairs):
                if paired.count:
                    _interval(axes, paired, row, colour=_clear_colour(paired))
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_title(shown_name(variant, most=34), fontsize=8)
            axes.grid(axis="x", alpha=0.3)
            axes.set_yticks(range(len(names)), [shown_name(name, most=34) for name in names], fontsize=8)
            axes.set_ylim(len(names) - 0.5, -0.5)
            _widen(axes)
            axes.tick_params(labelbottom=number >= len(rows) - across)  # the lowest of each column
        for axes in grid.flat[len(rows) :]:
            axes.set_visible(False)
        drawn.figure.suptitle(f"{title}: difference to {shown_name(study.baseline)}", fontsize=10)
        drawn.figure.supxlabel("points; 95 % intervals over seeds, not corrected for their number", fontsize=9)
    return _files(path)


def _widen(axes: Any) -> None:
    """Shows a difference of 0 as one: an axis of points is never narrower than ``NARROWEST`` on each side."""
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, -NARROWEST), max(high, NARROWEST))


def _trade_off(study: Study, path: Path, label: str, points: Mapping[str, tuple[tuple[float, float], Summary]]) -> list[Path]:
    order = {variant: number for number, variant in enumerate(study.variants)}
    groups = _groups(study) if len(points) > MANY else {}
    with _drawing(study, path, 7.5, 4.5) as drawn:
        axes = drawn.figure.add_subplot()
        for variant, ((x, spread), s) in points.items():
            style, sd = groups[variant].style if groups else Style.of(order[variant]), 0.0 if math.isnan(s.sd) else s.sd
            filled = style.dashes == "-" if groups else order[variant] < len(COLOURS)
            bars = axes.errorbar(
                x, POINTS * s.mean, xerr=spread / 2 or None, yerr=POINTS * sd or None, fmt=style.marker, color=style.colour,
                capsize=0 if groups else 3, elinewidth=0.5 if groups else None, markersize=4 if groups else 6,
                markerfacecolor=style.colour if filled else "white",
            )  # fmt: skip
            drawn.handles[groups[variant].name if groups else variant] = bars.lines[0]  # the marker alone
        front = pareto_front([(place[0], POINTS * s.mean) for place, s in points.values()])
        if len(front) > 1:
            drawn.handles["Pareto front"] = axes.step(*zip(*front), where="post", color="0.6", linewidth=1, linestyle="--", zorder=0)[0]
        axes.set(xlabel=shown_name(label, most=90), ylabel=f"{column_title(study.metric)} (points)")
        axes.set_title("Mean and standard deviation over seeds", fontsize=10)
        axes.margins(0.08)
        axes.grid(alpha=0.3)
    return _files(path)


def _latency(cost: Cost, batch: int) -> tuple[float, float] | None:
    return cost.latency_ms.get(batch)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, quality) that no other beats or equals in both, by cost."""
    ordered = sorted(set(points), key=lambda p: (p[0], -p[1]))
    best_before = [-math.inf, *accumulate((quality for _, quality in ordered), max)]
    return [point for point, before in zip(ordered, best_before) if point[1] > before]


@dataclass(frozen=True)
class _Group:
    """Variants that are drawn alike where there are too many to tell apart."""

    name: str
    style: Style


def _groups(study: Study) -> dict[str, _Group]:
    """By variant: the baseline, the capacity controls, and the other variants; the numbers of each are in the tables."""
    controls = set(study.controls.values())
    others = sum(v != study.baseline and v not in controls for v in study.variants)
    variants = _Group(f"variants ({others})", Style("#0072B2", "o", "-"))
    plain = _Group(f"their controls ({len(controls)})", Style("#E69F00", "s", (0, (5, 2))))
    baseline = _Group(study.baseline, Style("#000000", "D", "-"))
    return {v: baseline if v == study.baseline else plain if v in controls else variants for v in study.variants}


def _bands(drawn: Drawn, axes: Any, study: Study, curves: Mapping[str, tuple[Array, Array]]) -> None:
    """Curves (x, rows) of each variant: a line and a band each, or, of many, thin lines of three kinds."""
    if len(curves) <= MANY:
        order = {variant: number for number, variant in enumerate(study.variants)}
        for variant, (x, rows) in curves.items():
            drawn.handles[variant] = _band(axes, x, rows, Style.of(order[variant]))
        return
    groups = _groups(study)
    for variant in sorted(curves, key=lambda v: v == study.baseline):  # the baseline above the others
        x, rows = curves[variant]
        group, is_baseline = groups[variant], variant == study.baseline
        line = _band(axes, x, rows, group.style, band=is_baseline)
        line.set(linewidth=1.8 if is_baseline else 0.6, alpha=1.0 if is_baseline else 0.6)
        drawn.handles[group.name] = line


def _bands_title(curves: Mapping[str, Any]) -> str:
    return "Mean and standard deviation over seeds" if len(curves) <= MANY else "Mean over seeds, and the baseline's standard deviation"


def _curves_of(study: Study, variant: str) -> tuple[Array, Array]:
    """Epochs (E,) and the metric of every seed (S, E) of a variant; NaN where a run has no value."""
    rows = []
    for r in study.records:
        if r.variant == variant and r.status in (Status.FINISHED, Status.STOPPED) and len(r.curves.get(study.metric, ())):
            values = np.asarray(r.curves[study.metric], dtype=float)
            epochs = np.asarray(r.curves.get("epoch", range(1, len(values) + 1)), dtype=float)
            rows.append(dict(zip(epochs.tolist(), values.tolist())))
    epochs = np.array(sorted({epoch for row in rows for epoch, value in row.items() if math.isfinite(epoch) and math.isfinite(value)}))
    return epochs, np.array([[row.get(epoch, math.nan) for epoch in epochs] for row in rows]).reshape(len(rows), len(epochs))


def _band(axes: Any, x: Array, rows: Array, style: Style, *, band: bool = True) -> Any:
    """Mean of rows (S, n) as a line, one standard deviation as a band where two rows have a value."""
    known = np.isfinite(rows)
    count = known.sum(axis=0)
    mean = np.where(known, rows, 0).sum(axis=0) / np.maximum(count, 1)
    sd = np.sqrt(np.where(known, (rows - mean) ** 2, 0).sum(axis=0) / np.maximum(count - 1, 1))
    if band:
        axes.fill_between(x, mean - sd, mean + sd, where=count > 1, color=style.colour, alpha=0.15, linewidth=0)
    marker = {"marker": style.marker, "markersize": 4} if len(x) < 4 else {}
    return axes.plot(x[count > 0], mean[count > 0], color=style.colour, linestyle=style.dashes, linewidth=1.6, **marker)[0]


def _interval(axes: Any, paired: Paired, row: float, *, colour: str) -> None:
    """A difference with its interval; hollow where there is none."""
    known = math.isfinite(paired.half_width)
    half, filling = (POINTS * paired.half_width, colour) if known else (None, "white")
    style: dict[str, Any] = {"fmt": "o", "color": colour, "markerfacecolor": filling, "capsize": 3, "markersize": 5, "zorder": 2}
    axes.errorbar(POINTS * paired.mean, row, xerr=half, **style)


def _clear_colour(paired: Paired) -> str:
    """Coloured where the interval leaves 0 out."""
    low, high = paired.interval
    return VERDICT_COLOURS[Verdict.BETTER if low > 0 else Verdict.WORSE if high < 0 else Verdict.NO_EVIDENCE]


def _paired(study: Study, variant: str, value: Callable[[RunRecord], float]) -> Paired:
    ours, base = ({r.seed: value(r) for r in _of(study, name)} for name in (variant, study.baseline))
    return paired_differences(ours, base)


def _class_ap(record: RunRecord, name: str) -> float:
    return record.per_class.get(name, {}).get("AP", math.nan)


def _size_ap(record: RunRecord, name: str) -> float:
    return record.per_size.get(name, math.nan)


def _of(study: Study, variant: str) -> list[RunRecord]:
    return [r for r in finished(study.records) if r.variant == variant]


@contextmanager
def _drawing(study: Study, path: Path, width: float, height: float, *, texts: Sequence[str] = ()) -> Iterator[Drawn]:
    """A figure without pyplot's register, in fonts that have the study's names; at the end it gets its legend and is written."""
    names = [*study.variants, study.baseline, *texts]
    with figure_formats(FORMATS), drawing(path.with_suffix(".png"), width, height, texts=names, dpi=200) as figure:
        drawn = Drawn(figure)
        yield drawn
        columns = -(-len(drawn.handles) // 24)
        add_legend(figure, list(drawn.handles.values()), list(drawn.handles), place="outside right upper", columns=columns)


def _files(path: Path) -> list[Path]:
    return [path.with_suffix(f".{suffix}") for suffix in FORMATS]
