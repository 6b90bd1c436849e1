"""The records of an evaluation: a JSON object for each decode, in a file that survives a kill at any moment.

The first line is {"run": header}, every other one a `Record`. A line counts once its line break is written;
what stands behind the last line break is the rest of a write that was cut off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not POSIX: nothing keeps a second process out of the file there
    fcntl = None

FORMAT = 1
# Windows would turn line ends and cut off at a control character without O_BINARY, which others lack.
_OPEN = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
# A difference in these does not make it another run.
_FREE = ("command", "started")
_START = b'{"run": '
_MISSING = "nothing"
# What is counted, with full attention and with a block-causal model.
_FORWARDS = ({"init", "block", "refresh", "total"}, {"prefill", "denoise", "store", "total"})


@dataclass(frozen=True)
class Record:
    """One problem decoded with one setting.

    Attributes:
        task, problem: the problem's task and id.
        setting: the setting's label.
        text: the answer up to its first EOS.
        tokens: its length.
        right: whether it solves the problem; None: not judged.
        nfe: model forwards: init, block, refresh, total; of a block-causal model prefill, denoise, store,
            total.
        seconds: of the decode; in a batch its share.
        stop_reason: as of `generation.Result`.
        block_size: of the winning branch.
        prompt: digest of the prompt's token ids.
        adopted: forwards that were taken over from drafts; 0 in files from before there were any.
    """

    task: str
    problem: str
    setting: str
    text: str
    tokens: int
    right: bool | None
    nfe: dict[str, int]
    seconds: float
    stop_reason: str
    block_size: int
    prompt: str
    adopted: int = 0

    @property
    def key(self) -> tuple[str, str, str]:
        """What occurs once in a file: task, problem, setting."""
        return self.task, self.problem, self.setting


@dataclass(frozen=True)
class Run:
    """An evaluation: what it was made with, and its records."""

    header: dict[str, Any]
    records: list[Record]


def read_run(path: str | os.PathLike) -> Run:
    """The finished records of a file, also while it is being written.

    Raises:
        ValueError: it is not such a file; the message names the line.
        OSError: it cannot be read.
    """
    content, _ = _whole_lines(Path(path).read_bytes())
    if not content:
        raise ValueError(f"{path}: expected results of an evaluation, got a file without a whole line")
    return _parse(content, path)


class RecordFile:
    """A file of records, open for more; a context manager that one process holds at a time.

    Args:
        path: made if it is not there, with its folders.
        header: of this run. If the file has one, the two must say the same but for the command.
        fresh: drop what is in the file.

    Attributes:
        run: the header and all records so far, in the order of the file.

    Raises:
        ValueError: the file belongs to another run (the message names the field), or to no run at all.
        OSError: it cannot be written, or another process is writing it.
    """

    def __init__(self, path: str | os.PathLike, header: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.path = Path(path)
        header = json.loads(json.dumps({"format": FORMAT, **header}))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Neither "w", which would empty another process's file, nor "a", which could not cut off a tail.
        self._file = os.fdopen(os.open(self.path, _OPEN, 0o666), "r+b")
        try:
            self._lock()
            self.run = self._resume(header, fresh)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, records: Sequence[Record]) -> None:
        """Adds records; they are on the disk when this returns."""
        self._write("".join(json.dumps(asdict(record)) + "\n" for record in records))
        self.run.records.extend(records)

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{self.path}: expected a file that no one else writes, got one in use") from None

    def _resume(self, header: dict[str, Any], fresh: bool) -> Run:
        content, rest = _whole_lines(self._file.read())
        start = content or rest
        if start[: len(_START)] != _START[: len(start)]:
            raise ValueError(f"{self.path}: expected results of an evaluation, got {start[:40]!r}")
        if content and not fresh:
            run = _parse(content, self.path)
            if difference := _difference(run.header, header):
                field, there, here = difference
                raise ValueError(
                    f"{self.path}: expected results of the same run to go on with, got another {field}: "
                    f"{_brief(there)} there, {_brief(here)} now. Repeat its options, write elsewhere (--out) "
                    "or drop what is there (--fresh)"
                )
            self._file.truncate(len(content))
            self._file.seek(len(content))
            return run
        self._file.seek(0)
        self._file.truncate(0)
        self._write(json.dumps({"run": header}) + "\n")
        return Run(header, [])

    def _write(self, text: str) -> None:
        self._file.write(text.encode("utf-8"))
        self._file.flush()
        os.fsync(self._file.fileno())


def _whole_lines(content: bytes) -> tuple[bytes, bytes]:
    """What ends with the last line break, and the rest."""
    end = content.rfind(b"\n") + 1
    return content[:end], content[end:]


def _parse(content: bytes, path: str | os.PathLike) -> Run:
    first, *lines = content.splitlines()
    header = _object(first, f"{path}, line 1").get("run")
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{path}, line 1: expected the header of an evaluation, got {first[:80]!r}")
    records: dict[tuple[str, str, str], Record] = {}
    for number, line in enumerate(lines, 2):
        record = _record(_object(line, f"{path}, line {number}"), f"{path}, line {number}")
        if record.key in records:
            raise ValueError(f"{path}, line {number}: expected each decode once, got {record.key} again")
        records[record.key] = record
    return Run(header, list(records.values()))


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected a JSON object, got {error}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected a JSON object, got {line[:80]!r}")
    return entry


def _record(entry: dict[str, Any], where: str) -> Record:
    number = (int, float)
    kinds = {"tokens": int, "block_size": int, "seconds": number, "right": (bool, type(None)), "nfe": dict}
    kinds["adopted"] = int
    entry.setdefault("adopted", 0)
    for name in Record.__dataclass_fields__:
        if name not in entry or not isinstance(entry[name], kinds.get(name, str)):
            got = repr(entry.get(name, _MISSING))
            raise ValueError(f"{where}: expected a record with {name}, got {got:.80}")
    nfe = entry["nfe"]
    if set(nfe) not in _FORWARDS or not all(type(n) is int for n in nfe.values()):
        raise ValueError(f"{where}: expected nfe with init, block, refresh and total, got {nfe!r:.80}")
    return Record(**{name: entry[name] for name in Record.__dataclass_fields__})


def _difference(there: Any, here: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first field in which two headers differ, and its two values."""
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return None if there == here else (name, there, here)
    for key in (*here, *(key for key in there if key not in here)):
        if not name and key in _FREE:
            continue
        inner = f"{name}.{key}" if name else key
        if difference := _difference(there.get(key, _MISSING), here.get(key, _MISSING), inner):
            return difference
    return None


def _brief(value: Any) -> str:
    text = value if value == _MISSING else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
