"""Receptive fields as a figure: what reaches the middle of a row's map, and how much of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.explain.figures import HEAT, grid_figure
from models.analysis.receptive_field import ReceptiveField
from models.analysis.tracing import row_title
from models.model import Model
from utils.text_table import counted

LEAST_SHOWN = 1e-3  # of the maximum, on the logarithmic scale
SHARE_COLOURS = ("#00e5ff", "#56b4e9", "#009e73")


def field_figure(model: Model, fields: Sequence[ReceptiveField], *, images: int) -> Any:
    """The effective field of each row on a logarithmic scale, with its squares and the theoretical one."""
    height, width = fields[0].effective.shape
    panels = [lambda figure, axes, field=field: _panel(figure, axes, model, field) for field in fields]
    title = f"receptive fields of the middle cell, mean of {counted(images, 'image')} of {height}x{width} px"
    return grid_figure(panels, title=title, aspect=height / width)


def field_lines(model: Model, fields: Sequence[ReceptiveField]) -> list[str]:
    """One line a row."""
    lines = []
    for field in fields:
        sides = ", ".join(f"{share:.0%} in {side} px" for share, side in field.sides_px.items())
        lines.append(f"{row_title(model, field.row)}: theoretical {_theory(field)}, effective {sides}")
    return lines


def _theory(field: ReceptiveField) -> str:
    """The size of the theoretical field, in which a side that the border of the input cuts off is a least one."""
    height, width = field.theoretical_hw
    if field.whole_input:
        return f"at least the whole input, {height}x{width} px"
    high, wide = field.clipped_hw
    if high == wide:
        return f"{'at least ' * high}{height}x{width} px"
    return f"height {'at least ' * high}{height} px, width {'at least ' * wide}{width} px"


def _panel(figure: Any, axes: Any, model: Model, field: ReceptiveField) -> None:
    from matplotlib.patches import Rectangle

    height, width = field.effective.shape
    values = np.log10(np.clip(field.effective.numpy(), LEAST_SHOWN, 1))
    shown = axes.imshow(values, cmap=HEAT, vmin=np.log10(LEAST_SHOWN), vmax=0)
    bar = figure.colorbar(shown, cax=axes.inset_axes((1.02, 0, 0.04, 1)), ticks=(-3, -2, -1, 0))
    bar.ax.set_yticklabels(("0.001", "0.01", "0.1", "1"), fontsize=6)
    y, x = field.middle_yx
    for (share, side), colour in zip(field.sides_px.items(), SHARE_COLOURS):
        square = Rectangle((x - side / 2, y - side / 2), side, side, fill=False, edgecolor=colour, linewidth=1)
        square.set_label(f"{share:.0%}: {side} px")
        axes.add_patch(square)
    rows, columns = field.theoretical_hw
    if not field.whole_input:
        corner = (field.limits[2] - 0.5, field.limits[0] - 0.5)
        square = Rectangle(corner, columns, rows, fill=False, edgecolor="white", linewidth=1, linestyle="--")
        square.set_label("theoretical")  # how large is in the title
        axes.add_patch(square)
    axes.legend(fontsize=5.5, loc="lower right", framealpha=0.6)
    axes.set(xticks=(), yticks=(), xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.set_title(f"{row_title(model, field.row)}\ntheoretical: {_theory(field)}", fontsize=8)
