"""The picture of `frontier.py`: accuracy against NFE of every setting, a panel for each split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blockbatch.pictures import style

_TITLES = {"held_out": "held-out problems: search", "test": "test problems: confirmed once"}


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes a PNG; one token per step, far to the right, is a dashed line at its accuracy."""
    splits = [split for split in _TITLES if split in report["splits"]]
    looks = _looks(report["chosen"])
    with style.figure(height=3.6) as figure:
        axes = figure.subplots(1, len(splits), squeeze=False)[0]
        for axis, split in zip(axes, splits):
            rows = report["splits"][split]
            for row in rows:
                if row["setting"] == "vanilla":
                    axis.axhline(
                        100 * row["accuracy"],
                        color=style.BLACK,
                        linewidth=1,
                        linestyle="--",
                        label=f"one token per step ({row['nfe']:.0f} NFE)",
                    )
            for name, (color, marker, size, interval) in looks.items():
                chosen = [row for row in rows if _group(row, report["chosen"]) == name]
                _draw_group(
                    axis, chosen, interval, color=color, marker=marker, markersize=size, label=_written(name)
                )
            axis.set_xlabel("model forwards for an answer (NFE, mean)")
            style.title(axis, f"{_TITLES[split]} ({rows[0]['problems']})")
        axes[0].set_ylabel("right answers, %")
        style.note(
            figure,
            "Settings of BlockBatch and the dual cache, all ending with the text. Bars: 95% intervals, of "
            "three alone. The tail threshold is ours; the star was chosen on the held-out problems.",
        )
        style.legend(figure, *axes[0].get_legend_handles_labels(), columns=3)
        style.save_png(figure, path)


_PUBLISHED, _DUAL = "BlockBatch as published", "dual cache, block 32"
_TAIL, _OTHER = "BlockBatch, other tail threshold", "BlockBatch, other option"


def _looks(chosen: str) -> dict[str, tuple[str, str, int, bool]]:
    """Colour, marker, its size and whether the interval is drawn, by group."""
    return {
        _DUAL: (style.BLUE, "s", 6, True),
        _PUBLISHED: (style.VERMILLION, "o", 6, True),
        chosen: (style.GREEN, "*", 11, True),
        _TAIL: (style.SKY_BLUE, "^", 5, False),
        _OTHER: (style.ORANGE, "v", 5, False),
    }


def _group(row: dict[str, Any], chosen: str) -> str | None:
    named = {"blockbatch": _PUBLISHED, "dual_cache": _DUAL, chosen: chosen}
    if row["setting"] in named:
        return named[row["setting"]]
    if "method" in row["options"]:
        return None
    return _TAIL if "tail_threshold" in row["options"] else _OTHER


def _written(name: str) -> str:
    return name.replace("blockbatch", style.method_name("blockbatch")).replace("_", " ")


def _draw_group(axis: Any, rows: list[dict[str, Any]], interval: bool, **look: Any) -> None:
    for row in rows:
        accuracy = 100 * row["accuracy"]
        low, high = (100 * bound for bound in row["accuracy_95"])
        errors = [[accuracy - low], [high - accuracy]] if interval else None
        axis.errorbar(row["nfe"], accuracy, yerr=errors, elinewidth=0.9, linestyle="none", **look)
        look["label"] = None  # once in the legend
