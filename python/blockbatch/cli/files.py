"""Reading prompts and writing results."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from blockbatch.cli import ranks
from blockbatch.texts import decode_file


def read_text(path: str, name: str) -> str:
    """The text of a file, or of standard input for "-"; `name` is the option that named it.

    The same text wherever it was written: see `decode_file`.
    """
    if path == "-" and ranks.process()[1] > 1:
        raise ValueError(f"{name}: expected a file, which every process can read, got standard input")
    content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        return decode_file(content)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: expected UTF-8 text, got {path}: {error}") from None


def check_output(path: str, name: str) -> None:
    """Raises before any work if a file cannot be written there later."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{name}: expected a file in an existing folder, got {path}")
    if os.path.isdir(path):
        raise IsADirectoryError(f"{name}: expected a file, got the folder {path}")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{name}: expected a folder that may be written to, got {path}")


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes JSON; the file appears whole or not at all."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text; the file appears whole or not at all."""
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
