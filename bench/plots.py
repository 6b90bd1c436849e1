"""Draws the results that lie under bench/results/.

python bench/plots.py [--results bench/results]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import clock_plot
import frontier_plot

from blockbatch.pictures import style

RESULTS = Path(__file__).parent / "results"
_LENGTH = 1280  # the canvas length at which every number of tokens is measured
_STEP = 252
# Line of a report -> how it is drawn.
_EAGER, _OURS, _SHARED, _PRODUCTS, _FLOOR = (
    {"color": style.BLUE, "marker": "s", "linestyle": "--", "label": "plain torch, launched one by one"},
    {"color": style.VERMILLION, "marker": "o", "label": "this engine", "zorder": 3},
    {
        "color": style.GREEN,
        "marker": "D",
        "linestyle": ":",
        "label": "this engine, rows that share pages",
        "zorder": 3,
    },
    {"color": style.ORANGE, "marker": "^", "label": "its matrix products alone (cuBLAS)"},
    {"color": style.BLACK, "marker": "", "label": "floor: least bytes and FLOP"},
)
# Part of a step -> what it is called, and its colour.
_PARTS = {
    "products": ("matrix products", style.ORANGE),
    "attention": ("attention", style.BLUE),
    "norm_rope_swiglu": ("norm, rope, SwiGLU", style.GREEN),
    "lm_head": ("LM head", style.PURPLE),
    "around_the_model": ("around the model", style.VERMILLION),
    "gaps": ("gaps", style.BLACK),
}
_PARTS_NOTE = (
    "Around the model: packing, the decoding policy, and pages shared or copied. Gaps: time in which the GPU "
    "runs nothing.\nBars: canvas of {lengths} positions; rows that share pages, and on pages of their own."
)


def _place(report: dict[str, Any]) -> str:
    return ", ".join(report[name] for name in ("device", "dtype") if name in report)


def step_latency(report: dict[str, Any], path: Path) -> None:
    """Latency of a step against packed tokens, one panel for each model; below it, where the time goes."""
    models = list(dict.fromkeys(line["model"] for line in report["lines"]))
    with style.figure(height=6.6) as figure:
        upper, lower = figure.subfigures(2, 1, height_ratios=(1.05, 1))
        style.note(upper, f"{_place(report)}: a block step, by the tokens that it computes")
        curves = upper.subplots(1, len(models), squeeze=False)[0]
        bars = lower.subplots(1, len(models), squeeze=False, sharey=True)[0]
        for model, curve, bar in zip(models, curves, bars):
            lines = [line for line in report["lines"] if line["model"] == model]
            _curves(curve, lines)
            _bars(bar, lines)
        for axes in (curves, bars):
            axes[0].set_ylabel("ms")
        style.legend(upper, *curves[0].get_legend_handles_labels(), columns=3)
        drawn = next((axis for axis in bars if axis.get_legend_handles_labels()[1]), bars[0])
        style.legend(lower, *drawn.get_legend_handles_labels(), columns=4)
        lengths = dict.fromkeys(str(line["length"]) for line in report["lines"] if "parts_ms" in line)
        style.note(lower, _PARTS_NOTE.format(lengths=", ".join(lengths)))
        style.save_png(figure, path)


def _curves(axis: Any, lines: list[dict[str, Any]]) -> None:
    lengths = {line["length"] for line in lines}
    length = _LENGTH if _LENGTH in lengths else min(lengths)
    at_length = sorted((line for line in lines if line["length"] == length), key=lambda line: line["tokens"])
    separate = [line for line in at_length if line["pages"] == "separate"]
    shared = [line for line in at_length if line["pages"] == "shared" or len(line["branches"]) == 1]
    for chosen, key, look in (
        (separate, "eager_ms", _EAGER),
        (separate, "ours_ms", _OURS),
        (shared, "ours_ms", _SHARED),
        (separate, "products_ms", _PRODUCTS),
        (separate, "floor_ms", _FLOOR),
    ):
        axis.plot([line["tokens"] for line in chosen], [line[key] for line in chosen], markersize=3.5, **look)
    axis.set(xscale="log", yscale="log", xlabel="packed tokens of a step")
    style.title(axis, f"{lines[0]['model']}, canvas of {length}")
    _plain_log_axis(axis, sorted({line["tokens"] for line in at_length}))


def _plain_log_axis(axis: Any, tokens: list[int]) -> None:
    """Ticks where something was measured, upright where they would collide, and plain numbers beside it."""
    from matplotlib import ticker

    axis.set_xticks(tokens, [str(count) for count in tokens], rotation=90)
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def _bars(axis: Any, lines: list[dict[str, Any]]) -> None:
    tokens = _STEP if any(line["tokens"] == _STEP for line in lines) else lines[0]["tokens"]
    chosen = [line for line in lines if line["tokens"] == tokens and "parts_ms" in line]
    places = range(len(chosen))
    bottom = [0.0] * len(chosen)
    for part, (label, color) in _PARTS.items():
        values = [line["parts_ms"][part] for line in chosen]
        axis.bar(places, values, bottom=bottom, label=label, color=color)
        bottom = [low + value for low, value in zip(bottom, values)]
    products = [line["products_ms"] for line in chosen]
    axis.plot(places, products, "_", color=style.BLACK, markersize=17, label="products by cuBLAS alone")
    axis.set_xticks(places, [f"{line['length']}\n{_PAGES[line['pages']]}" for line in chosen])
    axis.grid(axis="x", visible=False)
    style.title(axis, f"{lines[0]['model']}: time of a step of {tokens} tokens")


_PAGES = {"shared": "shared", "separate": "own"}


def refresh(report: dict[str, Any], path: Path) -> None:
    """Latency of a refresh against the number of distinct rows."""
    models = list(dict.fromkeys(line["model"] for line in report["lines"]))
    with style.figure(height=3.3) as figure:
        axes = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
        for model, axis in zip(models, axes):
            lines = [line for line in report["lines"] if line["model"] == model]
            lines = [line for line in lines if line.get("scope", "canvas") == "canvas"]
            rows = [line["distinct_rows"] for line in lines]
            for key, look in (
                ("eager_ms", _EAGER),
                ("ours_ms", _OURS),
                ("products_ms", _PRODUCTS),
                ("floor_ms", _FLOOR),
            ):
                axis.plot(rows, [line[key] for line in lines], markersize=4, **look)
            axis.set(xlabel="rows that differ, of six", ylim=(0, None))
            style.title(axis, f"{model}, {lines[0]['length']} positions a row")
        axes[0].set_ylabel("ms")
        style.note(figure, f"{_place(report)}: a refresh, which computes whole rows")
        style.legend(figure, *axes[0].get_legend_handles_labels(), columns=2)
        style.save_png(figure, path)


DRAWN = {
    "step_latency": step_latency,
    "refresh": refresh,
    "clock": clock_plot.draw,
    "frontier": frontier_plot.draw,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name, draw in DRAWN.items():
        source = options.results / f"{name}.json"
        if source.exists():
            draw(json.loads(source.read_text()), options.results / f"{name}.png")
            print(f"drawn: {options.results / name}.png")


if __name__ == "__main__":
    main()
