"""Figures of an explanation: maps over the image with a colour bar and boxes, and what each attention module did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from models.analysis.module_views import ModuleViews
from models.layers.explained import ChannelWeights, PlaneMap, Points, Regions, View
from tasks.base import DrawStyle
from utils.visual.draw import colour_of, viewable
from utils.visual.fonts import families_for
from utils.visual.plots import shown_name

if TYPE_CHECKING:
    from engine.explain.explaining import Explanation, Placement

HEAT, SIGNED = "inferno", "RdBu_r"
FAINTEST, STRONGEST = 0.25, 0.85  # opacity of a map over the image where it is 0 and where it is 1
SHOWN_PX = (384, 1280)  # the longer side of an image in a figure is brought into this range
PANEL_INCHES, GAP, TITLES, MARGIN = 2.7, 0.68, 0.45, 0.12  # width of a panel, what is beside it, above it, round all
STRIP = 0.1  # the short side over the long one, below which an image fills its panel: it would be a few px high
HEADING = 0.25
MOST_COLUMNS = 5
QUERY_COLOUR, TARGET_COLOUR = "#00e5ff", "#ffffff"
MOST_BARS = 64  # channels of which every bar is shown; of more the sorted outline
Image = NDArray[np.uint8]
Panel = Callable[[Any, Any], None]  # draws into (figure, axes)


def chosen_extents(explanation: Explanation) -> list[list[float]]:
    """Axis-aligned boxes xyxy px about the detections that are explained; none where they are of the whole image."""
    if explanation.task.whole_image:
        return []
    extents = explanation.task.shapes(explanation.found).extents
    return extents[list(explanation.chosen)].tolist()  # type: ignore[no-any-return]


def overlay(explanation: Explanation, method: str) -> Image:
    """The image (H, W, 3) RGB, in grey, with a map over it and the boxes that are explained."""
    image = viewable(explanation.image)
    height, width = image.shape[:2]
    plane = np.asarray(cv2.resize(explanation.planes[method], (width, height), interpolation=cv2.INTER_LINEAR), np.float32)
    drawn = blend(image, plane, seen=explanation.placement.seen((height, width)))
    boxes = [[round(side) for side in box] for box in chosen_extents(explanation)]
    thick = max(round((height + width) / 600), 1)
    for x1, y1, x2, y2 in boxes:
        cv2.rectangle(drawn, (x1, y1), (x2, y2), (255, 255, 255), thick, cv2.LINE_AA)
    return drawn


def blend(image: Image, plane: NDArray[np.float32], *, signed: bool = False, seen: NDArray[np.bool_] | None = None) -> Image:
    """An image (H, W, 3) in grey with a map (H, W) in 0-1 (or -1 … 1) over it where it is ``seen``, more opaque where the map is larger."""
    import matplotlib

    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32).repeat(3, 2)
    place = (plane + 1) / 2 if signed else plane
    colours = matplotlib.colormaps[SIGNED if signed else HEAT](np.clip(place, 0, 1))[..., :3].astype(np.float32) * 255
    opacity = (FAINTEST + (STRONGEST - FAINTEST) * np.clip(np.abs(plane), 0, 1))[..., None]
    opacity = opacity if seen is None else opacity * seen[..., None]
    return (grey * (1 - opacity) + colours * opacity).round().clip(0, 255).astype(np.uint8)


def cam_figure(explanation: Explanation, method: str) -> Any:
    """The image with its detections, the map of all rows together, and each row's own."""
    shown = ShownImage.of(explanation)
    boxes = chosen_extents(explanation)
    together = shown.map_panel(explanation.planes[method], "all rows together", boxes=boxes)
    panels: list[Panel] = [shown.detections_panel(explanation), together]
    if len(explanation.titles) > 1:
        panels += [shown.map_panel(explanation.row_plane(method, row), title) for row, title in influence_titles(explanation, method)]
    return grid_figure(panels, title=f"{method}: {explanation.target.text}", aspect=shown.aspect)


def influence_titles(explanation: Explanation, method: str) -> Iterator[tuple[int, str]]:
    """Rows and what they are, with a word where the target does not depend on one."""
    for row, title in explanation.titles.items():
        yield row, title if bool((explanation.cams[method][row] > 0).any()) else f"{title}: no influence"


def module_figure(explanation: Explanation, module: ModuleViews) -> Any:
    """The image with the place of interest, and every view of a module."""
    shown = ShownImage.of(explanation)
    panels: list[Panel] = [shown.query_panel(explanation)]
    panels += [shown.view_panel(explanation, view) for view in module.views]
    return grid_figure(panels, title=f"{module.title}  |  {module.name}", aspect=shown.aspect)


