"""Runs that are recorded and go on when they are started again: what `eval` and `ablate` share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockbatch.cli.arguments import check_bos, load, names
from blockbatch.evaluation.progress import progress_bar
from blockbatch.tasks import FAMILIES, Problem, load_task

if TYPE_CHECKING:
    from blockbatch.evaluation.records import Run
    from blockbatch.evaluation.settings import Setting

# Meant to keep an evaluation of the built-in model under a quarter of an hour on two cores.
BUILT_IN_LIMIT = 34
BUILT_IN_LENGTH, DEFAULT_LENGTH = 128, 256


def add_problems(parser: argparse.ArgumentParser) -> None:
    """The options that `read_problems` reads."""
    group = parser.add_argument_group("problems")
    group.add_argument(
        "--tasks",
        type=names,
        metavar="A,B",
        help="arithmetic, code, symbolic (the built-in model's, default), humaneval, gsm8k, gsm8k-5shot, or "
        'JSONL files with {"prompt": ..., "answer": ...}',
    )
    group.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help=f"problems of each task ({BUILT_IN_LIMIT} of a built-in one, all of others)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="draws built-in problems (0)")
    group.add_argument(
        "--split", default="test", help="test (default); built-in tasks also have held_out and train"
    )
    group.add_argument(
        "--run-code",
        action="store_true",
        help="run the code that the model writes, in a sandbox; without it, code is not judged",
    )
    group.add_argument(
        "--accept-weaker-sandbox",
        action="store_true",
        help="with --run-code: also where this system cannot cut the code off",
    )


def add_lengths(group: Any) -> None:
    """The options of any recorded run about how it decodes."""
    group.add_argument(
        "--gen-length",
        type=int,
        metavar="N",
        help=f"tokens to generate ({BUILT_IN_LENGTH} for built-in tasks, {DEFAULT_LENGTH} otherwise)",
    )
    group.add_argument("--batch-size", type=int, default=1, metavar="N", help="problems decoded at once (1)")


def add_output(parser: argparse.ArgumentParser, folder: str) -> None:
    """The options of any recorded run about what it writes; `folder` is the default, which help shows."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out",
        metavar="FOLDER",
        help=f"for results.jsonl, report.md, report.png and summary.json ({folder})",
    )
    group.add_argument("--fresh", action="store_true", help="drop the results that are there")
    group.add_argument("--traces", metavar="FOLDER", help="save the trace of every decode there")


def default_length(tasks: Sequence[str]) -> int:
    """Tokens to generate for these tasks where nothing else says it."""
    return BUILT_IN_LENGTH if set(tasks) <= set(FAMILIES) else DEFAULT_LENGTH


def output_folder(options: argparse.Namespace, default: str) -> Path:
    """Where the run writes; raises NotADirectoryError if a file is in its place."""
    folder = Path(options.out or default)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--out: expected a folder, got the file {folder}")
    return folder


def decode_recorded(
    options: argparse.Namespace,
    tasks: Sequence[str],
    settings: Sequence[Setting],
    folder: Path,
    header: dict[str, Any],
    name: str = "eval",
) -> Run:
    """Decodes the problems of `tasks` by all settings into the folder's results.jsonl, or goes on with it."""
    from blockbatch.evaluation import runner

    check_bos(options)
    problems = read_problems(options, tasks)
    model = load(options)
    path = folder / "results.jsonl"
    try:
        with progress_bar(sys.stderr, name) as show:
            return runner.run(
                model,
                problems,
                settings,
                path,
                batch_size=options.batch_size,
                chat=options.chat,
                bos=options.bos,
                traces=options.traces,
                progress=show,
                fresh=options.fresh,
                header={
                    "split": options.split,
                    "seed": options.seed,
                    "run_code": options.run_code,
                    "command": options.command_line,
                    **header,
                },
            )
    except KeyboardInterrupt:
        if path.exists():
            again = "the same command without --fresh" if options.fresh else "the same command"
            print(f"blockbatch: what is done is in {path}; {again} goes on with it", file=sys.stderr)
        raise


def read_problems(options: argparse.Namespace, tasks: Sequence[str]) -> list[Problem]:
    """The problems of all tasks in turn: what is there when a run is cut off then holds some of each."""
    by_task = [
        load_task(
            task,
            split=options.split,
            limit=BUILT_IN_LIMIT if options.limit is None and task in FAMILIES else options.limit,
            seed=options.seed,
            run_code=options.run_code,
            accept_weaker_sandbox=options.accept_weaker_sandbox,
        )
        for task in tasks
    ]
    return [problem for problem in chain.from_iterable(zip_longest(*by_task)) if problem is not None]
