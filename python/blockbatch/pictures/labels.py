"""Names beside the marks of a plot, placed so that none covers another, a mark or what else is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from blockbatch.pictures import style

_DIRECTIONS = ((1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
_DISTANCES = (5.5, 8, 11, 16, 22, 30, 40, 54, 72, 96)  # points
_LED = 11  # from this distance on a line leads from the mark to its name
_CLEAR = 1.5  # points between two names
# What covering costs, in points of distance: another name, the outside, a mark, a thing of `avoid`; and what
# it costs to stand nearer to another mark.
_NAME, _OUTSIDE, _MARK, _THING, _NEARER = 1e6, 1e5, 400.0, 5.0, 30.0


class Name(NamedTuple):
    """What stands beside the mark at (x, y), in the plot's own coordinates."""

    x: float
    y: float
    text: str
    color: str = style.BLACK
    bold: bool = False


def place(axis: Any, names: Sequence[Name], *, avoid: Any = (), size: float | None = None) -> None:
    """Writes names beside their marks; the figure's layout and the plot's limits must be final.

    Args:
        axis: of the plot.
        names: of all marks; an empty text leaves a mark without a name, which others still avoid. Long names
            are placed first and have the choice.
        avoid: [n, 2] points in the plot's coordinates that names should not cover, such as those of lines.
        size: of the letters, points.
    """
    from matplotlib.patheffects import withStroke

    figure = axis.get_figure()
    pixels = figure.dpi / 72
    to_pixels = axis.transData.transform
    things = to_pixels(np.asarray(avoid, dtype=float).reshape(-1, 2))
    marks = to_pixels(np.array([(name.x, name.y) for name in names], dtype=float).reshape(-1, 2))
    frame = axis.get_window_extent()
    taken: list[np.ndarray] = []
    for name in sorted((name for name in names if name.text), key=lambda one: -len(one.text)):
        at = to_pixels((name.x, name.y))
        text = axis.annotate(
            name.text,
            (name.x, name.y),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=style.SMALL_FONT_SIZE + 0.5 if size is None else size,
            fontweight="bold" if name.bold else "normal",
            color=name.color,
            zorder=6,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )
        extent = text.get_window_extent().size
        found = []
        for distance in _DISTANCES:
            for x, y in _DIRECTIONS:
                # The nearest corner, or the middle of the nearest side, lies that far from the mark.
                low = at + np.array((x, y)) * distance * pixels + (np.array((x, y)) - 1) / 2 * extent
                box = np.array((low, low + extent))
                cost = _cost(box, _CLEAR * pixels, taken, frame, marks, things)
                cost += _NEARER * _is_nearer(box, at, marks)
                found.append((distance + cost, distance, low, box))
        _, distance, low, box = min(found, key=lambda one: one[0])
        text.set_position((low - at) / pixels)
        taken.append(box)
        if distance >= _LED:
            _lead(axis, at, box, name.color)


def _cost(
    box: np.ndarray,
    clear: float,
    taken: Sequence[np.ndarray],
    frame: Any,
    marks: np.ndarray,
    things: np.ndarray,
) -> float:
    low, high = box[0] - clear, box[1] + clear
    names = sum(bool((low < other[1]).all() and (high > other[0]).all()) for other in taken)
    outside = not ((box[0] >= frame.min).all() and (box[1] <= frame.max).all())
    # A mark has a size of its own, about 10 points across.
    reach = 3.5 * clear
    covered = int(((marks > box[0] - reach) & (marks < box[1] + reach)).all(1).sum())
    hidden = int(((things > box[0]) & (things < box[1])).all(1).sum())
    return _NAME * names + _OUTSIDE * outside + _MARK * covered + _THING * hidden


def _is_nearer(box: np.ndarray, at: np.ndarray, marks: np.ndarray) -> bool:
    """Whether the middle of a name is nearer to another mark than to its own, at `at`."""
    middle = box.mean(0)
    return bool((np.linalg.norm(marks - middle, axis=1) < np.linalg.norm(at - middle) - 1e-6).any())


def _lead(axis: Any, at: np.ndarray, box: np.ndarray, color: str) -> None:
    """A thin line from a mark to the nearest point of its name's box."""
    end = np.clip(at, box[0], box[1])
    places = axis.transData.inverted().transform(np.array((at, end)))
    axis.plot(
        *places.T, color=color, linewidth=0.6, alpha=0.7, zorder=1.5, scalex=False, scaley=False, marker=""
    )
