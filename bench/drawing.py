"""The drawings of docs/how_it_works.md, of real decodes of the built-in model.

    python bench/drawing.py [--out bench/results/pictures]

branches.png: every forward of an answer by BlockBatch, with what each branch came to hold. queries.png: what
a step computes with and without open queries. drafts.png: a step with its drafts, and the commit behind it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import blockbatch
from blockbatch.pictures import states as replayed
from blockbatch.pictures import style
from blockbatch.tracing import trace_header

RESULTS = Path(__file__).parent / "results"
PROMPT = "Compute gcd(36, 15) step by step."
SIZES = (4, 8, 16, 32)
GEN_LENGTH = 64
# Inches: of a cell, of what stands left of the cells, of a heading, and below the last row.
_TALL, _LEFT, _HEAD, _FOOT = 0.15, 1.05, 0.27, 0.34
_LETTERS = 6.2  # points, of a token of one letter
MASK_COLOR, OWN, OWN_OLD = "#ECECEC", style.BLUE, "#BBD9EE"
MERGED, MERGED_OLD = style.ORANGE, "#F7E0B0"
SYNCED, SYNCED_OLD = style.GREEN, "#B9E3D5"
_NOW = {replayed.COMMITTED: OWN, replayed.MERGED: MERGED, replayed.SYNCED: SYNCED}
_OLD = {replayed.COMMITTED: OWN_OLD, replayed.MERGED: MERGED_OLD, replayed.SYNCED: SYNCED_OLD}


class Sheet:
    """Rows of cells below headings, from the top of a figure down; one unit is one inch."""

    def __init__(self, figure: Any, height: float, columns: int) -> None:
        self.columns, self.top, self.height = columns, 0.0, height
        self.wide = (style.PAGE_WIDTH - _LEFT - 0.06) / columns
        figure.set_layout_engine("none")
        self.axis = figure.add_axes((0, 0, 1, 1))
        self.axis.set(xlim=(0, style.PAGE_WIDTH), ylim=(height, 0))
        self.axis.axis("off")

    def heading(self, text: str, more: str = "") -> None:
        """A line of text above rows."""
        self.top += _HEAD
        self.axis.text(0.06, self.top - 0.06, text, fontsize=style.FONT_SIZE, fontweight="bold", va="bottom")
        self.axis.text(
            _LEFT, self.top - 0.06, more, fontsize=style.SMALL_FONT_SIZE + 0.5, color=style.GREY, va="bottom"
        )

    def row(
        self, name: str, colors: Sequence[str], texts: Sequence[str], frame: Sequence[int] | None = None
    ) -> None:
        """A line of cells; `frame` is the start and end of the window."""
        from matplotlib.patches import Rectangle

        self.axis.text(
            _LEFT - 0.08, self.top + _TALL / 2, name, fontsize=style.SMALL_FONT_SIZE, ha="right", va="center"
        )
        for column, (color, text) in enumerate(zip(colors, texts, strict=True)):
            left = _LEFT + column * self.wide
            self.axis.add_patch(
                Rectangle(
                    (left, self.top), self.wide, _TALL, facecolor=color, edgecolor="white", linewidth=0.5
                )
            )
            ink = "white" if color in _DARK else style.BLACK
            size = min(_LETTERS, 72 * self.wide / (0.62 * max(len(text), 1)))
            middle = (left + self.wide / 2, self.top + _TALL / 2)
            self.axis.text(
                *middle, text, fontsize=size, family="monospace", ha="center", va="center", color=ink
            )
        if frame is not None and frame[0] < min(frame[1], self.columns):
            start, end = frame[0], min(frame[1], self.columns)
            corner = (_LEFT + start * self.wide, self.top)
            self.axis.add_patch(
                Rectangle(
                    corner, (end - start) * self.wide, _TALL, fill=False, edgecolor=style.BLACK, linewidth=1.1
                )
            )
        self.top += _TALL + 0.02

    def key(self, entries: Sequence[tuple[str, str]]) -> None:
        """Colours and what they mean, in one line below all rows."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.patches import Rectangle

        at, middle = 0.1, self.height - 0.14
        for color, text in entries:
            self.axis.add_patch(
                Rectangle(
                    (at, middle - 0.06), 0.16, 0.12, facecolor=color, edgecolor=style.GREY, linewidth=0.5
                )
            )
            drawn = self.axis.text(at + 0.2, middle, text, fontsize=style.SMALL_FONT_SIZE, va="center")
            box = drawn.get_window_extent(FigureCanvasAgg(self.axis.figure).get_renderer())
            at += 0.2 + box.width / style.DPI + 0.14


