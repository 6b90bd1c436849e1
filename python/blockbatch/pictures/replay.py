"""The replay page: one HTML file that plays a decode step by step and needs nothing but a browser.

The page is what lies in `replay_page/` with the trace written into it. It works out every canvas from the
records itself, so that a file stays small: the records once, and each token's text once.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

from blockbatch.pictures import style
from blockbatch.pictures.states import held_up_to
from blockbatch.tracing import phase

# Confidences are shown with three digits.
_DIGITS = 4


def draw(trace: dict[str, Any], path: str | os.PathLike) -> Path:
    """Writes a loaded trace (`blockbatch.load_trace`) as a page; the file appears whole or not at all.

    Raises:
        ValueError: the path does not end in .html.
        OSError: it cannot be written.
    """
    path = style.check_suffix(path, ".html")
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(page(trace), encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def page(trace: dict[str, Any]) -> str:
    """The page's text."""
    folder = resources.files("blockbatch.pictures") / "replay_page"

    def read(*names: str) -> str:
        return "\n".join(folder.joinpath(name).read_text(encoding="utf-8") for name in names)

    parts = {
        "STYLE": read("page.css", "controls.css", "branches.css", "detail.css"),
        # As references: half a surrogate pair, which JSON can hold, has no place in a file.
        "TITLE": html.escape(_title(trace)).encode("ascii", "xmlcharrefreplace").decode(),
        "DECODE": script_json(_content(trace)),
        "SCRIPT": read("decode.js", "layout.js", "steps.js", "controls.js"),
    }
    # In one pass: what a text of the decode holds is never taken for a place to fill in.
    return re.sub("@([A-Z]+)@", lambda place: parts[place[1]], read("page.html"))


def script_json(content: Any) -> str:
    """JSON that can stand in a script element: plain ASCII without a character that HTML gives a meaning."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    return text


def _title(trace: dict[str, Any]) -> str:
    return " ".join(filter(None, ("Replay:", trace["model"], trace["method"])))


def _content(trace: dict[str, Any]) -> dict[str, Any]:
    settings, ends = trace["settings"], set(trace["eos_token_ids"])
    leaps = "local_leap" in (trace["method"], settings.get("commit"))
    canvas, given = trace["canvas"] or [], trace["given"]
    return {
        "model": trace["model"],
        "method": trace["method"],
        "settings": {
            name: value
            for name, value in settings.items()
            if _shown(value) and (leaps or not name.startswith("leap_"))
        },
        "threshold": _number(settings.get("threshold")),
        "leaps": leaps,
        "prompt": trace["prompt"],
        "promptTokens": len(trace["prompt_tokens"]),
        "text": trace["text"],
        "textTokens": next((i for i, token in enumerate(canvas) if token in ends and not given), len(canvas)),
        "canvas": trace["canvas"],
        "given": given,
        "blockSizes": trace["block_sizes"],
        "winnerBlockSize": trace["winner_block_size"],
        "genLength": trace["gen_length"],
        "mask": trace["mask_token_id"],
        "eos": trace["eos_token_ids"],
        "heldUpTo": held_up_to(trace),
        "stopReason": trace["stop_reason"],
        "seconds": _number(trace["seconds"]),
        "pieces": trace["pieces"],
        "records": [_record(record) for record in trace["trace"]],
    }


def _shown(value: Any) -> bool:
    """Whether a setting is shown: a text, a number, or some of them; not what is left at None."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_shown, value))
    return isinstance(value, str) or _number(value) is not None


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def _record(record: dict[str, Any]) -> dict[str, Any]:
    """The part of a record that the page shows; as lists, since names would be most of the file."""
    return {
        "kind": record["kind"],
        "phase": phase(record),
        "rows": record["rows"],
        "windows": record["windows"],
        "tokens": _number(record.get("packed_tokens")),
        "queries": record.get("queries"),
        "positions": record.get("query_positions"),
        "stale": record.get("query_stale"),
        "drafts": [
            [draft["length"], draft["queries"], draft["positions"], draft["tokens"]]
            for draft in record.get("drafts", [])
        ],
        "adopted": record.get("adopted", 0),
        "adoptedLength": record.get("adopted_length"),
        "commits": [
            [
                change["branch"],
                change["positions"],
                change["tokens"],
                [round(value, _DIGITS) for value in change["confidence"]],
            ]
            for change in record["commits"]
        ],
        "merges": [[change["branch"], change["positions"], change["tokens"]] for change in record["merges"]],
        "syncs": [[sync["branch"], sync["leader"]] for sync in record["syncs"]],
    }
