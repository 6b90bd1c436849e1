"""What a terminal shows: widths of characters, text made harmless, and a frame that is redrawn in place."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple, TextIO

# Characters that act on the terminal or on the text around them: controls, formats (directional overrides
# among them), surrogates, line and paragraph separators.
_ACTING = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
WRAP_OFF, WRAP_ON = "\x1b[?7l", "\x1b[?7h"
CLEAR_LINE, CLEAR_BELOW = "\x1b[K", "\x1b[J"

# By role of a span. Without colour what only the leader holds is underlined, which NO_COLOR leaves to us.
COLORS = {"final": "", "leading": "33", "window": "36", "mask": "2", "dim": "2", "title": "1"}
NO_COLORS = {"final": "", "leading": "4", "window": "", "mask": "", "dim": "", "title": ""}


class Span(NamedTuple):
    """Text of one role, a key of `COLORS`."""

    role: str
    text: str


def escape(text: str) -> str:
    """`text` with every character that could act on a terminal written as its code; newline and tab stay."""
    return "".join(_code(char) if _acts(char) else char for char in text)


def _acts(char: str) -> bool:
    return char not in "\n\t" and unicodedata.category(char) in _ACTING


def _code(char: str) -> str:
    point = ord(char)
    return f"\\x{point:02x}" if point < 0x100 else f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}"


def char_width(char: str) -> int:
    """Columns of a character: two for wide East Asian ones, none for combining marks."""
    if unicodedata.category(char) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def paint(span: Span) -> str:
    """The text with its role's style around it; NO_COLOR takes the colours away."""
    style = (NO_COLORS if os.environ.get("NO_COLOR") else COLORS)[span.role]
    return f"\x1b[{style}m{span.text}\x1b[0m" if style else span.text


def clip(spans: Sequence[Span], width: int) -> list[Span]:
    """The part of a line that fits in `width` columns."""
    fitting, used = [], 0
    for span in spans:
        for index, char in enumerate(span.text):
            used += char_width(char)
            if used > width:
                return [*fitting, Span(span.role, span.text[:index])]
        fitting.append(span)
    return fitting


def wants_live(stream: TextIO) -> bool:
    """Whether a stream is a terminal that understands cursor movement."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class Screen:
    """A frame of lines at the bottom of a terminal, redrawn in place; a context manager.

    Every frame turns the cursor and line wrapping back on before it ends, so a process that is stopped or
    killed between two frames leaves the terminal in order.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._widths: list[int] = []  # of the lines that stand there now

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # An interrupt may have cut a frame off in its middle. The frame stays, what follows goes below it.
        self._stream.write("\x1b[0m" + WRAP_ON + SHOW_CURSOR)
        if kind is not None and self._widths:
            self._stream.write("\r\n" + CLEAR_BELOW)
        self._stream.flush()

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows; at least 2 and 2."""
        try:
            columns, rows = os.get_terminal_size(self._stream.fileno())
        except OSError:
            columns, rows = 80, 24
        return max(columns or 80, 2), max(rows or 24, 2)

    def draw(self, lines: Sequence[Sequence[Span]]) -> None:
        """Replaces the frame; lines and characters that do not fit are left out."""
        columns, rows = self.size
        # One column stays free: where a line of full width leaves the cursor differs by terminal.
        lines = [clip(line, columns - 1) for line in lines[: rows - 1]]
        drawn = [CLEAR_LINE + "".join(map(paint, line)) for line in lines] or [CLEAR_LINE]
        frame = self._home(columns, rows) + "\r\n".join(drawn) + CLEAR_BELOW
        self._stream.write(HIDE_CURSOR + WRAP_OFF + frame + WRAP_ON + SHOW_CURSOR)
        self._stream.flush()
        self._widths = [sum(char_width(char) for span in line for char in span.text) for line in lines]

    def erase(self) -> None:
        """Removes the frame; the cursor stands where its first line began."""
        self.draw([])

    def _home(self, columns: int, rows: int) -> str:
        """Moves from the end of the frame to its start; a terminal made narrower has wrapped its lines."""
        if not self._widths:
            return "\r"
        taken = sum(max(1, -(-width // columns)) for width in self._widths) - 1
        up = min(taken, rows - 1)
        return f"\r\x1b[{up}A" if up else "\r"