_DARK = {OWN, SYNCED, style.PURPLE, style.BLACK}


def traced(model: blockbatch.Model, **settings: Any) -> dict[str, Any]:
    """The trace of the prompt's decode, with its header."""
    config = blockbatch.DecodeConfig(gen_length=GEN_LENGTH, trace=True, **settings)
    result = blockbatch.generate(model, PROMPT, config)
    return {**trace_header(model, model.tokenizer.encode(PROMPT), config, result), "trace": result.trace}


def pieces(model: blockbatch.Model, tokens: np.ndarray, trace: dict[str, Any]) -> list[str]:
    """What stands in each cell: the token's text, nothing for MASK."""
    mask, ends = trace["mask_token_id"], trace["eos_token_ids"]

    def shown(token: int) -> str:
        if token == mask:
            return ""
        return "EOS" if token in ends else style.visible(model.tokenizer.decode([token]))

    return [shown(int(token)) for token in tokens]


def _happened(record: dict[str, Any], syncs: Sequence[tuple[int, int]]) -> list[str]:
    """What a record says in words: tokens committed and merged, branches synced."""
    found = [
        f"{sum(len(each['positions']) for each in record[name])} {word}"
        for name, word in (("commits", "committed"), ("merges", "merged"))
        if record[name]
    ]
    if syncs:
        moved = ", ".join(str(SIZES[branch]) for branch, _ in syncs)
        found.append(f"block{'s' * (len(syncs) > 1)} {moved} synced to block {SIZES[syncs[0][1]]}")
    return found


def branches(model: blockbatch.Model, path: Path) -> None:
    """Every forward of a decode: what each branch holds behind it, and how it came to that."""
    trace = traced(model, block_sizes=SIZES)
    states = replayed.expand(trace)
    columns = 1 + next(at for at, token in enumerate(trace["canvas"]) if token in trace["eos_token_ids"])
    height = states.num_steps * (_HEAD + 0.17 * states.num_branches) + _FOOT
    with style.figure(height) as figure:
        sheet = Sheet(figure, height, columns)
        for step, phase in enumerate(states.phases):
            record = trace["trace"][step]
            happened = _happened(record, states.syncs[step])
            computed = {
                "init": "first forward, of the whole canvas",
                "refresh": "refresh, of the whole canvas",
            }
            sheet.heading(f"forward {step + 1}", "; ".join([computed.get(phase, "windows"), *happened]))
            for branch, size in enumerate(SIZES):
                now, old = states.change[step, branch], states.origin[step, branch]
                colors = [_NOW.get(new, _OLD.get(kind, MASK_COLOR)) for new, kind in zip(now, old)]
                texts = pieces(model, states.tokens[step, branch, :columns], trace)
                window = states.windows[step, branch] if states.active[step, branch] else None
                sheet.row(f"block {size}", colors[:columns], texts, window)
        entries = [(MASK_COLOR, "MASK"), (OWN, "own commit"), (OWN_OLD, "earlier"), (MERGED, "merged")]
        entries += [(MERGED_OLD, "earlier"), (SYNCED, "synced"), (SYNCED_OLD, "earlier")]
        entries.append(("white", "frame: window"))
        sheet.key(entries)
        style.save_png(figure, path)


