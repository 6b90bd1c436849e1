"""Every picture of the pages has a variant for dark pages, made of it."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("matplotlib")
_spec = importlib.util.spec_from_file_location("dark_pictures", ROOT / "bench" / "dark_pictures.py")
dark_pictures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(dark_pictures)
SHOWN = re.compile(
    r'<picture>\n  <source media="\(prefers-color-scheme: dark\)" srcset="(\S+)_dark\.png">\n'
    r'  <img alt="[^"]+" src="\1\.png">\n</picture>'
)


def test_every_picture_names_both():
    assert len(dark_pictures.pictures()) >= 11
    for page in dark_pictures.PAGES:
        text = page.read_text()
        pairs = len(SHOWN.findall(text))
        assert pairs == len(re.findall(r"\.png[)\"]", text)) / 2, page


@pytest.mark.parametrize("path", dark_pictures.pictures(), ids=lambda path: path.name)
def test_the_dark_one_is_made_of_the_other(path):
    made = dark_pictures.dark(dark_pictures.read(path))
    assert np.array_equal(made, dark_pictures.read(dark_pictures.dark_path(path)))


def test_colours_of_a_dark_page():
    def dark(*color):
        return dark_pictures.dark(np.array([[color]], np.uint8))[0, 0].astype(int)

    white, black, grey, blue = dark(255, 255, 255), dark(0, 0, 0), dark(217, 217, 217), dark(0, 114, 178)
    assert white.max() < 30 and black.min() > 230
    assert white.max() < grey.max() < 100
    assert blue[2] > 200 and blue[2] > blue[0] + 80
