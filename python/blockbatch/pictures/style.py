"""What all plots have in common: colours, sizes, fonts, and how a PNG file is written.

Colours are those of Okabe and Ito (Color Universal Design, 2008), which people with the common kinds of
colour blindness tell apart; every colour that means something comes with a marker of its own. Block sizes are
ordered, so theirs run from dark to light, and prints in grey keep their order.

::

    with style.figure(height=3.0) as figure:
        axis = figure.subplots()
        color, marker = style.method_look("blockbatch")
        axis.plot(nfe, accuracy, color=color, marker=marker, label=style.method_name("blockbatch"))
        style.save_png(figure, "accuracy.png")
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from blockbatch.methods import BLOCK_METHOD_TABLE, BUILT_IN_METHODS, METHOD_TABLE, METHODS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLACK, GREY, LIGHT_GREY = "#000000", "#6E6E6E", "#D9D9D9"
ORANGE, SKY_BLUE, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
# In the order in which series without a colour of their own take them.
PALETTE = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY_BLUE, BLACK, YELLOW)

PAGE_WIDTH = 7.2  # inches; at DPI as many pixels as a page of text shows
DPI = 150
FONT_SIZE, SMALL_FONT_SIZE, TITLE_FONT_SIZE = 8.5, 7.0, 9.5  # points
_NOTE_LETTERS = 118  # of a line of a note across the page
# For counts and shares: dark to light, equal to the colour-blind.
SEQUENTIAL_MAP = "cividis"


class Look(NamedTuple):
    """How a series is drawn."""

    color: str
    marker: str


# Of the methods in their order; the last are for methods to come.
_LOOKS = (
    Look(VERMILLION, "o"),
    Look(BLACK, "X"),
    Look(PURPLE, "^"),
    Look(BLUE, "s"),
    Look(GREEN, "D"),
    Look(ORANGE, "v"),
    Look(SKY_BLUE, "P"),
)
METHOD_LOOKS = dict(zip((*BUILT_IN_METHODS, *BLOCK_METHOD_TABLE), _LOOKS))

# Of the powers of two from 1 on; lightness grows up to 128, and none is too pale for white.
_SIZE_COLORS = (
    "#2B0B3F",
    "#440154",
    "#46327E",
    "#365C8D",
    "#277F8E",
    "#1FA187",
    "#5BB84F",
    "#A5B82A",
    "#D0A92B",
    "#E08A3C",
    "#E0653C",
)
_SIZE_MARKERS = ("P", "X", "v", "<", "s", "o", "D", "^", ">", "p", "h")

_SETTINGS = {
    "font.size": FONT_SIZE,
    "axes.titlesize": TITLE_FONT_SIZE,
    "axes.labelsize": FONT_SIZE,
    "xtick.labelsize": SMALL_FONT_SIZE + 0.5,
    "ytick.labelsize": SMALL_FONT_SIZE + 0.5,
    "legend.fontsize": SMALL_FONT_SIZE + 0.5,
    "legend.framealpha": 0.9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LIGHT_GREY,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def require_matplotlib() -> Any:
    """The module matplotlib.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError(
            f"pictures need matplotlib (pip install 'blockbatch[plots]'), which cannot be imported: {error}"
        ) from None
    return matplotlib


@contextmanager
def figure(height: float, width: float = PAGE_WIDTH) -> Iterator[Figure]:
    """An empty figure of `width` x `height` inches; draw and save it inside the `with`.

    It does not touch pyplot: nothing is left open, and no settings of the caller's change.
    """
    matplotlib = require_matplotlib()
    from cycler import cycler
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_SETTINGS, "axes.prop_cycle": cycler(color=PALETTE)}):
        yield Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def save_png(figure: Figure, path: str | os.PathLike) -> Path:
    """Writes a figure as PNG; the file appears whole or not at all. Returns its path.

    Raises:
        ValueError: the path does not end in .png.
        OSError: it cannot be written.
    """
    path = check_suffix(path, ".png")
    partial = path.with_name(path.name + ".partial")
    try:
        # Without the name and version of the program the same picture is the same file.
        figure.savefig(partial, format="png", dpi=DPI, metadata={"Software": None})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def check_suffix(path: str | os.PathLike, suffix: str) -> Path:
    """`path`, or a ValueError where it does not end in `suffix`."""
    path = Path(path)
    if path.suffix.lower() != suffix:
        raise ValueError(f"path: expected a name that ends in {suffix}, got {str(path)!r}")
    return path


def method_look(method: str) -> Look:
    """Colour and marker of a decoding method, the same in every picture."""
    own = (name for name in METHODS if name not in METHOD_LOOKS)
    looks = METHOD_LOOKS | dict(zip(own, _LOOKS[len(METHOD_LOOKS) :]))
    return looks.get(method, Look(GREY, "*"))


def method_name(method: str) -> str:
    """A method's name as pictures write it."""
    row = METHOD_TABLE.get(method) or BLOCK_METHOD_TABLE.get(method)
    return row.title if row else method


def block_size_look(size: int) -> Look:
    """Colour and marker of a block size, alike in every picture; others round down to a power of two."""
    index = min(int(math.log2(size)), len(_SIZE_COLORS) - 1) if size >= 1 else 0
    return Look(_SIZE_COLORS[index], _SIZE_MARKERS[index])


def note(figure: Figure, text: str) -> None:
    """What a reader has to know of the whole picture, small and grey above it; "\\n" breaks a line."""
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, _NOTE_LETTERS)]
    size = SMALL_FONT_SIZE + 0.5
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=size, color=GREY, linespacing=1.35)


def legend(figure: Figure, handles: Sequence[Any], names: Sequence[str], columns: int) -> None:
    """The key of the whole picture, below it, in so many columns or in fewer where they would not fit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure.figure).get_renderer()
    for count in range(min(columns, max(len(names), 1)), 0, -1):
        key = figure.legend(handles, names, loc="outside lower center", ncols=count, frameon=False)
        if count == 1 or key.get_window_extent(renderer).width <= figure.bbox.width:
            return
        key.remove()


def title(axis: Any, text: str) -> None:
    """A heading at the left edge of a plot."""
    axis.set_title(text, loc="left", fontsize=TITLE_FONT_SIZE)


def shades(count: int) -> list[tuple[float, float, float]]:
    """`count` blues from light to dark, for ordered levels on white."""
    blues = require_matplotlib().colormaps["Blues"]
    return [blues(0.18 + 0.77 * level / max(count - 1, 1))[:3] for level in range(count)]


def visible(piece: str) -> str:
    """A token's text with its whitespace shown; characters that the plots' font lacks become squares."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family="monospace")))
    shown = piece.replace(" ", "\N{OPEN BOX}").replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
    shown = shown.replace("\t", "\N{RIGHTWARDS ARROW}")
    return "".join(mark if font.get_char_index(ord(mark)) else "\N{WHITE SQUARE}" for mark in shown)
