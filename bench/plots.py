"""Draws the results that lie under bench/results/.

python bench/plots.py [--results bench/results]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot, ticker  # noqa: E402

RESULTS = Path(__file__).parent / "results"
_LENGTH = 1280  # the canvas length at which every number of tokens is measured
_STEP = 252
_PARTS = ("products", "attention", "norm_rope_swiglu", "lm_head", "around_the_model", "gaps")


def step_latency(report: dict, path: Path) -> None:
    """Latency of a step against packed tokens, one panel for each model; below it, where the time goes."""
    models = list(dict.fromkeys(line["model"] for line in report["lines"]))
    figure, axes = pyplot.subplots(2, len(models), figsize=(6.5 * len(models), 9), squeeze=False)
    for model, curve, bars in zip(models, *axes):
        lines = [line for line in report["lines"] if line["model"] == model]
        _curves(curve, lines, model, report["device"])
        _bars(bars, lines)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _curves(axis, lines: list[dict], model: str, device: str) -> None:
    lengths = {line["length"] for line in lines}
    length = _LENGTH if _LENGTH in lengths else min(lengths)
    at_length = sorted((line for line in lines if line["length"] == length), key=lambda line: line["tokens"])
    separate = [line for line in at_length if line["pages"] == "separate"]
    shared = [line for line in at_length if line["pages"] == "shared" or len(line["branches"]) == 1]
    for chosen, key, label, style in (
        (separate, "eager_ms", "plain torch, launched one by one", "s--"),
        (separate, "ours_ms", "this engine, separate pages", "o-"),
        (shared, "ours_ms", "this engine, shared pages", "o:"),
        (separate, "products_ms", "its matrix products alone (cuBLAS)", "^-"),
        (separate, "floor_ms", "least bytes and FLOP", "k-"),
    ):
        axis.plot(
            [line["tokens"] for line in chosen], [line[key] for line in chosen], style, label=label, ms=4
        )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="packed tokens of a block step",
        ylabel="ms",
        title=f"{model}, {length} positions, {device}",
    )
    ticks = sorted({line["tokens"] for line in at_length})
    axis.set_xticks(ticks, [str(tick) for tick in ticks], rotation=45)
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _bars(axis, lines: list[dict]) -> None:
    tokens = _STEP if any(line["tokens"] == _STEP for line in lines) else lines[0]["tokens"]
    chosen = [line for line in lines if line["tokens"] == tokens and "parts_ms" in line]
    names = [f"{line['length']}\n{line['pages']}" for line in chosen]
    bottom = [0.0] * len(chosen)
    for part in _PARTS:
        values = [line["parts_ms"][part] for line in chosen]
        axis.bar(names, values, bottom=bottom, label=part.replace("_", " "))
        bottom = [low + value for low, value in zip(bottom, values)]
    axis.plot(names, [line["products_ms"] for line in chosen], "k_", ms=40, label="products by cuBLAS alone")
    axis.set(
        xlabel="positions of the canvas, pages", ylabel="ms", title=f"parts of a step of {tokens} tokens"
    )
    axis.set_ylim(0, 1.4 * max(bottom, default=1.0))
    if chosen:
        axis.legend(fontsize=8, ncols=3, loc="upper center", markerscale=0.3)


def refresh(report: dict, path: Path) -> None:
    """Latency of a refresh against the number of distinct rows."""
    models = list(dict.fromkeys(line["model"] for line in report["lines"]))
    figure, axes = pyplot.subplots(1, len(models), figsize=(5.5 * len(models), 4.5), squeeze=False)
    for model, axis in zip(models, axes[0]):
        lines = [line for line in report["lines"] if line["model"] == model]
        lines = [line for line in lines if line.get("scope", "canvas") == "canvas"]
        rows = [line["distinct_rows"] for line in lines]
        for key, label, style in (
            ("eager_ms", "plain torch, launched one by one", "s--"),
            ("ours_ms", "this engine", "o-"),
            ("products_ms", "its matrix products alone (cuBLAS)", "^-"),
            ("floor_ms", "least bytes and FLOP", "k-"),
        ):
            axis.plot(rows, [line[key] for line in lines], style, label=label, ms=4)
        axis.set(
            xlabel="rows that differ, of six",
            ylabel="ms",
            ylim=(0, None),
        )
        title = f"refresh, {model}, {lines[0]['length']} positions, {report['device']}"
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


DRAWN = {"step_latency": step_latency, "refresh": refresh}


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
