"""What a user may have meant: names close to the one that was not known, for the end of a message."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# "... expected one of A, B or C, got X": how every list of names is refused.
_REFUSED = re.compile(
    r"expected (?:one of |some of |options among |at most one of )?(?P<choices>.+), got (?P<got>[^,;\s]+)$"
)
_NAME = re.compile(r"[\w.+-]*[A-Za-z][\w.+-]*")


def close(name: str, choices: Iterable[str]) -> str | None:
    """The choice that `name` is most like, written otherwise, begun or misspelt; None: none is like it."""
    by_key = {_key(choice): choice for choice in choices}
    key = _key(name)
    if key in by_key:
        return by_key[key] if by_key[key] != name else None
    begun = [choice for other, choice in by_key.items() if len(key) > 2 and other.startswith(key)]
    if len(begun) == 1:
        return begun[0]
    found = difflib.get_close_matches(key, by_key, n=1)
    return by_key[found[0]] if found else None


def advice(message: str) -> str:
    """ "; did you mean X?" for a message that lists names and tells the one that came; else nothing."""
    refused = _REFUSED.search(message)
    if refused is None:
        return ""
    listed = re.split(r", (?:or |and )?| or ", refused["choices"])
    names = [word.strip("'\"") for word in listed]
    meant = close(refused["got"].strip("'\""), filter(_NAME.fullmatch, names))
    return f"; did you mean {meant}?" if meant else ""


def _key(name: str) -> str:
    return name.lower().replace("_", "-")
