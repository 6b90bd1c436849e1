"""The picture of `clock.py`: right answers against milliseconds of a decode, a panel for each shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clock_settings import BY_LABEL

from blockbatch.pictures import style

_GROUPS = {"published": "as published", "cheaper": "cheaper forwards", "ours": "open queries"}


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes a PNG: filled marks as published, hollow ones with our options, a star for the preset "fast"."""
    right = {line["setting"]: line for line in report["answers"]}
    with style.figure(height=3.2) as figure:
        axes = figure.subplots(1, len(report["sections"]), squeeze=False, sharey=True)[0]
        for axis, section in zip(axes, report["sections"]):
            named: set[str] = set()
            for line in section["settings"]:
                look = _look(line["setting"], right[line["setting"]]["fast"])
                if look["label"] in named:
                    look["label"] = None
                named.add(look["label"])
                accuracy = 100 * right[line["setting"]]["right"] / right[line["setting"]]["problems"]
                axis.plot(line["decode_ms"], accuracy, linestyle="none", **look)
            axis.set_xlim(left=0)
            axis.set_xlabel("milliseconds for an answer (mean)")
            style.title(axis, f"{section['shape']}, prompt of {section['prompt_length']}")
        axes[0].set_ylabel("right answers, %")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        style.save_png(figure, path)


def _look(label: str, fast: bool) -> dict[str, Any]:
    """How a setting is drawn, and what the legend calls its like."""
    row = BY_LABEL[label]
    color, marker = style.method_look(row.method)
    name = style.method_name(row.method)
    if fast:
        return {"color": color, "marker": "*", "markersize": 13, "label": 'preset "fast"', "zorder": 3}
    drafted = ", drafts" if row.without else ""
    filled = row.group == "published"
    return {
        "color": color,
        "marker": "P" if drafted else marker,
        "markersize": 6.5,
        "markerfacecolor": color if filled else "none",
        "label": f"{name}, {_GROUPS[row.group]}{drafted}",
    }
