"""JSON files of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blockbatch.models.folders import LFS_POINTER
from blockbatch.models.spec import CheckpointError
from blockbatch.texts import decode_file

_POINTER = "a pointer of Git LFS: fetch the file with `git lfs pull`"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; CheckpointError if it does not."""
    try:
        content = json.loads(decode_file(path.read_bytes()))
    except (ValueError, RecursionError) as error:
        came = error if not path.read_bytes().startswith(LFS_POINTER) else _POINTER
        raise CheckpointError(f"{path}: expected JSON, got {came}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {content!r:.80}")
    return content


def read_optional_json(path: Path) -> dict[str, Any]:
    """The same of a file that may be absent: an empty object then."""
    return read_json(path) if path.is_file() else {}
