"""On which kinds of tokens the branches of a decode agree (arXiv 2605.29233, Figures 8 and 9).

Three plots over the categories of `token_categories`, from many traces of one setting, with 95% intervals
(what they count is defined in `decisions`):

- the share of positions where all branches agree, of those where at least two decided on their own;
- when they do: how much of the decode has passed;
- how the branches came to the tokens that they hold in the end.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blockbatch.pictures import style
from blockbatch.pictures.decisions import Share, positions, table

_ORIGIN_LOOKS = {"own": (style.BLUE, ""), "merge": (style.ORANGE, "////"), "sync": (style.SKY_BLUE, "....")}


def draw(traces: Sequence[dict[str, Any]], path: str | os.PathLike) -> Path:
    """Draws the three plots of many traces, one for each text, as a PNG.

    Args:
        traces: as `blockbatch.load_trace` returns them; those of a single block size are left out.
        path: of the PNG.

    Returns:
        the path.

    Raises:
        ValueError: no trace of several branches, one without canvas or pieces, or different models or
            settings.
        RuntimeError: matplotlib is missing.
        OSError: the file cannot be written.
    """
    path = style.check_suffix(path, ".png")
    several = [(index, trace) for index, trace in enumerate(traces) if len(trace["block_sizes"]) > 1]
    if not several:
        raise ValueError("traces: expected one of several branches (method blockbatch), got none")
    first = several[0][1]
    texts = []
    for index, trace in several:
        if trace["model"] != first["model"]:
            raise ValueError(
                f"traces: expected decodes by one model, got {trace['model']!r} besides {first['model']!r}"
            )
        if difference := _difference(trace["settings"], first["settings"]):
            raise ValueError(f"traces: expected decodes with the same settings, got {difference}")
        try:
            texts.append(positions(trace))
        except ValueError as error:
            raise ValueError(f"traces[{index}]: {error}") from None
    rows = table(texts)
    if not rows:
        raise ValueError("traces: expected texts of at least one token, got empty ones alone")
    with style.figure(height=1.5 + 0.42 * len(rows)) as figure:
        figure.get_layout_engine().set(wspace=0.06)  # else "1.0" of an axis touches "0.0" of the next
        agreed, when, held = figure.subplots(1, 3, sharey=True)
        _draw_points(agreed, {name: row.agreed for name, row in rows.items()})
        _draw_points(when, {name: row.when for name, row in rows.items()})
        _draw_origins(held, {name: row.origins for name, row in rows.items()})
        agreed.set_yticks(range(len(rows)), rows)
        agreed.set_ylim(len(rows) - 0.45, -0.65)
        # Shares near 1 differ by little, which a scale from 0 on would hide; points may stand on any scale.
        agreed.set_xlim(right=1.0)
        when.set_xlim(0, 1)
        held.set_xlim(0, 1)
        agreed.locator_params(axis="x", nbins=5)
        style.title(agreed, "branches agree")
        style.title(when, "when they do")
        style.title(held, "how a branch got its token")
        agreed.set_xlabel("share of positions decided twice")
        when.set_xlabel("share of the decode (0: init)")
        held.set_xlabel("share of tokens held in the end")
        style.legend(figure, *held.get_legend_handles_labels(), columns=3)
        sizes = ", ".join(map(str, first["block_sizes"]))
        style.note(
            figure,
            f"{len(texts)} {'texts' if len(texts) > 1 else 'text'} by {first['model']}, blocks of {sizes}; "
            "bars: 95% intervals.\nA position is decided twice where two branches wrote a token by "
            "themselves; they agree where all wrote the one that stays.",
        )
        return style.save_png(figure, path)


def _difference(settings: dict[str, Any], first: dict[str, Any]) -> str:
    names = [name for name in {**first, **settings} if settings.get(name) != first.get(name)]
    return ", ".join(f"{name} {settings.get(name)} besides {first.get(name)}" for name in names)


def _draw_points(axis: Any, shares: dict[str, Share | None]) -> None:
    for y, one in enumerate(shares.values()):
        if one is None:
            _note(axis, y, "none")
            continue
        low, high = one.interval
        axis.errorbar(
            one.value,
            y,
            xerr=[[one.value - low], [high - one.value]],
            fmt="o",
            color=style.BLUE,
            capsize=3,
            clip_on=False,
            zorder=3,
        )
        _note(axis, y, f"n = {one.count:,}")
    axis.grid(axis="y", visible=False)


def _draw_origins(axis: Any, rows: dict[str, dict[str, Share] | None]) -> None:
    height = 0.19
    for y, origins in enumerate(rows.values()):
        for index, (name, (color, hatch)) in enumerate(_ORIGIN_LOOKS.items()):
            if origins is None:
                continue
            one = origins[name]
            low, high = one.interval
            axis.barh(
                y + (index - 1) * height + 0.12,
                one.value,
                height,
                xerr=[[one.value - low], [high - one.value]],
                color=color,
                hatch=hatch,
                edgecolor="white",
                linewidth=0,
                error_kw={"elinewidth": 0.9, "capsize": 1.5},
                label=name if y == 0 else None,
            )
        _note(axis, y, "none" if origins is None else f"n = {origins['own'].count:,}")
    axis.grid(axis="y", visible=False)


def _note(axis: Any, y: float, text: str) -> None:
    """A small remark at the left of a row, above its marks."""
    axis.text(
        0.01,
        y - 0.29,
        text,
        transform=axis.get_yaxis_transform(),
        fontsize=style.SMALL_FONT_SIZE - 0.5,
        color=style.GREY,
        va="center",
    )
