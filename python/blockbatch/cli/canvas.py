"""A decode in progress as lines of text: which positions are masked, which are final, which branch leads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from blockbatch.cli.terminal import Span, char_width, escape

if TYPE_CHECKING:
    from blockbatch.decoding import Session
    from blockbatch.models.tokenizer import Tokenizer

# Token ids of neighbouring positions to one piece of text each.
Pieces = Callable[[Sequence[int]], list[str]]


class Glyphs(NamedTuple):
    """The drawn characters.

    Attributes:
        mask, window, end: a MASK, a MASK in the leader's window, the end of the text.
        full, partial, empty: parts of a bar.
        leader, dot: the sign of the leading branch, and what stands between two pieces of a line.
    """

    mask: str
    window: str
    end: str
    full: str
    partial: str
    empty: str
    leader: str
    dot: str


UNICODE = Glyphs("░", "▒", "∎", "█", "▒", "░", "▶", " · ")
ASCII = Glyphs("_", "=", "$", "#", "+", ".", ">", " | ")


class View(NamedTuple):
    """One request of a session, on the host.

    Attributes:
        tokens: [branches][gen_length] ids.
        block_sizes: of the branches.
        leader: the branch that has committed most, the first on a tie.
        window: of the leader, [start, end) in the generation region.
        nfe: forwards so far.
        mask_token_id, eos_token_ids: what the ids mean.
    """

    tokens: list[list[int]]
    block_sizes: list[int]
    leader: int
    window: tuple[int, int]
    nfe: int
    mask_token_id: int
    eos_token_ids: tuple[int, ...]


def read_view(session: Session) -> View:
    """The view of a session's only request; waits for the device."""
    state = session.state
    branches = slice(state.num_rows - len(session.params.drafts))
    decoded = state.decoded[branches].tolist()
    leader = decoded.index(max(decoded))
    return View(
        tokens=state.tokens[branches].tolist(),
        block_sizes=state.block_size[branches].tolist(),
        leader=leader,
        window=(int(state.window_start[leader]), int(state.window_end[leader])),
        nfe=int(state.nfe.sum()),
        mask_token_id=session.params.mask_token_id,
        eos_token_ids=session.params.eos_token_ids,
    )


def token_pieces(tokenizer: Tokenizer | None) -> Pieces:
    """How ids become text: by the tokenizer; as numbers where there is none.

    A character whose bytes are spread over several tokens belongs to the last of them.
    """
    if tokenizer is None:
        return lambda tokens: [f"{token} " for token in tokens]
    from blockbatch.models.tokenizer import IncrementalDecoder

    def pieces(tokens: Sequence[int]) -> list[str]:
        decoder = IncrementalDecoder(tokenizer)
        texts = [decoder.push([token]) for token in tokens]
        if texts:
            texts[-1] += decoder.finish()
        return texts

    return pieces


def canvas_spans(view: View, pieces: Pieces, glyphs: Glyphs) -> list[Span]:
    """The leader's canvas up to its first end of text; the spans' texts may hold line breaks.

    A token is final where all branches hold it: only a sync ever changes what is written, and it copies what
    another branch holds.
    """
    leading = view.tokens[view.leader]
    roles, run, spans = [], [], []

    def flush() -> None:
        spans.extend(Span(role, escape(text).replace("\t", "    ")) for role, text in zip(roles, pieces(run)))
        roles.clear()
        run.clear()

    for position, token in enumerate(leading):
        if token == view.mask_token_id:
            flush()
            inside = view.window[0] <= position < view.window[1]
            spans.append(Span("window", glyphs.window) if inside else Span("mask", glyphs.mask))
            continue
        role = "final" if all(tokens[position] == token for tokens in view.tokens) else "leading"
        if token in view.eos_token_ids:
            flush()
            spans.append(Span(role, glyphs.end))
            break
        run.append(token)
        roles.append(role)
    flush()
    return spans


def wrap(spans: Iterable[Span], width: int) -> list[list[Span]]:
    """Lines of at most `width` columns; a line break in a span starts a new one."""
    lines: list[list[Span]] = [[]]
    used = 0
    for role, neighbours in itertools.groupby(spans, key=lambda span: span.role):
        text = "".join(span.text for span in neighbours)
        start = 0
        for index, char in enumerate(text):
            columns = char_width(char)
            if char != "\n" and used + columns <= width:
                used += columns
                continue
            if index > start:
                lines[-1].append(Span(role, text[start:index]))
            lines.append([])
            start, used = (index + 1, 0) if char == "\n" else (index, columns)
        if len(text) > start:
            lines[-1].append(Span(role, text[start:]))
    return lines


def frame(
    view: View, pieces: Pieces, glyphs: Glyphs, title: str, seconds: float, columns: int, rows: int
) -> list[list[Span]]:
    """The lines of a frame for a terminal of `columns` x `rows`: title, canvas, bars of the branches, status.

    On a small terminal the bars go first, then the title; of a long canvas the part at work is shown.
    """
    several = len(view.tokens) > 1
    width = columns - 1
    held = sum(token != view.mask_token_id for token in view.tokens[view.leader])
    size = view.block_sizes[view.leader]
    status = glyphs.dot.join(
        (
            f"block {size} leads" if several else f"block {size}",
            f"NFE {view.nfe}",
            f"{held} of {len(view.tokens[0])} tokens",
            f"{seconds:.1f} s",
        )
    )
    foot = wrap([Span("title", status)], width)
    head: list[list[Span]] = []
    spare = rows - 1 - len(foot)
    if several and spare >= len(view.tokens) + 6:
        foot = [[], *_bars(view, glyphs, width), *foot]
    if spare >= 6:
        head = [_legend(title, glyphs, several), []]
    spans = canvas_spans(view, pieces, glyphs)
    body = _around_first_mask(wrap(spans, width), max(1, rows - 1 - len(head) - len(foot)))
    return [*head, *body, *foot]


def _legend(title: str, glyphs: Glyphs, several: bool) -> list[Span]:
    legend = [Span("title", title), Span("dim", glyphs.dot), Span("final", "final")]
    if several:
        legend += [Span("dim", glyphs.dot), Span("leading", "leading branch only")]
    window = "its window" if several else "window"
    return [
        *legend,
        Span("dim", f"{glyphs.dot}{glyphs.mask} masked{glyphs.dot}"),
        Span("window", f"{glyphs.window} {window}"),
    ]


def _bars(view: View, glyphs: Glyphs, width: int) -> list[list[Span]]:
    """One line for each branch: its block size and how much of the generation region it holds."""
    length = len(view.tokens[0])
    cells = max(1, min(length, width - 9, 64))
    bars = []
    for branch, (size, tokens) in enumerate(zip(view.block_sizes, view.tokens)):
        bar = ""
        for cell in range(cells):
            part = tokens[cell * length // cells : (cell + 1) * length // cells]
            masks = part.count(view.mask_token_id)
            bar += glyphs.empty if masks == len(part) else glyphs.partial if masks else glyphs.full
        leads = branch == view.leader
        bars.append([Span("title" if leads else "dim", f"{glyphs.leader if leads else ' '}{size:>5}  {bar}")])
    return bars


def _around_first_mask(lines: list[list[Span]], count: int) -> list[list[Span]]:
    """At most `count` neighbouring lines: those where decoding is going on, two thirds of them before it."""
    masked = (
        index for index, line in enumerate(lines) if any(role in ("mask", "window") for role, _ in line)
    )
    focus = next(masked, len(lines) - 1)
    first = max(0, min(focus - count * 2 // 3, len(lines) - count))
    return lines[first : first + count]
