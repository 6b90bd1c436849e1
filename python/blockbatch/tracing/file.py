"""Trace files. Whatever is in one, what `load_trace` returns can be replayed without surprises.

Needs neither torch nor a model.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from blockbatch.texts import decode_file

KINDS = ("init", "block", "refresh")
# Of block-causal models, whose records also say how many positions were `stored` before.
BLOCK_KINDS = ("prefill", "denoise", "block", "sub", "store", "fused")
# Far beyond any model's canvas; a file that claims more would only fill the memory.
_MOST_POSITIONS, _MOST_BRANCHES = 1 << 20, 1 << 10
# What files made without a whole header (by `save_trace` alone) may lack.
_OPTIONAL: dict[str, Any] = {
    "model": "",
    "method": "",
    "settings": {},
    "prompt": None,
    "prompt_tokens": [],
    "eos_token_ids": [],
    "canvas": None,
    "text": None,
    "pieces": {},
    "winner_block_size": None,
    "nfe": None,
    "adopted": None,
    "seconds": None,
    "stop_reason": None,
    "given": None,
}


def load_trace(path: str | os.PathLike) -> dict[str, Any]:
    """A trace file as `blockbatch generate --trace` writes it: `{**header, "trace": records}`, checked.

    Header fields that a file may lack get empty values; the keys of `pieces` become integers.

    Raises:
        ValueError: it is not a trace, or one that contradicts itself; the message names file and place.
        OSError: it cannot be read.
    """
    path = Path(path)
    try:
        content = json.loads(decode_file(path.read_bytes()), parse_constant=_refuse_constant)
        return check_trace(content)
    except UnicodeDecodeError:
        got = "a file that is not text"
    except json.JSONDecodeError as error:
        got = f"a file that is not JSON: {error}"
    except RecursionError:
        got = "JSON that is nested too deeply"
    except ValueError as error:
        got = str(error)
    raise ValueError(f"{path}: expected a trace as `blockbatch generate --trace` saves it, got {got}")


def save_trace(path: str | os.PathLike, trace: list[dict[str, Any]], **header: Any) -> None:
    """Writes `{**header, "trace": trace}` as JSON; the file appears whole or not at all.

    Raises:
        ValueError: it holds NaN or infinity, for which JSON has no word; the message names the place.
        OSError: it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    text = _as_json({**header, "trace": trace})
    if text is None:
        parts = {**header, **{f"record {index}": record for index, record in enumerate(trace)}}
        place = next(name for name, part in parts.items() if _as_json(part) is None)
        raise ValueError(f"trace: expected finite numbers, got NaN or infinity in {place}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def phase(record: dict[str, Any]) -> str:
    """What a record's forward is to pictures: "init", "block" or "refresh".

    Of a block-causal model a prefill is the first, and everything else works on a block.
    """
    if "stored" in record:
        return "init" if record["kind"] == "prefill" else "block"
    return record["kind"]


class _BadTraceError(ValueError):
    """What is wrong in a trace, for the end of a sentence."""


def _refuse_constant(name: str) -> None:
    """For the words NaN, Infinity and -Infinity, which Python reads in JSON unless it is told not to."""
    raise _BadTraceError(f"{name}, which is no number of JSON")


def _as_json(value: Any) -> str | None:
    """None if it holds NaN or infinity."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return None


def check_trace(content: Any) -> dict[str, Any]:
    """The content of a trace file with its optional fields filled in. Raises ValueError; see `load_trace`."""
    if not isinstance(content, dict) or not isinstance(content.get("trace"), list):
        raise _BadTraceError(f"{_brief(content)}, without a list named trace")
    found = {**_OPTIONAL, **content}
    gen_length = _integer(found, "gen_length", 1, _MOST_POSITIONS)
    _integer(found, "mask_token_id", 0)
    sizes = _integers(found, "block_sizes", 1, gen_length)
    if not 0 < len(sizes) <= _MOST_BRANCHES or len(set(sizes)) != len(sizes):
        raise _BadTraceError(f"block_sizes: {_brief(sizes)}")
    _check_header(found)
    if not found["trace"]:
        raise _BadTraceError("no record")
    for index, record in enumerate(found["trace"]):
        try:
            _check_record(record, len(sizes), gen_length, first=index == 0)
        except _BadTraceError as error:
            raise _BadTraceError(f"record {index}: {error}") from None
    return found


def _check_header(found: dict[str, Any]) -> None:
    for name in ("model", "method"):
        if not isinstance(found[name], str):
            raise _BadTraceError(f"{name}: {_brief(found[name])}")
    for name in ("prompt", "text", "stop_reason"):
        if found[name] is not None and not isinstance(found[name], str):
            raise _BadTraceError(f"{name}: {_brief(found[name])}")
    for name in ("prompt_tokens", "eos_token_ids"):
        _integers(found, name, 0)
    if not isinstance(found["settings"], dict):
        raise _BadTraceError(f"settings: {_brief(found['settings'])}")
    if found["canvas"] is not None and len(_integers(found, "canvas", 0)) != found["gen_length"]:
        raise _BadTraceError(f"canvas of {len(found['canvas'])} tokens, gen_length {found['gen_length']}")
    if found["given"] is not None and len(_integers(found, "given", 0)) != found["gen_length"]:
        raise _BadTraceError(f"given: {len(found['given'])} tokens, gen_length {found['gen_length']}")
    if found["winner_block_size"] not in (None, *found["block_sizes"]):
        raise _BadTraceError(f"winner_block_size: {_brief(found['winner_block_size'])}")
    pieces = found["pieces"]
    if not isinstance(pieces, dict) or not all(
        str(token).isdecimal() and isinstance(piece, str) for token, piece in pieces.items()
    ):
        raise _BadTraceError(f"pieces: {_brief(pieces)}")
    found["pieces"] = {int(token): piece for token, piece in pieces.items()}


def _check_record(record: Any, branches: int, gen_length: int, *, first: bool) -> None:
    blocks = isinstance(record, dict) and "stored" in record
    if not isinstance(record, dict) or record.get("kind") not in (BLOCK_KINDS if blocks else KINDS):
        raise _BadTraceError(f"kind: {_brief(record.get('kind') if isinstance(record, dict) else record)}")
    if blocks:
        _integer(record, "stored", 0, _MOST_POSITIONS)
        _integers(record, "input_ids", 0)
    elif first != (record["kind"] == "init"):
        raise _BadTraceError(f"kind {record['kind']}, but init is the first record and no other")
    rows = _integers(record, "rows", 0, branches - 1)
    windows = record.get("windows")
    if not isinstance(windows, list) or len(windows) != len(rows):
        raise _BadTraceError(f"windows: {_brief(windows)} for {len(rows)} rows")
    for window in windows:
        ends = _integers({"window": window}, "window", 0, gen_length)
        if len(ends) != 2 or ends[0] > ends[1]:
            raise _BadTraceError(f"window: {_brief(window)}")
    _check_queries(record, len(rows), gen_length)
    _check_drafts(record, gen_length)
    for name in ("commits", "merges", "syncs"):
        if not isinstance(record.get(name), list):
            raise _BadTraceError(f"{name}: {_brief(record.get(name))}")
        for change in record[name]:
            if not isinstance(change, dict):
                raise _BadTraceError(f"{name}: {_brief(change)}")
            _integer(change, "branch", 0, branches - 1)
    for sync in record["syncs"]:
        _integer(sync, "leader", 0, branches - 1)
    for change in record["commits"] + record["merges"]:
        _check_change(change, gen_length)
    for commit in record["commits"]:
        confidence = commit.get("confidence")
        # A comparison with NaN is false.
        if (
            not isinstance(confidence, list)
            or len(confidence) != len(commit["positions"])
            or not all(type(value) in (int, float) and 0 <= value <= 1.001 for value in confidence)
        ):
            raise _BadTraceError(f"confidence: {_brief(confidence)}")


def _check_change(change: dict[str, Any], gen_length: int) -> None:
    positions = _integers(change, "positions", 0, gen_length - 1)
    if len(_integers(change, "tokens", 0)) != len(positions):
        raise _BadTraceError(f"tokens: {len(change['tokens'])} for {len(positions)} positions")


def _check_queries(record: dict[str, Any], rows: int, gen_length: int) -> None:
    """What older files lack: how many positions were computed for each row, and which, with open queries."""
    if "queries" in record and len(_integers(record, "queries", 0)) != rows:
        raise _BadTraceError(f"queries: {_brief(record['queries'])} for {rows} rows")
    for name, least in (("query_positions", -1), ("query_stale", 0)):
        if name not in record:
            continue
        if not isinstance(record[name], list) or len(record[name]) != rows:
            raise _BadTraceError(f"{name}: {_brief(record[name])} for {rows} rows")
        for positions in record[name]:
            _integers({name: positions}, name, least, gen_length - 1)


def _check_drafts(record: dict[str, Any], gen_length: int) -> None:
    if "drafts" not in record:
        return
    drafts = record["drafts"]
    if not isinstance(drafts, list) or not all(isinstance(draft, dict) for draft in drafts):
        raise _BadTraceError(f"drafts: {_brief(drafts)}")
    for draft in drafts:
        _integer(draft, "length", 1)
        _integer(draft, "queries", 0)
        _check_change(draft, gen_length)
    _integer(record, "adopted", 0, len(drafts))
    lengths = [None, *(draft["length"] for draft in drafts)]
    if record.get("adopted_length") not in lengths:
        raise _BadTraceError(f"adopted_length: {_brief(record['adopted_length'])}")


def _integer(found: dict[str, Any], name: str, least: int, most: int | None = None) -> int:
    return _integers({name: [found.get(name)]}, name, least, most)[0]


def _integers(found: dict[str, Any], name: str, least: int, most: int | None = None) -> list[int]:
    values = found.get(name)
    if not isinstance(values, list):
        raise _BadTraceError(f"{name}: {_brief(values)}")
    for value in values:
        if type(value) is not int or value < least or (most is not None and value > most):
            limit = f"from {least} to {most}" if most is not None else f"of at least {least}"
            raise _BadTraceError(f"{name}: {_brief(value)} where an integer {limit} belongs")
    return values


def _brief(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, list(value)[:6])) or 'nothing'}"
    return f"{value!r:.60}"
