"""The consensus heat map: at which positions the branches agree, forward by forward (after Figure 4 of
arXiv 2605.29233)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from blockbatch.pictures import style
from blockbatch.pictures.states import Agreement, States, agreement, expand

# Image rows of a step; the lower ones show a bifurcation.
_SUBROWS, _MARKED_SUBROWS = 5, 2
# All lengths in inches. The map and what stands beside it are placed by hand: the text of the tokens has to
# meet the columns of the map.
_LEFT, _LANE, _TOP, _BOTTOM, _GAP = 0.55, 0.5, 0.62, 0.48, 0.04
_KEY_HEIGHT, _KEY_ROW = 0.46, 0.24  # of the key, and of its third row
_MAP_WIDTH = style.PAGE_WIDTH - _LEFT - _LANE
_MOST_STEP_HEIGHT, _LEAST_MAP_HEIGHT, _MOST_MAP_HEIGHT = 0.28, 1.2, 6.0
_TOKEN_SIZE, _TOKEN_WIDTH = 6.0, 0.062  # points; what a column needs for a text turned upright
_LETTER = 0.6 * _TOKEN_SIZE / 72  # of a monospaced font
_LONGEST_TOKEN = 14  # letters
_MARGIN = 3  # positions shown behind the end of the text


def draw(trace: dict[str, Any], path: str | os.PathLike, *, whole: bool = False) -> Path:
    """Draws a loaded trace as PNG.

    Args:
        trace: from `blockbatch.load_trace`.
        path: of the file to write.
        whole: show all gen_length positions, also those where no branch ever held text.

    Raises:
        ValueError: the trace has a single branch.
    """
    style.check_suffix(path, ".png")
    states = expand(trace)
    if states.num_branches == 1:
        raise ValueError("consensus: expected a trace of several branches, got one of a single block size")
    end = states.gen_length if whole else shown_positions(trace, states)
    map_height = max(_LEAST_MAP_HEIGHT, min(_MOST_MAP_HEIGHT, _MOST_STEP_HEIGHT * states.num_steps))
    labels = _labels(trace, end)
    strip_height = _LETTER * max(map(len, labels)) + 0.06 if labels else 0.0
    queries = _mean_queries(trace)
    key_height = _KEY_HEIGHT + (0 if queries is None else _KEY_ROW)
    top = _TOP - _KEY_HEIGHT + key_height
    height = top + map_height + _GAP + strip_height + _BOTTOM
    with style.figure(height) as figure:
        figure.set_layout_engine("none")

        def place(left: float, bottom: float, width: float, tall: float, **options: Any) -> Any:
            inches = (left / style.PAGE_WIDTH, bottom / height, width / style.PAGE_WIDTH, tall / height)
            return figure.add_axes(inches, **options)

        strip_bottom = _BOTTOM + strip_height
        heat = place(_LEFT, strip_bottom + _GAP, _MAP_WIDTH, map_height)
        _draw_map(heat, states, agreement(states), end)
        _draw_stale(heat, trace, end)
        lane = place(_LEFT + _MAP_WIDTH, strip_bottom + _GAP, _LANE, map_height, sharey=heat)
        _draw_events(lane, heat, states)
        lowest = heat
        if labels:
            heat.tick_params(labelbottom=False, bottom=False)
            lowest = place(_LEFT, _BOTTOM, _MAP_WIDTH, strip_height, sharex=heat)
            _draw_tokens(lowest, labels)
        left_out = states.gen_length - end
        behind = f"; {left_out} more hold no text" if left_out else ""
        lowest.set_xlabel(f"position in the generation region{behind}")
        key = place(_LEFT, height - top + 0.08, _MAP_WIDTH + _LANE, key_height)
        _draw_key(key, key_height, states.num_branches, queries)
        return style.save_png(figure, path)


def shown_positions(trace: dict[str, Any], states: States) -> int:
    """Positions up to a little behind the last one at which a branch ever held text or the result ends."""
    ends = trace["eos_token_ids"]
    if not ends or trace["given"] is not None:
        return states.gen_length
    held = ~np.isin(states.tokens, [states.mask_token_id, *ends])
    last = max(np.flatnonzero(held.any((0, 1))), default=-1)
    first_end = next((at for at, token in enumerate(trace["canvas"] or []) if token in ends), -1)
    return min(states.gen_length, max(int(last), first_end) + 1 + _MARGIN)


def _draw_map(axis: Any, states: States, found: Agreement, end: int) -> None:
    from matplotlib.colors import to_rgb

    colors = np.array([(1.0, 1.0, 1.0), *style.shades(states.num_branches)])
    image = np.repeat(colors[found.count[:, :end]], _SUBROWS, axis=0)
    marked = np.repeat(found.distinct[:, :end] > 1, _SUBROWS, axis=0)
    marked &= (np.arange(len(marked)) % _SUBROWS >= _SUBROWS - _MARKED_SUBROWS)[:, None]
    image[marked] = to_rgb(style.VERMILLION)
    steps = states.num_steps
    extent = (-0.5, end - 0.5, steps + 0.5, 0.5)
    axis.imshow(image, interpolation="nearest", aspect="auto", extent=extent)
    axis.set_ylabel("forward (NFE)")
    axis.grid(False)
    _integer_ticks(axis.yaxis)
    _integer_ticks(axis.xaxis)
    if steps <= 60:
        for step in range(1, steps):
            axis.axhline(step + 0.5, color="white", linewidth=0.6 if steps <= 20 else 0.3)


def _draw_stale(axis: Any, trace: dict[str, Any], end: int) -> None:
    """With open queries: where some branch computed a position again, since its K/V was of another token."""
    places = [
        (position, step)
        for step, record in enumerate(trace["trace"], 1)
        for position in sorted(set().union(*record.get("query_stale", [])))
        if position < end
    ]
    if places:
        axis.plot(*zip(*places), ".", color=style.PURPLE, markersize=3.5, markeredgewidth=0)


def _mean_queries(trace: dict[str, Any]) -> float | None:
    """Positions that a block step computes in the mean; None without open queries."""
    lengths = [sum(record["queries"]) for record in trace["trace"] if "query_stale" in record]
    return float(np.mean(lengths)) if lengths else None


def _draw_events(axis: Any, heat: Any, states: States) -> None:
    """Marks at the right of the map: which forwards were full ones, and how many branches a sync moved."""
    steps = np.arange(1, states.num_steps + 1)
    refreshes = steps[[phase == "refresh" for phase in states.phases]]
    synced = np.array([len(pairs) for pairs in states.syncs])
    for step in refreshes:
        heat.axhline(step - 0.5, color=style.PURPLE, linewidth=1.2, linestyle=(0, (4, 2)))
    axis.plot(np.zeros(len(refreshes)), refreshes, "D", color=style.PURPLE, markersize=4)
    axis.plot(np.ones(np.count_nonzero(synced)), steps[synced > 0], "o", color=style.GREEN, markersize=4.5)
    if states.num_steps <= 45:
        for step, count in zip(steps, synced, strict=True):
            if count:
                axis.text(1.4, step, str(count), va="center", fontsize=style.SMALL_FONT_SIZE)
    axis.set(xlim=(-0.7, 2.2), xticks=[])
    axis.tick_params(length=0, labelleft=False)
    _bare(axis)


def _draw_key(axis: Any, height: float, num_branches: int, queries: float | None) -> None:
    """What the colours say, in rows above the map; one unit is one inch."""
    from matplotlib.patches import Rectangle

    axis.set(xlim=(0, _MAP_WIDTH + _LANE), ylim=(0, height), xticks=[], yticks=[])
    _bare(axis)
    box, tall, upper = 0.21, 0.16, height - 0.14
    lower = upper - _KEY_ROW
    axis.text(0, upper, "branches that hold the most common token", va="center")
    for count, color in enumerate(["white", *style.shades(num_branches)]):
        corner = (2.72 + count * box, upper - tall / 2)
        axis.add_patch(Rectangle(corner, box, tall, facecolor=color, edgecolor=style.GREY, linewidth=0.5))
        ink = "white" if count > num_branches / 2 else "black"
        middle = (corner[0] + box / 2, upper)
        small = style.SMALL_FONT_SIZE
        axis.text(*middle, str(count), color=ink, ha="center", va="center_baseline", fontsize=small)
    if queries is not None:
        lowest = lower - _KEY_ROW
        axis.plot(box / 2, lowest, ".", color=style.PURPLE, markersize=7)
        told = "computed once more: its K/V was that of another token"
        axis.text(box + 0.07, lowest, f"{told}; {queries:.0f} queries a step, mean", va="center")
    axis.add_patch(Rectangle((0, lower - tall / 4), box, tall / 2, facecolor=style.VERMILLION))
    axis.text(box + 0.07, lower, "bifurcation: branches hold different tokens", va="center")
    for left, marker, color, text in (
        (3.15, "D", style.PURPLE, "refresh"),
        (4.0, "o", style.GREEN, "sync, with the branches it moved"),
    ):
        axis.plot(left, lower, marker, color=color, markersize=4.5)
        axis.text(left + 0.1, lower, text, va="center")


def _draw_tokens(axis: Any, labels: list[str]) -> None:
    for position, label in enumerate(labels):
        upright = {"rotation": 90, "ha": "center", "va": "top", "family": "monospace"}
        axis.text(position, 1.0, label, fontsize=_TOKEN_SIZE, parse_math=False, **upright)
    axis.set(ylim=(0, 1), yticks=[])
    axis.set_ylabel("result", rotation=0, ha="right", va="center")
    _bare(axis)


def _bare(axis: Any) -> None:
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.patch.set_visible(False)


def _labels(trace: dict[str, Any], end: int) -> list[str]:
    """The text of the final tokens; none where they would not fit or are not known."""
    canvas, pieces = trace["canvas"], trace["pieces"]
    if canvas is None or not pieces or end * _TOKEN_WIDTH > _MAP_WIDTH:
        return []
    labels = []
    for token in canvas[:end]:
        if token == trace["mask_token_id"]:
            labels.append("")
        elif token in trace["eos_token_ids"]:
            labels.append("EOS")
        else:
            labels.append(style.visible(pieces.get(token, str(token)))[:_LONGEST_TOKEN])
    return labels


def _integer_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=12, min_n_ticks=1))
