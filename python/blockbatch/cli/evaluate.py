"""`blockbatch eval`: methods and settings measured on the same problems, with intervals and paired tests."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockbatch.cli.files import write_json, write_text

if TYPE_CHECKING:
    from blockbatch.evaluation.presets import Preset
    from blockbatch.evaluation.records import Run
    from blockbatch.evaluation.report import Report
    from blockbatch.evaluation.settings import Setting
    from blockbatch.tasks import Problem

DEFAULT_OUT = "blockbatch-eval"
# Meant to keep an evaluation of the built-in model under a quarter of an hour on two cores.
BUILT_IN_LIMIT, VANILLA_LIMIT = 34, 4
BUILT_IN_LENGTH, DEFAULT_LENGTH = 128, 256
_PRESET_TASKS = {"gsm8k": "gsm8k-5shot", "humaneval": "humaneval"}


def add_parser(commands: Any) -> None:
    """Adds the command to those of `blockbatch`."""
    from blockbatch.cli.options import add_model, names

    parser = commands.add_parser(
        "eval",
        help="measure methods on tasks: accuracy, forwards, time",
        description="Decode the problems of some tasks by every method, as published and, marked +eos, with "
        "the end of blockbatch; judge the answers, compare the methods on the same problems, write a report. "
        "An evaluation that was interrupted goes on when it is started again.",
    )
    parser.set_defaults(run=run)
    add_model(parser)
    add_problems(parser)
    group = parser.add_argument_group("settings")
    group.add_argument(
        "--methods",
        type=names,
        metavar="A,B",
        help="methods to run (all); fixed-blocks: the dual cache with every block size",
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="LABEL:NAME=VALUE,...",
        help="also run a setting of your own, such as careful:threshold=0.95,block_sizes=4/8/16; repeatable",
    )
    group.add_argument("--preset", metavar="NAME", help="settings of the paper: gsm8k, math, humaneval, mbpp")
    add_decoding(group)
    group.add_argument(
        "--vanilla-limit",
        type=_count_or_all,
        default=VANILLA_LIMIT,
        metavar="N",
        help=f"problems of each task, or all, for vanilla as published, the slowest ({VANILLA_LIMIT})",
    )
    add_output(parser, DEFAULT_OUT)


def add_decoding(group: Any) -> None:
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


def add_problems(parser: argparse.ArgumentParser) -> None:
    """The options that `read_problems` reads."""
    from blockbatch.cli.options import names

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


def run(options: argparse.Namespace) -> None:
    """Evaluates, or goes on with it, and reports as the options say."""
    from blockbatch.evaluation.report import build_report

    preset = _preset(options)
    tasks = tuple(dict.fromkeys(options.tasks or _default_tasks(preset)))
    gen_length = options.gen_length
    if gen_length is None:
        gen_length = preset.gen_length if preset else default_length(tasks)
    settings = plan_settings(options, gen_length, preset)
    begun = time.perf_counter()
    folder = output_folder(options, DEFAULT_OUT)
    header = {"preset": options.preset, "gen_length": gen_length}
    result = decode_recorded(options, tasks, settings, folder, header)
    report = build_report(result, seed=options.seed)
    _write(report, {setting.label: setting.config.method for setting in settings}, folder)
    _print(report, folder, time.perf_counter() - begun)


def default_length(tasks: Sequence[str]) -> int:
    """Tokens to generate for these tasks where nothing else says it."""
    from blockbatch.tasks import FAMILIES

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
    from blockbatch.cli.options import load
    from blockbatch.evaluation import runner
    from blockbatch.evaluation.progress import progress_bar

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


def plan_settings(options: argparse.Namespace, gen_length: int, preset: Preset | None) -> list[Setting]:
    """The rows of the table: methods as published, methods that stop with the text, settings of one's own.

    Raises:
        ValueError: naming the option.
    """
    from blockbatch.evaluation.presets import METHOD_SETTINGS
    from blockbatch.evaluation.settings import (
        FIXED_BLOCKS,
        TABLE_METHODS,
        fixed_block_settings,
        parse_setting,
        table_settings,
    )

    named = TABLE_METHODS if options.methods is None else options.methods
    methods = [method for method in named if method != FIXED_BLOCKS]
    given = None if preset is None else METHOD_SETTINGS
    own = [parse_setting(text, gen_length) for text in options.set]
    if FIXED_BLOCKS in named:
        own = [*fixed_block_settings(gen_length), *own]
    rows = (
        []
        if not methods and own
        else table_settings(methods, gen_length, options=given, vanilla_limit=options.vanilla_limit)
    )
    return [setting for setting in (*rows, *own) if setting.limit != 0]


def _preset(options: argparse.Namespace) -> Preset | None:
    if options.preset is None:
        return None
    from blockbatch.evaluation.presets import get_preset

    return get_preset(options.preset)


def _default_tasks(preset: Preset | None) -> tuple[str, ...]:
    from blockbatch.tasks import FAMILIES

    if preset is None:
        return FAMILIES
    if preset.name not in _PRESET_TASKS:
        raise ValueError(f"--preset: expected --tasks with it, since {preset.name} has no built-in problems")
    return (_PRESET_TASKS[preset.name],)


def read_problems(options: argparse.Namespace, tasks: Sequence[str]) -> list[Problem]:
    """The problems of all tasks in turn: what is there when a run is cut off then holds some of each."""
    from blockbatch.tasks import FAMILIES, load_task

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


def _write(report: Report, methods: dict[str, str], folder: Path) -> None:
    from blockbatch.evaluation.charts import draw
    from blockbatch.evaluation.markdown import heading, markdown

    picture = folder / "report.png"
    if any(summary.accuracy is not None for summary in report.overall.values()):
        try:
            draw(report.overall, methods, picture, title=heading(report))
        except RuntimeError as error:  # without matplotlib the numbers are still worth having
            picture.unlink(missing_ok=True)
            print(f"blockbatch: no picture: {error}", file=sys.stderr)
    else:
        picture.unlink(missing_ok=True)
    name = picture.name if picture.exists() else None
    write_text(folder / "report.md", markdown(report, picture=name))
    write_json(str(folder / "summary.json"), report.as_dict())


def _print(report: Report, folder: Path, seconds: float) -> None:
    from blockbatch.cli.terminal import escape
    from blockbatch.evaluation.markdown import heading, main_part, verdict_lines
    from blockbatch.evaluation.progress import duration

    print(escape(heading(report)) + "\n")
    print(escape("\n".join([*main_part(report), "", *verdict_lines(report)])))
    names = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file()))
    print(f"\n{duration(seconds)}; in {escape(str(folder))}: {names}")


def _count_or_all(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of problems or all, got {text!r}")
    return int(text)
