"""The problems that `blockbatch compare` decodes."""

from __future__ import annotations

import argparse

from blockbatch import sandbox
from blockbatch.cli.files import read_text
from blockbatch.tasks import FAMILIES, Problem, built_in_problems, parse_problems

DEFAULT_COUNT, DEFAULT_SEED = 2, 0


def read_problems(options: argparse.Namespace) -> list[Problem]:
    """The problems that the options name: those of a file, or of the built-in families."""
    path = options.prompt_file
    if path is not None:
        for name in ("family", "count", "seed"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name}: expected only without --prompt-file, got both")
        return parse_problems(read_text(path, "--prompt-file"), task="file", where=f"--prompt-file: {path}")
    count = DEFAULT_COUNT if options.count is None else options.count
    seed = DEFAULT_SEED if options.seed is None else options.seed
    families = tuple(dict.fromkeys(options.family or FAMILIES))
    for family in families:
        if family not in FAMILIES:
            raise ValueError(f"--family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    if count < 1:
        raise ValueError(f"--count: expected at least 1, got {count}")
    # Where no program can be run, answers that are programs stay unjudged.
    run_code = sandbox.why_unavailable() is None
    return [
        problem
        for family in families
        for problem in built_in_problems(family, split="test", count=count, seed=seed, run_code=run_code)
    ]
