"""The picture of an ablation: accuracy and NFE over its knob."""

from __future__ import annotations

import os
from typing import Any

from blockbatch.evaluation.ablations import ABLATIONS, EVERYTHING
from blockbatch.pictures import style


def draw_ablation(report: dict[str, Any], path: str | os.PathLike) -> None:
    """Accuracy and NFE over the knob, with 95% intervals, as a PNG.

    Raises RuntimeError without matplotlib, ValueError for a path that does not end in .png, OSError.
    """
    rows, tasks = report["rows"], report["tasks"]
    ordered = ABLATIONS[report["kind"]].ordered
    series = [*tasks, EVERYTHING] if len(tasks) > 1 else tasks
    with style.figure(height=2.9) as figure:
        accuracy, nfe = figure.subplots(1, 2)
        for index, name in enumerate(series):
            # Side by side, so that no interval hides another.
            places = [place + (index - (len(series) - 1) / 2) * 0.09 for place in range(len(rows))]
            summaries = [row["summary"][name] for row in rows]
            look = _look(name, index) | ({} if ordered else {"linestyle": "none"})
            _draw_accuracy(accuracy, places, summaries, label=_series_name(name), **look)
            bounds = [(summary["nfe"]["total"], summary["nfe_95"]) for summary in summaries]
            _draw_series(nfe, places, bounds, label=_series_name(name), **look)
        accuracy.set_ylabel("right answers, %")
        nfe.set_ylabel("model forwards (NFE)")
        nfe.set_ylim(bottom=0)
        for axis in (accuracy, nfe):
            axis.set_xlabel(report["title"])
            labels = [row["setting"] + ("*" if row["setting"] == report["default"] else "") for row in rows]
            crowded = sum(map(len, labels)) > 34
            axis.set_xticks(
                range(len(rows)), labels, rotation=35 if crowded else 0, ha="right" if crowded else "center"
            )
            axis.grid(axis="x", visible=False)
        style.note(figure, f"{report['header'].get('model', '')}; *: the default; bars: 95% intervals")
        handles, names = nfe.get_legend_handles_labels()
        style.legend(figure, handles, names, columns=len(series))
        style.save_png(figure, path)


def _look(name: str, index: int) -> dict[str, Any]:
    if name == EVERYTHING:
        return {"color": style.BLACK, "marker": "o", "linewidth": 1.8}
    return {"color": style.PALETTE[index % 6], "marker": "sD^vPX"[index % 6], "linewidth": 1.0}


def _series_name(name: str) -> str:
    return "all tasks" if name == EVERYTHING else name


def _draw_accuracy(axis: Any, places: list[float], summaries: list[dict], **look: Any) -> None:
    judged = [(place, summary) for place, summary in zip(places, summaries) if summary["judged"]]
    values = [
        (100 * summary["accuracy"], tuple(100 * bound for bound in summary["interval_95"]))
        for _, summary in judged
    ]
    _draw_series(axis, [place for place, _ in judged], values, **look)


def _draw_series(axis: Any, places: list[float], values: list[tuple[float, Any]], **look: Any) -> None:
    if not values:
        return
    middle = [value for value, _ in values]
    below = [value - bounds[0] for value, bounds in values]
    above = [bounds[1] - value for value, bounds in values]
    axis.errorbar(places, middle, yerr=[below, above], markersize=4, elinewidth=0.9, capsize=1.8, **look)
