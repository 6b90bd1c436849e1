"""Texts as they come from callers and files."""

from __future__ import annotations

import codecs
import re

_SURROGATE = re.compile("[\ud800-\udfff]")
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def has_half(text: str) -> bool:
    """Whether `text` holds a lone surrogate, which is half a character."""
    return _SURROGATE.search(text) is not None


def check_text(text: str, name: str) -> None:
    """Raises ValueError if `text` holds a lone surrogate, which is no character and has no token.

    They come from texts that were cut in the middle of a character, and from bytes that are no UTF-8.

    Args:
        text: any.
        name: what the message calls it: an argument, or a file with its line.
    """
    found = _SURROGATE.search(text)
    if found:
        raise ValueError(
            f"{name}: expected text of whole characters, got half of one (the lone surrogate "
            f"U+{ord(found.group()):04X}) at position {found.start()}"
        )


def decode_file(content: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark, as Windows writes it.

    The mark is left out and a line ends with a line feed alone, so that a file is the same text wherever it
    was written.

    Raises:
        UnicodeDecodeError: it is neither.
    """
    encoding = "utf-16" if content.startswith(_UTF16_MARKS) else "utf-8-sig"
    return content.decode(encoding).replace("\r\n", "\n")
