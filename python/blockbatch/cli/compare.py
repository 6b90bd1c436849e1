"""`blockbatch compare`: the same prompts by every method, side by side."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from blockbatch import generation, memory
from blockbatch.cli.files import check_output, write_json
from blockbatch.cli.options import chat_prompt, load
from blockbatch.cli.problems import Task, read_tasks
from blockbatch.cli.table import comparison_table, family_table
from blockbatch.cli.terminal import escape
from blockbatch.config import METHODS, DecodeConfig
from blockbatch.environment import describe
from blockbatch.generation import Result
from blockbatch.models import Model

# The yardstick first, BlockBatch last.
DEFAULT_METHODS = (*(method for method in METHODS if method != "blockbatch"), "blockbatch")
# The first decodes of a process pay for memory and threads that later ones find ready; a short one is enough.
_WARM_UP_TOKENS = 32


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
    rows = plan_rows(options.methods if options.methods is not None else DEFAULT_METHODS, options.gen_length)
    if options.json not in (None, "-"):
        check_output(options.json, "--json")
    tasks = read_tasks(options)
    model = load(options)
    prompts = _encode(model, tasks, options.chat)
    # All prompts are checked before the first is decoded; a canvas has the same limit by every method.
    for index, ids in enumerate(prompts):
        generation.check_prompt(model, ids, rows[0].config, f"prompt[{index}]")
    with _progress() as show:
        _warm_up(model, prompts, rows, show)
        # Method by method within a problem: a machine that is busy for a while then slows all methods alike.
        for index, (task, ids) in enumerate(zip(tasks, prompts, strict=True), 1):
            for row in rows:
                show(f"problem {index} of {len(tasks)}: {row.label}")
                result = generation.generate(model, ids, row.config)
                row.results.append(result)
                row.right.append(None if task.is_right is None else task.is_right(result.text))
    report = _report(model, tasks, rows, options.gen_length)
    if options.json == "-":
        print(json.dumps(report, indent=1))
        return
    if options.json is not None:
        write_json(options.json, report)
    _print(model, tasks, rows, options)


def plan_rows(methods: Sequence[str], gen_length: int) -> list[Row]:
    """The rows of the comparison: methods as published first, then all that stop at the end of the text.

    Raises:
        ValueError: an unknown method, none, or a generation length that a method cannot take.
    """
    if not methods:
        raise ValueError("--methods: expected at least one method, got none")
    methods = tuple(dict.fromkeys(methods))
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"--methods: expected some of {', '.join(DEFAULT_METHODS)}, got {method!r}")
    baselines = [method for method in methods if method != "blockbatch"]
    rows = [Row(method, DecodeConfig(method=method, gen_length=gen_length)) for method in baselines]
    for method in methods:
        label = method if method == "blockbatch" else f"{method} +eos"
        rows.append(Row(label, DecodeConfig(method=method, gen_length=gen_length, eos_exit="prefix")))
    return rows


def _encode(model: Model, tasks: list[Task], chat: bool) -> list[list[int]]:
    if model.tokenizer is None:
        raise ValueError("--model: expected a model with a tokenizer, got one without")
    texts = [chat_prompt(model, task.prompt) if chat else task.prompt for task in tasks]
    return [model.tokenizer.encode(text) for text in texts]


def _warm_up(model: Model, prompts: list[list[int]], rows: list[Row], show) -> None:
    # A GPU captures its steps once for each length of canvas that it has buffers for, and needs all of it.
    on_gpu = model.device.type == "cuda"
    by_room = {memory.longest_prompt(model.device, len(ids)): ids for ids in prompts}
    for row in rows:
        config = row.config
        if not on_gpu and config.eos_exit != "prefix":
            continue
        show(f"warming up: {config.method}")
        if on_gpu:
            for ids in by_room.values():
                generation.generate(model, ids, config)
        else:
            gen_length = min(_WARM_UP_TOKENS, config.gen_length)
            config = DecodeConfig(method=config.method, gen_length=gen_length)
            generation.generate(model, prompts[0], config)


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


def _print(model: Model, tasks: list[Task], rows: list[Row], options: argparse.Namespace) -> None:
    families = Counter(task.family for task in tasks)
    parts = ", ".join(f"{count} {family}" for family, count in families.items())
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"{escape(model.name)} on {model.device} in {dtype}, {len(tasks)} problems ({parts})")
    print()
    print("\n".join(comparison_table(rows)))
    # With two problems of a family a count of right ones says nothing about it.
    if len(families) > 1 and len(tasks) > 3 * len(families):
        print()
        print("\n".join(family_table(rows, [task.family for task in tasks])))
    if options.show:
        _print_texts(tasks[0], rows)
    elif sys.stdout.isatty():
        _print_hints(tasks, options)


def _print_texts(task: Task, rows: list[Row]) -> None:
    verdict = {True: ", right", False: ", wrong", None: ""}
    print(f"\nPrompt\n{_indented(task.prompt)}")
    for row in rows:
        print(f"\n{row.label} ({row.results[0].nfe.total} forwards{verdict[row.right[0]]})")
        print(_indented(row.results[0].text))


def _print_hints(tasks: list[Task], options: argparse.Namespace) -> None:
    command = "blockbatch" if shutil.which("blockbatch") else f"{shlex.quote(sys.executable)} -m blockbatch"
    named = f" --model {shlex.quote(options.model)}" if options.model != "tiny" else ""
    prompt = escape(shlex.quote(min((task.prompt for task in tasks), key=len)))
    chat = " --chat" if options.chat else ""
    print(f"\nthe texts:        {command} compare{named} --show")
    given = f"{named}{chat} --gen-length {options.gen_length}"
    print(f"one of them live: {command} generate{given} --prompt {prompt}")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in escape(text).splitlines())


def _report(model: Model, tasks: list[Task], rows: list[Row], gen_length: int) -> dict:
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
                        "family": task.family,
                        "prompt": task.prompt,
                        "text": result.text,
                        "right": right,
                        "tokens": len(result.tokens),
                        "nfe": result.nfe.total,
                        "seconds": result.seconds,
                    }
                    for task, result, right in zip(tasks, row.results, row.right, strict=True)
                ],
            }
            for row in rows
        ],
    }
