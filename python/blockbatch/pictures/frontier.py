"""Accuracy against forwards: fixed block sizes, BlockBatch, and an oracle that picks the size (Figure 2).

The figure is that of arXiv 2605.29233. The oracle takes, for every problem, one of the decodes with a fixed
block size: of those with the right answer the one with the fewest forwards, and where none is right the one
with the fewest forwards. It bounds what choosing a block size for each problem can reach; no method knows the
answer.

Everything is made of the results of an evaluation (`blockbatch.evaluation.records`). Problems count that all
drawn settings decoded and that were judged.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from blockbatch.evaluation.records import Record, Run
from blockbatch.evaluation.statistics import Interval, bootstrap_mean, wilson
from blockbatch.pictures import labels, style

ORACLE = "oracle"
ALL_TASKS = "all tasks"
_ORACLE_LOOK = style.Look(style.BLACK, "*")
_OWN_COLORS = (style.VERMILLION, style.ORANGE, style.PURPLE, style.GREEN, style.SKY_BLUE)


class Point(NamedTuple):
    """One setting's figures over the problems.

    Attributes:
        label: the setting's, or "oracle".
        block_size: of a setting with a fixed one; else None.
        count: problems.
        accuracy, accuracy_95: share of right answers and Wilson's interval.
        nfe, nfe_95: mean forwards for an answer and a bootstrap interval.
    """

    label: str
    block_size: int | None
    count: int
    accuracy: float
    accuracy_95: Interval
    nfe: float
    nfe_95: Interval


def oracle(records: Sequence[Record]) -> list[Record]:
    """For every problem the record to take; `records` are those of the fixed block sizes."""
    best: dict[tuple[str, str], Record] = {}
    for record in records:
        key = (record.task, record.problem)
        if key not in best or _rank(record) < _rank(best[key]):
            best[key] = record
    return list(best.values())


def _rank(record: Record) -> tuple[bool, int, int]:
    return not record.right, record.nfe["total"], record.block_size


def points(run: Run) -> dict[str, list[Point]]:
    """The points of each task, and of all together if there are several: fixed block sizes in their order,
    BlockBatch's settings, the oracle.

    Raises:
        ValueError: the run lacks two settings that differ in the block size alone, BlockBatch, or problems
            that all of them decoded and that were judged.
    """
    sizes, several = _drawn_settings(run)
    labels = [*sizes, *several]
    by_problem: dict[tuple[str, str], dict[str, Record]] = {}
    for record in run.records:
        if record.setting in labels and record.right is not None:
            by_problem.setdefault((record.task, record.problem), {})[record.setting] = record
    problems = [found for found in by_problem.values() if len(found) == len(labels)]
    if not problems:
        raise ValueError(f"results: expected judged problems that {', '.join(labels)} all decoded, got none")
    tasks: dict[str, list[dict[str, Record]]] = {}
    for found in problems:
        tasks.setdefault(found[labels[0]].task, []).append(found)
    if len(tasks) > 1:
        tasks[ALL_TASKS] = problems
    result = {}
    for task, chosen in tasks.items():
        fixed = [_point(label, size, [found[label] for found in chosen]) for label, size in sizes.items()]
        own = [_point(label, None, [found[label] for found in chosen]) for label in several]
        best = oracle([found[label] for found in chosen for label in sizes])
        result[task] = [*fixed, *own, _point(ORACLE, None, best)]
    return result


def _drawn_settings(run: Run) -> tuple[dict[str, int], list[str]]:
    """Labels of the fixed block sizes with the sizes, ascending, and labels of BlockBatch's settings."""
    settings = run.header.get("settings")
    if not isinstance(settings, dict):
        raise ValueError("results: expected a header with settings, got none")
    several = [label for label, options in settings.items() if options.get("method") == "blockbatch"]
    if not several:
        raise ValueError(f"results: expected a setting of blockbatch, got {', '.join(settings)}")
    groups: dict[str, dict[str, int]] = {}
    for label, options in settings.items():
        if isinstance(options.get("block_size"), int):
            rest = {name: value for name, value in options.items() if name not in ("block_size", "steps")}
            sizes = groups.setdefault(repr(sorted(rest.items())), {})
            # The default rows of a table may repeat a size: the same decodes under another name.
            if options["block_size"] not in sizes.values():
                sizes[label] = options["block_size"]
    group = max(groups.values(), key=len, default={})
    if len(group) < 2:
        raise ValueError(
            "results: expected settings that differ in block_size alone, got none; "
            "`blockbatch eval --methods blockbatch,fixed-blocks` makes them"
        )
    return dict(sorted(group.items(), key=lambda item: item[1])), several


