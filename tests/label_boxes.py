"""Where the texts of a picture stand, as its renderer draws them, and whether one covers another."""

from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from blockbatch.pictures import style


class Box(NamedTuple):
    """A drawn text: the corners of its box in pixels [4, 2], in order around it."""

    text: str
    corners: np.ndarray


def boxes(figure):
    """The boxes of all texts that drawing the figure really draws, turned as the texts are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    drawn, draw = [], Text.draw

    def noting(text, renderer):
        draw(text, renderer)
        if text.get_visible() and text.get_text().strip():
            drawn.append(text)

    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    Text.draw = noting
    try:
        figure.draw(renderer)
    finally:
        Text.draw = draw
    return [_box(text, renderer) for text in drawn]


def _box(text, renderer):
    angle = text.get_rotation()
    text_box = text_extent(text, renderer)
    middle = np.array((text_box.x0 + text_box.x1, text_box.y0 + text_box.y1)) / 2
    text.set_rotation(0)
    upright = text_extent(text, renderer)
    text.set_rotation(angle)
    half = np.array((upright.width, upright.height)) / 2
    corners = half * ((-1, -1), (1, -1), (1, 1), (-1, 1))
    turn = np.deg2rad(angle)
    matrix = np.array(((np.cos(turn), -np.sin(turn)), (np.sin(turn), np.cos(turn))))
    return Box(text.get_text(), middle + corners @ matrix.T)


def text_extent(text, renderer):
    """Of the text alone, without the arrow of an annotation."""
    from matplotlib.text import Text

    return Text.get_window_extent(text, renderer)


def overlap(one, other, slack=1.0):
    """Whether two boxes have more than `slack` pixels in common in every direction."""
    for corners in (one.corners, other.corners):
        for start, end in zip(corners, np.roll(corners, -1, axis=0)):
            along = (end - start) / (np.linalg.norm(end - start) or 1.0)
            a, b = one.corners @ along, other.corners @ along
            if min(a.max(), b.max()) - max(a.min(), b.min()) <= slack:
                return False
    return True


def collisions(figure):
    """What covers what, and what stands outside of the picture, in words."""
    found, wrong = boxes(figure), []
    width, height = figure.get_size_inches() * figure.dpi
    for index, one in enumerate(found):
        if (one.corners < -1).any() or (one.corners > (width + 1, height + 1)).any():
            wrong.append(f"{one.text!r} is cut off")
        wrong += [f"{one.text!r} and {other.text!r}" for other in found[:index] if overlap(one, other)]
    return wrong


@contextmanager
def checked(monkeypatch):
    """Collects the figures that are saved inside; afterwards no text of theirs may cover another."""
    figures, save = [], style.save_png

    def saving(figure, path):
        figures.append((path, collisions(figure), len(boxes(figure))))
        return save(figure, path)

    with monkeypatch.context() as patched:
        patched.setattr(style, "save_png", saving)
        yield figures
    assert figures
    for path, wrong, count in figures:
        assert wrong == [] and count > 5, path
