"""`blockbatch compare`: the same prompts by every method, side by side."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from blockbatch import generation
from blockbatch.cli.files import check_output, write_json
from blockbatch.cli.options import chat_prompt, load
from blockbatch.cli.problems import read_problems
from blockbatch.cli.table import comparison_table, family_table
from blockbatch.cli.terminal import escape
from blockbatch.config import DecodeConfig
from blockbatch.environment import describe
from blockbatch.evaluation.runner import warm_up
from blockbatch.evaluation.settings import TABLE_METHODS, table_settings
from blockbatch.generation import Result
from blockbatch.models import Model
from blockbatch.tasks import Problem


@dataclass
class Row:
    """One method with one way to end, and what it made of every problem."""

    label: str
    config: DecodeConfig
    results: list[Result] = field(default_factory=list)
    right: list[bool | None] = field(default_factory=list)

    @property
    def nfe(self) -> float:
        """Mean forwards for an answer."""
        return sum(result.nfe.total for result in self.results) / len(self.results)

    @property
    def seconds(self) -> float:
        """Mean seconds for an answer."""
        return sum(result.seconds for result in self.results) / len(self.results)

    @property
    def tokens_per_second(self) -> float:
        """Tokens before the end of the texts; what a method fills in behind it does not count."""
        tokens = sum(len(result.tokens) for result in self.results)
        return tokens / sum(result.seconds for result in self.results)


def run(options: argparse.Namespace) -> None:
    """Compares and prints as the options say."""
    methods = TABLE_METHODS if options.methods is None else options.methods
    rows = [Row(setting.label, setting.config) for setting in table_settings(methods, options.gen_length)]
    if options.json not in (None, "-"):
        check_output(options.json, "--json")
    problems = read_problems(options)
    model = load(options)
    prompts = _encode(model, problems, options.chat)
    # All prompts are checked before the first is decoded; a canvas has the same limit by every method.
    for index, ids in enumerate(prompts):
        generation.check_prompt(model, ids, rows[0].config, f"prompt[{index}]")
    with _progress() as show:
        warm_up(model, ((row.config, [ids]) for row in rows for ids in prompts), show)
        # Method by method within a problem: a machine that is busy for a while then slows all methods alike.
        for index, (problem, ids) in enumerate(zip(problems, prompts, strict=True), 1):
            for row in rows:
                show(f"problem {index} of {len(problems)}: {row.label}")
                result = generation.generate(model, ids, row.config)
                row.results.append(result)
                row.right.append(None if problem.is_right is None else problem.is_right(result.text))
    report = _report(model, problems, rows, options.gen_length)
    if options.json == "-":
        print(json.dumps(report, indent=1))
        return
    if options.json is not None:
        write_json(options.json, report)
    _print(model, problems, rows, options)


def _encode(model: Model, problems: list[Problem], chat: bool) -> list[list[int]]:
    if model.tokenizer is None:
        raise ValueError("--model: expected a model with a tokenizer, got one without")
    texts = [chat_prompt(model, problem.prompt) if chat else problem.prompt for problem in problems]
    return [model.tokenizer.encode(text) for text in texts]


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
    families = Counter(problem.task for problem in problems)
    parts = ", ".join(f"{count} {family}" for family, count in families.items())
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"{escape(model.name)} on {model.device} in {dtype}, {len(problems)} problems ({parts})")
    print()
    print("\n".join(comparison_table(rows)))
    # With two problems of a family a count of right ones says nothing about it.
    if len(families) > 1 and len(problems) > 3 * len(families):
        print()
        print("\n".join(family_table(rows, [problem.task for problem in problems])))
    if options.show:
        _print_texts(problems[0], rows)
    elif sys.stdout.isatty():
        _print_hints(problems, options)


def _print_texts(problem: Problem, rows: list[Row]) -> None:
    verdict = {True: ", right", False: ", wrong", None: ""}
    print(f"\nPrompt\n{_indented(problem.prompt)}")
    for row in rows:
        print(f"\n{row.label} ({row.results[0].nfe.total} forwards{verdict[row.right[0]]})")
        print(_indented(row.results[0].text))


def _print_hints(problems: list[Problem], options: argparse.Namespace) -> None:
    command = "blockbatch" if shutil.which("blockbatch") else f"{shlex.quote(sys.executable)} -m blockbatch"
    named = f" --model {shlex.quote(options.model)}" if options.model != "tiny" else ""
    prompt = escape(shlex.quote(min((problem.prompt for problem in problems), key=len)))
    chat = " --chat" if options.chat else ""
    print(f"\nthe texts:        {command} compare{named} --show")
    given = f"{named}{chat} --gen-length {options.gen_length}"
    print(f"one of them live: {command} generate{given} --prompt {prompt}")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in escape(text).splitlines())


def _report(model: Model, problems: list[Problem], rows: list[Row], gen_length: int) -> dict:
    return {
        "model": model.name,
        **describe(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "gen_length": gen_length,
        "rows": [
            {
                "label": row.label,
                "method": row.config.method,
                "eos_exit": row.config.eos_exit,
                "right": sum(map(bool, row.right)),
                "judged": sum(right is not None for right in row.right),
                "nfe": row.nfe,
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
                        "seconds": result.seconds,
                    }
                    for problem, result, right in zip(problems, row.results, row.right, strict=True)
                ],
            }
            for row in rows
        ],
    }
