"""What kind of text a token is: digits, a word, punctuation, whitespace or a keyword.

The rule looks at the token in its text, so that pieces of a longer word count as that word:

1. The text is cut in units: runs of whitespace; numbers (`12`, `3.14`, `1,000`); runs of letters, digits and
   underscores; every other character alone. A number's unit is *digits*, a run's is *words* (`x1`, `3rd`,
   `total`), or *keywords* where it is one; every other character's is *punctuation*.
2. A token is whitespace if it holds nothing else. Otherwise it is of the kind to which most of its
   characters besides whitespace belong; on a tie the first of keywords, words, digits, punctuation.
3. Words are keywords only in text that is code or data: Python's keywords where a line of the text looks
   like Python (`def f(`, `import m`, `return ...`, `if ...:`), the literals `true`, `false` and `null` where
   the text begins like JSON, with `{` or `[`. In prose "is", "not" and "for" are words.

A token without text of its own (a part of a character's bytes) belongs to no kind.
"""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Sequence

CATEGORIES = ("digits", "words", "punctuation", "whitespace", "keywords")

_UNIT = re.compile(r"(?P<whitespace>\s+)|(?P<digits>\d+(?:[.,]\d+)*(?!\w))|(?P<words>\w+)|(?P<punctuation>.)")
_ON_A_TIE = ("keywords", "words", "digits", "punctuation")
_PYTHON = re.compile(
    r"^\s*(?:def \w+\s*\(|class \w+.*:|import \w|from \S+ import\b|return\b"
    r"|(?:if|elif|for|while|with)\b.*:\s*$)",
    re.MULTILINE,
)
_PYTHON_KEYWORDS = frozenset(keyword.kwlist)
_JSON_LITERALS = frozenset(("true", "false", "null"))
# What a decoder writes for bytes that are no whole character.
_NO_CHARACTER = "\ufffd"


def categories(pieces: Sequence[str]) -> list[str | None]:
    """The kind of each token of one text, of `CATEGORIES`; None where a token has no text of its own.

    Args:
        pieces: the tokens' texts in their order; joined they are the text.
    """
    text = "".join(pieces)
    keywords = _keywords(text)
    kinds: list[str] = []
    for unit in _UNIT.finditer(text):
        kind = "keywords" if unit.group() in keywords else unit.lastgroup
        kinds += [kind] * len(unit.group())
    found, start = [], 0
    for piece in pieces:
        found.append(_majority(piece, kinds[start : start + len(piece)]))
        start += len(piece)
    return found


def _majority(piece: str, kinds: list[str]) -> str | None:
    if not piece.strip(_NO_CHARACTER):
        return None
    counts = Counter(kind for kind in kinds if kind != "whitespace")
    if not counts:
        return "whitespace"
    return max(_ON_A_TIE, key=lambda kind: counts[kind])  # the first of equal ones


def _keywords(text: str) -> frozenset[str]:
    if _PYTHON.search(text):
        return _PYTHON_KEYWORDS
    return _JSON_LITERALS if text.lstrip()[:1] in ("{", "[") else frozenset()
