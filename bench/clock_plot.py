"""The picture of `clock.py`: right answers against milliseconds of a decode, a panel for each shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clock_settings import BY_LABEL, FAST, Row

from blockbatch.methods import PRESET_TABLE
from blockbatch.pictures import labels, style

_GROUPS = {
    "published": "as published",
    "cheaper": "cheaper forwards",
    "ours": "open queries",
}
# What a reader calls them.
_SHAPES = {"llada-8b": "LLaDA-8B", "dream-7b": "Dream-7B"}
_METHODS = {"dual_cache": "Fast-dLLM"}
_STAR = 13  # points


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes a PNG: filled marks as published, hollow ones with our options, a star for the preset "fast"."""
    right = {line["setting"]: line for line in report["answers"]}
    with style.figure(height=3.6) as figure:
        axes = figure.subplots(1, len(report["sections"]), squeeze=False, sharey=True)[0]
        names = []
        for axis, section in zip(axes, report["sections"]):
            named: set[str] = set()
            names.append([])
            for line in section["settings"]:
                look = _look(line["setting"], right[line["setting"]]["fast"])
                if look["label"] in named:
                    look["label"] = None
                named.add(look["label"])
                accuracy = 100 * right[line["setting"]]["right"] / right[line["setting"]]["problems"]
                axis.plot(line["decode_ms"], accuracy, linestyle="none", **look)
                name, color = _name(BY_LABEL[line["setting"]]), look["color"]
                names[-1].append(
                    labels.Name(line["decode_ms"], accuracy, name, color, bold=name in PRESET_TABLE)
                )
            axis.set_xlim(left=0)
            axis.margins(y=0.22)
            axis.set_xlabel("milliseconds for an answer (mean)")
            shape = _SHAPES.get(section["shape"], section["shape"])
            style.title(axis, f"{shape}, prompt of {section['prompt_length']}")
        axes[0].set_ylabel("right answers, %")
        style.note(figure, _told(report))
        style.legend(figure, *axes[0].get_legend_handles_labels(), columns=3)
        # Names stand where the layout leaves the marks.
        figure.draw_without_rendering()
        for axis, found in zip(axes, names):
            labels.place(axis, found)
        figure.set_layout_engine("none")
        style.save_png(figure, path)


def _told(report: dict[str, Any]) -> str:
    problems = max(line["problems"] for line in report["answers"])
    told = [report["device"]] if "device" in report else []
    told += [
        f"{problems} problems",
        "cheaper forwards, open queries and drafts are ours",
    ]
    widths = [high - low for low, high in (line["accuracy_95"] for line in report["answers"])]
    chance = all(line["p_value"] is None or line["p_value"] >= 0.05 for line in report["answers"])
    sure = f"95% intervals of right answers: {50 * max(widths):.0f} points to either side"
    return (
        "; ".join(told) + "\n" + sure + ("; no difference is more than chance would give" if chance else "")
    )


def _name(row: Row) -> str:
    """The preset that a setting is, which stands beside its mark; else the legend says what it is."""
    if row.label == FAST:
        return "fast"
    for name, preset in PRESET_TABLE.items():
        options = {option: value for option, value in preset.options.items() if option != "eos_exit"}
        if not preset.published and options == row.options:
            return name
    return ""


def _look(label: str, fast: bool) -> dict[str, Any]:
    """How a setting is drawn, and what the legend calls its like; large marks lie below small ones."""
    row = BY_LABEL[label]
    color, marker = style.method_look(row.method)
    name = _METHODS.get(row.method, style.method_name(row.method))
    if fast:
        look = {"marker": "*", "markersize": _STAR, "label": 'preset "fast"', "zorder": 2}
        return {"color": color, "markerfacecolor": color, **look}
    drafted = ", drafts" if row.without else ""
    filled = row.group == "published"
    return {
        "color": color,
        "marker": "P" if drafted else marker,
        "markersize": 6.5,
        # White inside and edged: what lies below stays to be seen around it.
        "markerfacecolor": color if filled else "white",
        "label": f"{name}, {_GROUPS[row.group]}{drafted}",
        "zorder": 3 if filled else 4,
    }
