"""The same settings with the built-in model itself, on whatever device it is on: seconds of a decode."""

from __future__ import annotations

from dataclasses import dataclass, field

from clock_settings import Row

import blockbatch
from blockbatch import tiny
from blockbatch.models import Model


@dataclass
class Live:
    """Decodes of one setting: a figure for each problem; `seconds` is the fastest of its repeats."""

    seconds: list[float] = field(default_factory=list)
    nfe: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)


def measure_live(
    model: Model, rows: list[Row], problems: list[tiny.Problem], repeats: int
) -> dict[str, Live]:
    """Decodes every problem by every setting; the settings take turns."""
    found = {row.label: Live() for row in rows}
    for row in rows:  # the first decode of all is slower
        blockbatch.generate(model, problems[0].prompt, row.config())
    for problem in problems:
        results = [
            [blockbatch.generate(model, problem.prompt, row.config()) for row in rows] for _ in range(repeats)
        ]
        for row, own in zip(rows, zip(*results, strict=True), strict=True):
            live = found[row.label]
            live.seconds.append(min(result.seconds for result in own))
            live.nfe.append(own[0].nfe.total)
            live.tokens.append(len(own[0].tokens))
            live.right.append(tiny.check(problem, own[0].text))
    return found
