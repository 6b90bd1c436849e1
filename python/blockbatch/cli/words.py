"""What commands say around a table: what will run, about how long, how it went in words, what to try next."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockbatch.cli.table import Row
from blockbatch.cli.terminal import escape

if TYPE_CHECKING:
    import argparse

    from blockbatch.models import Model
    from blockbatch.result import Result
    from blockbatch.tasks import Problem

# Forwards of a decode by any method that commits what it is sure of, and the part of a text of its canvas:
# both only to say about how long a comparison takes.
_FORWARDS, _TEXT_SHARE = 6, 0.5
# What a newcomer may read first of the rows, and what it is compared with.
_TOLD, _REFERENCE = ("fast", "blockbatch"), "vanilla"


def heading(model: Model, problems: Sequence[Problem], rows: Sequence[Row], longest: int) -> str:
    """Two lines before anything is decoded: what, and about how long it takes.

    Args:
        longest: tokens of the longest prompt.
    """
    families = Counter(problem.task for problem in problems)
    parts = ", ".join(f"{count} {family}" for family, count in families.items())
    name = f"{model.name} with {model.adapter}" if model.adapter else model.name
    decodes = len(problems) * len(rows)
    seconds = _estimate(model, rows, longest)
    told = "" if seconds is None else f": about {duration(seconds * len(problems))}"
    return (
        f"{escape(name)} on {model.device} in {model.numbers}, {len(problems)} problems ({parts})\n"
        f"every problem by {len(rows)} methods and settings, {decodes} decodes{told}"
    )


def _estimate(model: Model, rows: Sequence[Row], longest: int) -> float | None:
    """Seconds of a problem by all methods, from one forward; None where that says little."""
    from blockbatch.models.spec import is_block_causal

    if model.device.type != "cpu" or is_block_causal(model.spec):
        return None
    length = longest + rows[0].config.gen_length
    model.logits([0] * min(length, 16))
    begun = time.perf_counter()
    model.logits([0] * length)
    forward = time.perf_counter() - begun
    forwards = 0.0
    for row in rows:
        if row.config.method == _REFERENCE:
            forwards += row.config.gen_length * (1 if row.config.eos_exit == "none" else _TEXT_SHARE)
        else:
            forwards += _FORWARDS
    return forwards * forward


def duration(seconds: float) -> str:
    """A time that is only known roughly."""
    if seconds < 10:
        return "some seconds"
    if seconds < 100:
        return f"{10 * round(seconds / 10)} seconds"
    return f"{max(2, round(seconds / 60))} minutes"


def progress(done: int, total: int, label: str, began: float) -> str:
    """A line of a comparison that runs: how far it is, and how long the rest takes at this rate.

    Args:
        done, total: decodes.
        began: `time.monotonic()` when the first began.
    """
    bar = "#" * (20 * done // total)
    spent = time.monotonic() - began
    left = f", about {duration(spent * (total - done) / done)} left" if done and spent > 2 else ""
    return f"[{bar:<20}] {done} of {total} decodes{left}: {label}"


def verdict(rows: Sequence[Row]) -> str | None:
    """What the table says of the method that a newcomer should look at first; None without a comparison."""
    by_label = {row.label: row for row in rows}
    label = next((label for label in _TOLD if label in by_label), None)
    if label is None or _REFERENCE not in by_label:
        return None
    row, reference = by_label[label], by_label[_REFERENCE]
    judged = [value for value in row.right if value is not None]
    right = ""
    if judged:
        other = sum(value is True for value in reference.right)
        right = f"{label} has {sum(judged)} of {len(judged)} right, {_REFERENCE} {other}.\n"
    return (
        f"{right}Its answers take {row.nfe:.1f} forwards in place of {reference.nfe:.1f}, and are there "
        f"{reference.seconds / row.seconds:.0f} times as fast."
    )


def next_command(model: Model, problems: Sequence[Problem], options: argparse.Namespace) -> str:
    """One line: a decode of one of the problems, live."""
    from blockbatch.models.spec import is_block_causal

    command = "blockbatch" if shutil.which("blockbatch") else f"{shlex.quote(sys.executable)} -m blockbatch"
    named = f" --model {shlex.quote(options.model)}" if options.model != "tiny" else ""
    named += f" --adapter {shlex.quote(options.adapter)}" if options.adapter else ""
    named += " --chat" if options.chat else " --bos" if options.bos else ""
    preset = "" if is_block_causal(model.spec) else " --preset fast"
    prompt = escape(shlex.quote(min((problem.prompt for problem in problems), key=len)))
    given = f"{named}{preset} --gen-length {options.gen_length}"
    return f"Try next, one answer while it denoises: {command} generate {prompt}{given}"


def why_empty(model: Model, result: Result) -> str | None:
    """Why an answer shows nothing; None if it shows something."""
    if result.text is None or result.text.strip():
        return None
    if result.tokens:
        return f"the answer shows nothing: its {len(result.tokens)} tokens are spaces, or special ones"
    if result.stop_reason == "stop":
        return "the answer is empty: it begins with a stop sequence"
    built_in = (
        ". The built-in model knows three kinds of problems; `blockbatch compare --show` prints one"
        if model.name.startswith("tiny")
        else ""
    )
    return f"the answer is empty: the model ends its text with the first token{built_in}"
