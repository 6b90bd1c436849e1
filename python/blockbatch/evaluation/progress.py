"""How far an evaluation is and what time is left: in place on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple, TextIO

# Seconds between two lines where there is no terminal, and between two drawings where there is one.
_LINE_INTERVAL, _DRAW_INTERVAL = 30.0, 0.1
_BAR = 24


class Progress(NamedTuple):
    """How far an evaluation is.

    Attributes:
        done, total: decodes of this process.
        activity: what comes next.
        seconds_left: by what the decodes of each setting took so far; None before each has been seen.
    """

    done: int
    total: int
    activity: str
    seconds_left: float | None


class Clock:
    """Counts decodes and guesses the time left: those of one setting take about as long as each other.

    Args:
        pending: decodes to do, by setting.
        known: setting and seconds of decodes that were done before.
        show: takes every `Progress`; None: nobody looks.
    """

    def __init__(
        self,
        pending: Mapping[str, int],
        known: Iterable[tuple[str, float]] = (),
        show: Callable[[Progress], None] | None = None,
    ) -> None:
        self._show = show
        self._pending = Counter(pending)
        self._done, self._total = 0, sum(pending.values())
        self._seconds: Counter[str] = Counter()
        self._decodes: Counter[str] = Counter()
        for label, seconds in known:
            self._seconds[label] += seconds
            self._decodes[label] += 1

    def add(self, label: str, count: int, seconds: float) -> None:
        """`count` decodes of a setting are done, which took `seconds` together."""
        self._seconds[label] += seconds
        self._decodes[label] += count
        self._pending[label] -= count
        self._done += count

    def tell(self, activity: str) -> None:
        """Shows what comes next, unless there was nothing to do from the start."""
        if self._show is not None and self._total:
            self._show(Progress(self._done, self._total, activity, self._seconds_left()))

    def _seconds_left(self) -> float | None:
        left = 0.0
        for label, count in self._pending.items():
            if not count:
                continue
            if not self._decodes[label]:
                return None
            left += count * self._seconds[label] / self._decodes[label]
        return left


@contextmanager
def progress_bar(stream: TextIO, name: str = "eval") -> Iterator[Callable[[Progress], None]]:
    """A function that shows each `Progress` on `stream`; the line of a terminal is gone at the end."""
    live = stream.isatty()
    shown, last = 0, float("-inf")

    def show(progress: Progress) -> None:
        nonlocal shown, last
        now = time.monotonic()
        finished = progress.done == progress.total
        if now - last < (_DRAW_INTERVAL if live else _LINE_INTERVAL) and not finished:
            return
        last = now
        if live:
            text = _line(progress, stream)
            stream.write("\r" + text.ljust(shown))
            shown = len(text)
        else:
            stream.write(f"{name}: {_counts(progress)}, next {progress.activity}\n")
        stream.flush()

    try:
        yield show
    finally:
        if shown:
            stream.write("\r" + " " * shown + "\r")
            stream.flush()


def _line(progress: Progress, stream: TextIO) -> str:
    try:
        columns = os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        columns = 80
    filled = _BAR * progress.done // max(1, progress.total)
    bar = "#" * filled + "." * (_BAR - filled)
    return f"[{bar}] {_counts(progress)}  {progress.activity}"[: max(1, columns - 1)]


def _counts(progress: Progress) -> str:
    left = "" if progress.seconds_left is None else f", {duration(progress.seconds_left)} left"
    return f"{progress.done}/{progress.total}{left}"


def duration(seconds: float) -> str:
    """Seconds as a person writes them: 42 s, 3:05 min, 2:10 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"
