"""`blockbatch compare`: the same prompts by every method, side by side."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from blockbatch.cli import ranks
from blockbatch.cli.arguments import (
    add_model,
    add_thinking,
    check_bos,
    default_methods,
    encode_text,
    load,
    methods_note,
    names,
)
from blockbatch.cli.files import check_output, write_json
from blockbatch.cli.help import examples
from blockbatch.cli.problems import read_problems
from blockbatch.cli.table import Row, comparison_table, family_table
from blockbatch.cli.terminal import escape
from blockbatch.cli.words import heading, next_command, progress, verdict, why_empty
from blockbatch.evaluation.settings import TABLE_METHODS, TABLE_PRESETS, preset_settings, table_settings
from blockbatch.methods import PRESET_TABLE

if TYPE_CHECKING:
    from blockbatch.models import Model
    from blockbatch.tasks import Problem

GEN_LENGTH = 128


def add_parser(commands: Any) -> None:
    """Adds the command to those of `blockbatch`."""
    parser = commands.add_parser(
        "compare",
        help="decode the same prompts by every method",
        description="Decode the same prompts by every method and print what each needed. Baselines run as "
        "published (the canvas is filled) and, marked +eos, with the same end as blockbatch. Named settings "
        "have that end, too.",
        epilog=methods_note()
        + "\n\n"
        + examples(
            "blockbatch compare",
            "blockbatch compare --family symbolic --count 10 --show",
            "blockbatch compare --methods dual_cache,blockbatch --preset fast",
            "blockbatch compare --prompt-file problems.jsonl --json figures.json",
        ),
    )
    parser.set_defaults(run=run)
    add_model(parser)
    add_thinking(parser)
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--family",
        action="append",
        metavar="NAME",
        help="take this family of the built-in problems; repeatable",
    )
    prompts.add_argument("--count", type=int, metavar="N", help="problems of each family (2)")
    prompts.add_argument("--seed", type=int, metavar="N", help="draws the problems (0)")
    prompts.add_argument(
        "--prompt-file",
        metavar="FILE",
        help='own problems instead (-: standard input): JSON lines {"prompt": ..., "answer": ...}. A text '
        "is right if the answer stands in it on its own, not inside a longer word or number",
    )
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--methods", type=names, metavar="A,B", help="methods to run (all)")
    decoding.add_argument(
        "--preset",
        type=names,
        metavar="A,B",
        help=f"named settings below the methods: {', '.join(PRESET_TABLE)} (without --methods: "
        f"{', '.join(TABLE_PRESETS)})",
    )
    decoding.add_argument(
        "--gen-length",
        type=int,
        default=GEN_LENGTH,
        metavar="N",
        help=f"tokens to generate ({GEN_LENGTH})",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--show", action="store_true", help="also print the first prompt and every method's text"
    )
    output.add_argument(
        "--json", metavar="FILE", help="save figures and texts (-: print them instead of the table)"
    )


def run(options: argparse.Namespace) -> None:
    """Compares and prints as the options say."""
    from blockbatch import generation
    from blockbatch.decoding.choice import method_for
    from blockbatch.evaluation.runner import warm_up

    methods = default_methods(options) if options.methods is None else options.methods
    presets = options.preset
    if presets is None:
        presets = (
            TABLE_PRESETS
            if options.methods is None and methods[: len(TABLE_METHODS)] == TABLE_METHODS
            else ()
        )
    settings = table_settings(methods, options.gen_length) + preset_settings(presets, options.gen_length)
    rows = [Row(setting.label, setting.config) for setting in settings]
    if options.json not in (None, "-"):
        check_output(options.json, "--json")
    check_bos(options)
    problems = read_problems(options)
    model = load(options)
    prompts = _encode(model, problems, options)
    # All prompts are checked before the first is decoded; a canvas has the same limit by every method.
    for index, ids in enumerate(prompts):
        generation.check_prompt(model, ids, rows[0].config, f"prompt[{index}]")
    for row in rows:
        method_for(model, row.config.for_model(model.spec))
    if options.json != "-":
        print(heading(model, problems, rows, max(map(len, prompts))), flush=True)
    with _progress() as show:
        warm_up(model, ((row.config, [ids]) for row in rows for ids in prompts), show)
        began, done, total = time.monotonic(), 0, len(problems) * len(rows)
        # Method by method within a problem: a machine that is busy for a while then slows all methods alike.
        for problem, ids in zip(problems, prompts, strict=True):
            for row in rows:
                show(progress(done, total, row.label, began))
                done += 1
                (result,) = generation.decode(model, [ids], row.config)
                row.results.append(result)
                row.right.append(None if problem.is_right is None else problem.is_right(result.text))
    report = _report(model, problems, rows, options.gen_length)
    if options.json == "-":
        print(json.dumps(report, indent=1))
        return
    if options.json is not None and ranks.writes():
        write_json(options.json, report)
    _print(model, problems, rows, options)


def _encode(model: Model, problems: list[Problem], options: argparse.Namespace) -> list[list[int]]:
    if model.tokenizer is None:
        raise ValueError("--model: expected a model with a tokenizer, got one without")
    return [
        encode_text(model, problem.prompt, options, f"prompt[{index}]")
        for index, problem in enumerate(problems)
    ]


@contextmanager
def _progress() -> Iterator:
    """A function that shows progress on one line of standard error, if that is a terminal."""
    shown = 0

    def show(text: str) -> None:
        nonlocal shown
        if sys.stderr.isatty():
            sys.stderr.write("\r" + text.ljust(shown))
            sys.stderr.flush()
            shown = len(text)

    try:
        yield show
    finally:
        if shown:
            show("")
            sys.stderr.write("\r")
            sys.stderr.flush()


def _print(model: Model, problems: list[Problem], rows: list[Row], options: argparse.Namespace) -> None:
    print()
    print("\n".join(comparison_table(rows)))
    families = list(dict.fromkeys(problem.task for problem in problems))
    # With two problems of a family a count of right ones says nothing about it.
    if len(families) > 1 and len(problems) > 3 * len(families):
        print()
        print("\n".join(family_table(rows, [problem.task for problem in problems])))
    if options.show:
        _print_texts(model, problems[0], rows)
        return
    told = verdict(rows)
    if told is not None:
        print(f"\n{told}")
    print(f"\n{next_command(model, problems, options)}")


def _print_texts(model: Model, problem: Problem, rows: list[Row]) -> None:
    verdicts = {True: ", right", False: ", wrong", None: ""}
    print(f"\nPrompt\n{_indented(problem.prompt)}")
    for row in rows:
        result = row.results[0]
        print(f"\n{row.label} ({result.nfe.total} forwards{verdicts[row.right[0]]})")
        empty = why_empty(model, result)
        print(_indented(result.text) if empty is None else f"  ({empty})")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in escape(text).splitlines())


def _report(model: Model, problems: list[Problem], rows: list[Row], gen_length: int) -> dict:
    from blockbatch.environment import describe

    return {
        "model": model.name,
        **({"adapter": model.adapter} if model.adapter else {}),
        **describe(model.device),
        "dtype": model.numbers,
        "gen_length": gen_length,
        "rows": [
            {
                "label": row.label,
                "method": row.config.method,
                "eos_exit": row.config.eos_exit,
                "right": sum(map(bool, row.right)),
                "judged": sum(right is not None for right in row.right),
                "nfe": row.nfe,
                "adopted": row.adopted,
                "seconds": row.seconds,
                "tokens_per_second": row.tokens_per_second,
                "problems": [
                    {
                        "family": problem.task,
                        "prompt": problem.prompt,
                        "text": result.text,
                        "right": right,
                        "tokens": len(result.tokens),
                        "nfe": result.nfe.total,
                        "adopted": result.adopted,
                        "seconds": result.seconds,
                    }
                    for problem, result, right in zip(problems, row.results, row.right, strict=True)
                ],
            }
            for row in rows
        ],
    }