def queries(model: blockbatch.Model, path: Path) -> None:
    """One step: what it computes with windows as queries, and with open queries."""
    trace = traced(model, block_sizes=SIZES, query_span="open", refresh_interval=None)
    states = replayed.expand(trace)
    steps = [at for at, record in enumerate(trace["trace"]) if any(record.get("query_stale", []))]

    def saved(step: int) -> int:
        record = trace["trace"][step]
        whole = sum(end - start for start, end in record["windows"])
        return whole - sum(map(len, record["query_positions"]))

    step = max(steps, key=saved)
    record = trace["trace"][step]
    first = min(min(places) for places in record["query_positions"])
    last = max(end for _, end in record["windows"])
    shown = range(max(0, first - 2), last)
    before = states.tokens[step - 1]
    height = 2 * (_HEAD + 0.17 * len(record["rows"])) + _FOOT
    with style.figure(height) as figure:
        sheet = Sheet(figure, height, len(shown))
        for open_queries in (False, True):
            count = sum(
                len(places) if open_queries else window[1] - window[0]
                for places, window in zip(record["query_positions"], record["windows"], strict=True)
            )
            name = 'query_span="open"' if open_queries else 'query_span="window"'
            sheet.heading("open" if open_queries else "window", f"{name}: {count} queries in this step")
            for row, window, places, stale in zip(
                record["rows"],
                record["windows"],
                record["query_positions"],
                record["query_stale"],
                strict=True,
            ):
                asked = set(places) if open_queries else set(range(*window))
                colors = [
                    style.PURPLE if open_queries and at in stale else OWN if at in asked else "white"
                    for at in shown
                ]
                texts = pieces(model, before[row, shown.start : shown.stop], trace)
                frame = [edge - shown.start for edge in window]
                sheet.row(f"block {SIZES[row]}", colors, texts, frame)
        sheet.key(
            [
                (OWN, "computed"),
                (style.PURPLE, "computed once more, with its token"),
                ("white", "not computed"),
                ("white", "frame: window; cells without a letter are MASK"),
            ]
        )
        style.save_png(figure, path)


def drafts(model: blockbatch.Model, path: Path) -> None:
    """A step of the dual cache with its drafts, and what the commit behind it wrote."""
    trace = traced(
        model, method="dual_cache", block_size=32, threshold=0.99, drafts=(1, 2, 3), eos_exit="prefix"
    )
    states, columns = replayed.expand(trace), 32
    steps = [at for at, record in enumerate(trace["trace"]) if record.get("adopted") == 1]
    steps = [at for at in steps if len(trace["trace"][at]["drafts"]) == 3]
    step = max(steps, key=lambda at: trace["trace"][at]["adopted_length"])
    record = trace["trace"][step]
    before, after = states.tokens[step - 1, 0], states.tokens[step, 0]
    start = record["windows"][0][0]
    shown = slice(start, start + columns)
    height = 2 * _HEAD + 0.17 * (2 + len(record["drafts"])) + _FOOT
    held = [OWN_OLD if token != states.mask_token_id else MASK_COLOR for token in before]
    with style.figure(height) as figure:
        sheet = Sheet(figure, height, columns)
        sheet.heading(
            "computed", "one forward: the row, and what it would be with the surest 1, 2 and 3 tokens written"
        )
        sheet.row("the row", held[shown], pieces(model, before[shown], trace))
        for draft in record["drafts"]:
            tokens, colors = before.copy(), list(held)
            tokens[draft["positions"]] = draft["tokens"]
            for at in draft["positions"]:
                colors[at] = MERGED
            sheet.row(f"draft {draft['length']}", colors[shown], pieces(model, tokens[shown], trace))
        length = record["adopted_length"]
        (adopted,) = (draft for draft in record["drafts"] if draft["length"] == length)
        sheet.heading(
            "committed",
            f"just what draft {length} holds: its forward is done, and its tokens are committed, too",
        )
        colors = [SYNCED if old != new else color for old, new, color in zip(before, after, held)]
        for at in adopted["positions"]:
            colors[at] = OWN
        sheet.row("the row", colors[shown], pieces(model, after[shown], trace))
        entries = [(MASK_COLOR, "MASK"), (OWN_OLD, "decoded before"), (MERGED, "written in a draft")]
        sheet.key([*entries, (OWN, "committed"), (SYNCED, "committed by the draft's forward")])
        style.save_png(figure, path)


DRAWN = {"branches": branches, "queries": queries, "drafts": drafts}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "pictures")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model = blockbatch.load_model("tiny", device="cpu")
    for name, draw in DRAWN.items():
        draw(model, options.out / f"{name}.png")
        print(f"drawn: {options.out / name}.png")


if __name__ == "__main__":
    main()