def grid_figure(panels: Sequence[Panel], *, title: str, aspect: float, columns: int = MOST_COLUMNS) -> Any:
    """Panels side by side, as a figure; ``aspect`` is their height over their width."""
    rows = -(-len(panels) // columns)
    columns = -(-len(panels) // rows)
    width, height = PANEL_INCHES, PANEL_INCHES * min(max(aspect, 0.4), 1.8)
    total = (width + GAP) * columns + MARGIN, (height + TITLES) * rows + MARGIN + HEADING
    figure = new_figure(*total)
    figure.suptitle(_short(shown_name(title, most=140), 140), fontsize=10, y=1 - 0.12 / total[1], va="top")
    for index, panel in enumerate(panels):
        left, top = MARGIN + index % columns * (width + GAP), HEADING + (index // columns + 1) * (height + TITLES)
        axes = figure.add_axes((left / total[0], 1 - top / total[1], width / total[0], height / total[1]))
        panel(figure, axes)
    choose_fonts(figure)
    return figure


def choose_fonts(figure: Any) -> None:
    """Fonts that have the characters of everything that is written in a figure: names of classes and files, titles of a module's views."""
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    families = families_for(text.get_text() for text in texts)
    for text in texts:
        text.set_family(families)


def new_figure(width: float, height: float) -> Any:
    """A figure of its own, without pyplot's register of figures and without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


class ShownImage:
    """An image at the size at which figures show it.

    Attributes:
        pixels: (h, w, 3) RGB.
        scale: of its px in those of the original.
        seen: (h, w) where the network saw it; None for everywhere.
    """

    def __init__(self, image: NDArray[Any], placement: Placement | None = None) -> None:
        full = viewable(image)
        longer = max(full.shape[:2])
        wanted = min(max(longer, SHOWN_PX[0]), SHOWN_PX[1])
        self.scale = wanted / longer
        size = (max(round(full.shape[1] * self.scale), 1), max(round(full.shape[0] * self.scale), 1))
        smoothing = cv2.INTER_AREA if self.scale < 1 else cv2.INTER_CUBIC
        self.pixels = full if self.scale == 1 else np.asarray(cv2.resize(full, size, interpolation=smoothing), np.uint8)
        self.seen = None if placement is None else placement.seen(self.pixels.shape[:2])

    @staticmethod
    def of(explanation: Explanation) -> ShownImage:
        return ShownImage(explanation.image, explanation.placement)

    @property
    def aspect(self) -> float:
        return self.pixels.shape[0] / self.pixels.shape[1]

    def resized(self, plane: NDArray[np.float32], *, smooth: bool = True) -> NDArray[np.float32]:
        size = self.pixels.shape[1], self.pixels.shape[0]
        way = cv2.INTER_LINEAR if smooth else cv2.INTER_NEAREST
        return np.asarray(cv2.resize(plane, size, interpolation=way), np.float32)

    def show(self, axes: Any, pixels: Image, title: str) -> None:
        axes.imshow(pixels)
        axes.set(xticks=(), yticks=(), xlim=(-0.5, pixels.shape[1] - 0.5), ylim=(pixels.shape[0] - 0.5, -0.5))
        is_strip = not STRIP <= self.aspect <= 1 / STRIP
        if is_strip:
            axes.set_aspect("auto")
        axes.set_title(_wrapped(shown_name(f"{title} (stretched)" if is_strip else title, most=120)), fontsize=8)

    def detections_panel(self, explanation: Explanation) -> Panel:
        """The image with its detections, numbered, those that are explained with a thick line; or with its best classes."""
        found = explanation.found

        def draw(figure: Any, axes: Any) -> None:
            if explanation.task.whole_image:  # its classes have no place, so they are written at the size that is shown
                enlarged = ShownImage(viewable(explanation.image)).pixels
                self.show(axes, explanation.task.draw(enlarged, found, explanation.names, DrawStyle()), "best classes")
                return
            drawn = explanation.task.draw(viewable(explanation.image), found, explanation.names, DrawStyle(hide_labels=True))
            self.show(axes, ShownImage(drawn).pixels, f"detections: {len(found)}")
            boxes = explanation.task.shapes(found).extents.tolist()
            for number, (box, label, score) in enumerate(zip(boxes, found.classes.tolist(), found.scores.tolist())):
                if number in explanation.chosen or len(explanation.chosen) == 0:
                    text = f"{number} {shown_name(explanation.names[label], most=16)} {score:.2f}" if len(found) <= 12 else str(number)
                    self.box(axes, box, colour=_unit(colour_of(label)), text=text)

        return draw

    def box(self, axes: Any, box: Sequence[float], *, colour: Any, text: str = "", width: float = 1.5) -> None:
        """A box in px of the original, with a text above it."""
        from matplotlib.patches import Rectangle

        x1, y1, x2, y2 = (value * self.scale for value in box)
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=width))
        if text:
            label = {"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.8}
            is_high = y1 < 0.05 * self.pixels.shape[1]  # no room for the text above the box
            axes.text(x1, max(y1, 0), text, fontsize=5.5, color=_ink(colour), bbox=label, va="top" if is_high else "bottom", clip_on=True)

    def map_panel(self, plane: NDArray[np.float32], title: str, *, boxes: Sequence[Sequence[float]] = ()) -> Panel:
        """A map in 0-1 over the image, with a colour bar."""

        def draw(figure: Any, axes: Any) -> None:
            self.show(axes, blend(self.pixels, self.resized(plane), seen=self.seen), title)
            for box in boxes:
                self.box(axes, box, colour=TARGET_COLOUR, width=1.0)
            _colour_bar(figure, axes, 0.0, 1.0)

        return draw

    def query_panel(self, explanation: Explanation) -> Panel:
        """The image with the place of interest and the boxes that are explained."""

        def draw(figure: Any, axes: Any) -> None:
            self.show(axes, self.pixels, "place of interest")
            for number, box in zip(explanation.chosen, chosen_extents(explanation)):
                self.box(axes, box, colour=_unit(colour_of(int(explanation.found.classes[number]))))
            self._mark_query(axes, explanation)

        return draw

    def view_panel(self, explanation: Explanation, view: View) -> Panel:
        """One view of a module."""
        if isinstance(view, ChannelWeights):
            return lambda figure, axes: _bars(axes, view)
        if isinstance(view, PlaneMap):
            return lambda figure, axes: self._plane(figure, axes, explanation, view)
        if isinstance(view, Regions):
            return lambda figure, axes: self._regions(figure, axes, explanation, view)
        return lambda figure, axes: self._points(figure, axes, explanation, view)

    def _plane(self, figure: Any, axes: Any, explanation: Explanation, view: PlaneMap) -> None:
        values = torch.nan_to_num(view.values.detach().float().cpu())
        plane = explanation.placement.on_image(values, view.reach, smooth=False)
        signed = view.signed and bool((values < 0).any())
        low, high = (-float(values.abs().max()), float(values.abs().max())) if signed else (float(values.min()), float(values.max()))
        is_flat = high - low <= 1e-6 * max(abs(low), abs(high))
        unit = (plane - low) / (1.0 if is_flat else high - low)
        title = f"{view.title}: {low:.3g} everywhere" if is_flat else view.title
        shown = self.resized(2 * unit - 1 if signed else unit, smooth=False)
        self.show(axes, blend(self.pixels, shown, signed=signed, seen=self.seen), title)
        if view.at_query:
            self._mark_query(axes, explanation)
        if not is_flat:
            _colour_bar(figure, axes, low, high, signed=signed)

    def _regions(self, figure: Any, axes: Any, explanation: Explanation, view: Regions) -> None:
        import matplotlib

        weights = view.weights.detach().float().cpu()
        most = float(weights.max()) if len(weights) else 1.0
        faded = (self.pixels.astype(np.float32) * 0.55).astype(np.uint8)
        self.show(axes, faded, view.title)
        order = weights.argsort(descending=True).tolist()
        for rank, index in reversed(list(enumerate(order))):
            colour = matplotlib.colormaps[HEAT](0.25 + 0.7 * float(weights[index]) / max(most, 1e-12))
            corners = self._corners(explanation, view.boxes[index])
            self._region(axes, corners, colour, f"{rank + 1}\n{float(weights[index]):.2f}")
        from matplotlib.patches import Rectangle

        x1, y1, x2, y2 = self._corners(explanation, view.own)
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=QUERY_COLOUR, linewidth=2))
        self._mark_query(axes, explanation)

    def _region(self, axes: Any, corners: Sequence[float], colour: Any, text: str) -> None:
        """A region of the image as it is, with an edge and a text."""
        from matplotlib.patches import Rectangle

        height, width = self.pixels.shape[:2]
        x1, y1, x2, y2 = (min(max(value, 0), side) for value, side in zip(corners, (width, height, width, height)))
        left, top = max(round(x1), 0), max(round(y1), 0)
        right, bottom = min(round(x2), self.pixels.shape[1]), min(round(y2), self.pixels.shape[0])
        if right > left and bottom > top:
            axes.imshow(self.pixels[top:bottom, left:right], extent=(left - 0.5, right - 0.5, bottom - 0.5, top - 0.5), zorder=1.5)
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, facecolor="none", edgecolor=colour, linewidth=1.5, zorder=2))
        axes.text((x1 + x2) / 2, (y1 + y2) / 2, text, fontsize=6, color="white", ha="center", va="center", zorder=3, clip_on=True,
                  bbox={"facecolor": "black", "edgecolor": "none", "pad": 0.5, "alpha": 0.5})  # fmt: skip

    def _corners(self, explanation: Explanation, box: torch.Tensor) -> list[float]:
        """A box in fractions of the network's input, in px as shown."""
        corners = explanation.placement.fractions_to_image(box.view(2, 2))
        return [value * side for (x, y) in corners.tolist() for value, side in ((x, self.pixels.shape[1]), (y, self.pixels.shape[0]))]

    def _points(self, figure: Any, axes: Any, explanation: Explanation, view: Points) -> None:
        size = np.array((self.pixels.shape[1], self.pixels.shape[0]))
        xy = explanation.placement.fractions_to_image(view.xy.detach()).numpy() * size
        self.show(axes, (self.pixels.astype(np.float32) * 0.7).astype(np.uint8), view.title)
        if view.origins_xy is not None:
            origin = explanation.placement.fractions_to_image(view.origins_xy.detach()).numpy() * size
            for (x0, y0), (x1, y1) in zip(origin, xy):
                axes.plot((x0, x1), (y0, y1), color="white", linewidth=0.4, alpha=0.6)
        weights = None if view.weights is None else view.weights.detach().float().cpu().numpy()
        if weights is None:
            axes.scatter(xy[:, 0], xy[:, 1], s=6, color="#ffb000")
        else:
            order = weights.argsort()  # the most important on top
            drawn = axes.scatter(xy[order, 0], xy[order, 1], c=weights[order], s=10, cmap=HEAT, edgecolors="white", linewidths=0.2)
            _short_ticks(figure.colorbar(drawn, cax=axes.inset_axes((1.02, 0, 0.04, 1))), float(weights.min()), float(weights.max()))
        self._mark_query(axes, explanation)

    def _mark_query(self, axes: Any, explanation: Explanation) -> None:
        place = torch.tensor((explanation.query.x, explanation.query.y))
        x, y = explanation.placement.fractions_to_image(place).tolist()
        x, y = x * self.pixels.shape[1], y * self.pixels.shape[0]
        axes.plot(x, y, "+", color="black", markersize=10, markeredgewidth=3, zorder=4)
        axes.plot(x, y, "+", color=QUERY_COLOUR, markersize=9, markeredgewidth=1.5, zorder=5)


def _bars(axes: Any, view: ChannelWeights) -> None:
    """Channel weights from the largest to the smallest; the numbers of the largest few below."""
    place = axes.get_position()  # room for the line below
    axes.set_position((place.x0 + 0.06 * place.width, place.y0 + 0.15 * place.height, 0.94 * place.width, 0.85 * place.height))
    values = view.values.detach().float().cpu()
    order = values.argsort(descending=True)
    ranked = values[order].numpy()
    places = np.arange(len(ranked))
    if len(ranked) <= MOST_BARS:
        axes.bar(places, ranked, width=0.9, color="#0072b2")
    else:
        axes.fill_between(places, ranked, step="mid", color="#0072b2", linewidth=0)
    axes.axhline(float(values.mean()), color="#d55e00", linewidth=1, linestyle="--")
    axes.set_xlim(-0.5, len(ranked) - 0.5)
    axes.set_xlabel(f"channels, sorted; largest: {', '.join(map(str, order[:6].tolist()))}", fontsize=7)
    axes.set_title(_wrapped(f"{view.title} (dashed: mean {float(values.mean()):.3g})"), fontsize=8)
    axes.tick_params(labelsize=6)


def _colour_bar(figure: Any, axes: Any, low: float, high: float, *, signed: bool = False) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    mappable = ScalarMappable(Normalize(low, high), cmap=SIGNED if signed else HEAT)
    _short_ticks(figure.colorbar(mappable, cax=axes.inset_axes((1.02, 0, 0.04, 1))), low, high)


def _short_ticks(bar: Any, low: float, high: float) -> None:
    """Three numbers of three digits beside a colour bar; one that is nothing beside the others is 0."""
    ticks = (low, (low + high) / 2, high)
    bar.set_ticks(ticks, labels=[f"{0.0 if abs(tick) < 1e-3 * max(abs(low), abs(high)) else tick:.3g}" for tick in ticks])
    bar.ax.tick_params(labelsize=6, length=2)


def _wrapped(text: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, 46, max_lines=2, placeholder="…"))


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _unit(colour: tuple[int, int, int]) -> tuple[float, ...]:
    return tuple(channel / 255 for channel in colour)


def _ink(colour: Any) -> str:
    """Black or white, whichever is legible on a colour."""
    if isinstance(colour, str):
        return "black"
    return "black" if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 0.55 else "white"
