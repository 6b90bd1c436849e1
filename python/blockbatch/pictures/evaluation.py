"""The picture of an evaluation: accuracy against forwards and against time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from blockbatch.evaluation.settings import EOS_SUFFIX
from blockbatch.evaluation.statistics import Summary
from blockbatch.pictures import style

_OWN_MARKERS = ("*", "P", "X", "v", "<", ">", "h", "p")
_OWN_COLORS = (style.ORANGE, style.SKY_BLUE, style.YELLOW, style.GREY)


def draw(
    summaries: dict[str, Summary], methods: dict[str, str], path: str | os.PathLike, *, title: str
) -> Path:
    """Writes a PNG of accuracy against NFE and against seconds, each with its 95% interval.

    Args:
        summaries: of each setting; those of which nothing was judged are left out.
        methods: the method of each setting.
        path: ends in .png.
        title: what stands above.

    Raises:
        ValueError: no setting was judged.
        RuntimeError: matplotlib is not installed.
        OSError: it cannot be written.
    """
    shown = {label: summary for label, summary in summaries.items() if summary.accuracy is not None}
    if not shown:
        raise ValueError("summaries: expected at least one setting with judged answers, got none")
    looks = _looks(list(shown), methods)
    with style.figure(height=3.6) as figure:
        axes = figure.subplots(1, 2, sharey=True)
        for axis, mean, interval, name in (
            (axes[0], _nfe, lambda summary: summary.nfe_95, "forwards for an answer (NFE, mean)"),
            (axes[1], _time, lambda summary: summary.seconds_95, "seconds for an answer (mean)"),
        ):
            for label, summary in shown.items():
                _point(axis, summary, mean(summary), interval(summary), looks[label], label)
            _log_axis(axis, [bound for summary in shown.values() for bound in interval(summary)])
            axis.set_xlabel(name)
        axes[0].set_ylabel("right answers, %")
        style.note(
            figure,
            f"{title}; bars: 95% intervals\n"
            "hollow: as published, the canvas is filled; full: decoding ends with the text",
        )
        handles, labels = axes[0].get_legend_handles_labels()
        markers = [handle.lines[0] for handle in handles]  # without their intervals
        most = max(summary.count for summary in shown.values())
        counts = {label: shown[label].count for label in labels}
        labels = [f"{x} ({counts[x]} problems)" if counts[x] < most else x for x in labels]
        style.legend(figure, markers, labels, columns=5)
        return style.save_png(figure, path)


def _nfe(summary: Summary) -> float:
    return summary.nfe["total"]


def _time(summary: Summary) -> float:
    return summary.seconds


def _looks(labels: list[str], methods: dict[str, str]) -> dict[str, tuple[str, str, bool]]:
    """Colour, marker and whether it is filled: rows as published are hollow."""
    looks = {}
    own = 0
    for label in labels:
        method = methods[label]
        if label in (method, method + EOS_SUFFIX):
            color, marker = style.method_look(method)
            filled = label != method or method == "blockbatch"
            looks[label] = (color, marker, filled)
        else:
            looks[label] = (_OWN_COLORS[own % len(_OWN_COLORS)], _OWN_MARKERS[own % len(_OWN_MARKERS)], True)
            own += 1
    return looks


def _point(
    axis: Any,
    summary: Summary,
    x: float,
    x_interval: tuple[float, float],
    look: tuple[str, str, bool],
    label: str,
) -> None:
    from matplotlib.colors import to_rgba

    color, marker, filled = look
    y = 100 * summary.accuracy
    low, high = (100 * bound for bound in summary.interval_95)
    axis.errorbar(
        x,
        y,
        xerr=[[max(0.0, x - x_interval[0])], [max(0.0, x_interval[1] - x)]],
        yerr=[[max(0.0, y - low)], [max(0.0, high - y)]],
        color=color,
        marker=marker,
        markersize=6.5,
        markerfacecolor=color if filled else "white",
        ecolor=to_rgba(color, 0.45),
        elinewidth=0.9,
        zorder=3,
        linestyle="none",
        label=label,
    )


def _log_axis(axis: Any, bounds: list[float]) -> None:
    """A logarithmic axis whose ticks are plain numbers, also over less than a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_xscale("log")
    axis.set_xlim(min(bounds) / 1.25, max(bounds) * 1.25)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