def _point(label: str, block_size: int | None, records: Sequence[Record]) -> Point:
    right, count = sum(bool(record.right) for record in records), len(records)
    forwards = [record.nfe["total"] for record in records]
    return Point(
        label,
        block_size,
        count,
        right / count,
        wilson(right, count),
        sum(forwards) / count,
        bootstrap_mean(forwards),
    )


def draw(run: Run, path: str | os.PathLike) -> Path:
    """Draws the points of a run as a PNG, one plot for each task.

    Raises:
        ValueError: the run lacks settings or judged problems (see `points`), or path does not end in .png.
        RuntimeError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    path = style.check_suffix(path, ".png")
    by_task = points(run)
    columns = len(by_task) if len(by_task) <= 3 else 2
    rows = -(-len(by_task) // columns)
    with style.figure(height=0.6 + (3.1 if rows == 1 else 2.8 * rows)) as figure:
        axes = figure.subplots(rows, columns, squeeze=False)
        for axis in axes.flat[len(by_task) :]:
            axis.set_visible(False)
        for axis, (task, found) in zip(axes.flat, by_task.items()):
            _draw_task(axis, found)
            style.title(axis, f"{task}, {found[0].count} problems")
        for axis in axes[:, 0]:
            axis.set_ylabel("right answers, %")
        for axis in axes[-1]:
            axis.set_xlabel("NFE (mean forwards)")
        style.note(
            figure,
            f"{run.header.get('model', '')}; bars: 95% intervals. A number is the block size of a "
            "decode with that size alone. Oracle: for each problem the best of these sizes, which no method "
            "knows.",
        )
        # Labels stand where the layout leaves the marks.
        figure.draw_without_rendering()
        for axis, found in zip(axes.flat, by_task.values()):
            _label_points(axis, found)
        figure.set_layout_engine("none")
        return style.save_png(figure, path)


def _draw_task(axis: Any, found: Sequence[Point]) -> None:
    from matplotlib.colors import to_rgba
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    fixed = [point for point in found if point.block_size is not None]
    axis.plot(
        [point.nfe for point in fixed],
        [100 * point.accuracy for point in fixed],
        color=style.GREY,
        linewidth=0.8,
        zorder=1,
    )
    for point, (color, marker) in zip(found, _looks(found)):
        (low, high), (least, most) = point.accuracy_95, point.nfe_95
        axis.errorbar(
            point.nfe,
            100 * point.accuracy,
            xerr=[[max(0, point.nfe - least)], [max(0, most - point.nfe)]],
            yerr=[[100 * max(0, point.accuracy - low)], [100 * max(0, high - point.accuracy)]],
            color=color,
            marker=marker,
            markersize=10 if point.label == ORACLE else 6,
            ecolor=to_rgba(color, 0.45),
            elinewidth=0.9,
            capsize=2,
            linestyle="none",
            zorder=2 if point.block_size else 3,
        )
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.margins(x=0.24, y=0.1)


def _looks(found: Sequence[Point]) -> list[style.Look]:
    looks, own = [], 0
    for point in found:
        if point.block_size is not None:
            looks.append(style.block_size_look(point.block_size))
        elif point.label == ORACLE:
            looks.append(_ORACLE_LOOK)
        else:
            looks.append(style.Look(_OWN_COLORS[own % len(_OWN_COLORS)], "o"))
            own += 1
    return looks


def _label_points(axis: Any, found: Sequence[Point]) -> None:
    """Writes each point's name beside it."""
    names = [
        labels.Name(
            point.nfe,
            100 * point.accuracy,
            style.method_name(point.label) if point.block_size is None else str(point.block_size),
            color,
            bold=point.block_size is None,
        )
        for point, (color, _) in zip(found, _looks(found))
    ]
    labels.place(axis, names, avoid=np.concatenate([*map(_cross, found), _line(found)]))


def _cross(point: Point) -> np.ndarray:
    """Points of the two bars of a mark, [48, 2]."""
    x, y = point.nfe, 100 * point.accuracy
    across, along = np.linspace(*point.nfe_95, 24), 100 * np.linspace(*point.accuracy_95, 24)
    return np.vstack((np.column_stack((across, np.full(24, y))), np.column_stack((np.full(24, x), along))))


def _line(found: Sequence[Point]) -> np.ndarray:
    """Points of the line through the fixed block sizes, [n, 2]."""
    fixed = np.array([(point.nfe, 100 * point.accuracy) for point in found if point.block_size is not None])
    parts = [np.linspace(start, end, 24) for start, end in zip(fixed, fixed[1:])]
    return np.concatenate(parts)
