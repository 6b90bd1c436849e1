"""The figures of README.md and docs/ are those of the files in bench/results."""

import json
import re
from pathlib import Path

import pytest

from docs_figures import FIGURES, WITHOUT_FILE

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
ROWS = [(page, *row) for page, rows in FIGURES.items() for row in rows]
_NUMBER = re.compile(r"(?<![\w.])\d+(?:[.,]\d+)*(?:e-\d+)?(?!\w)")


def text_of(page):
    """A page as one line, without its code blocks, link targets and the names in backticks."""
    text = (ROOT / page).read_text()
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return " ".join(re.sub(r"\]\([^)]*\)", "]", text).split())


def filled(template, files, values):
    loaded = [json.loads((RESULTS / name).read_text()) for name in files]
    return " ".join(template.format(*values(*loaded)).split())


@pytest.mark.parametrize("page, template, files, values", ROWS, ids=[f"{row[0]}: {row[1]}" for row in ROWS])
def test_a_figure_is_that_of_its_file(page, template, files, values):
    assert filled(template, files, values) in text_of(page)


@pytest.mark.parametrize("page", WITHOUT_FILE)
def test_no_figure_is_without_a_file(page):
    text = text_of(page)
    spans = [
        found.span()
        for _, template, files, values in (row for row in ROWS if row[0] == page)
        for found in re.finditer(re.escape(filled(template, files, values)), text)
    ]
    for pattern in (*WITHOUT_FILE[page], r"`[^`]*`"):
        found = list(re.finditer(pattern, text))
        assert found, pattern  # else the pattern is a leftover
        spans += [match.span() for match in found]
    alone = [
        text[max(0, number.start() - 40) : number.end() + 20]
        for number in _NUMBER.finditer(text)
        if not any(start <= number.start() and number.end() <= end for start, end in spans)
    ]
    assert alone == []


def test_a_figure_that_differs_is_found(monkeypatch):
    page, template, files, values = ROWS[0]
    changed = filled(template, files, lambda *loaded: [value + 1 for value in values(*loaded)])
    assert changed not in text_of(page)
