"""`blockbatch eval`: methods and settings measured on the same problems, with intervals and paired tests."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockbatch.cli.arguments import add_model, default_methods, names
from blockbatch.cli.files import write_json, write_text
from blockbatch.cli.help import examples
from blockbatch.cli.recorded import (
    add_lengths,
    add_output,
    add_problems,
    decode_recorded,
    default_length,
    output_folder,
)
from blockbatch.cli.terminal import escape
from blockbatch.evaluation.presets import METHOD_SETTINGS, PRESETS, Preset, get_preset
from blockbatch.evaluation.progress import duration
from blockbatch.evaluation.settings import (
    FIXED_BLOCKS,
    TABLE_METHODS,
    Setting,
    fixed_block_settings,
    parse_setting,
    preset_settings,
    table_settings,
)
from blockbatch.methods import PRESET_TABLE
from blockbatch.tasks import FAMILIES

if TYPE_CHECKING:
    from blockbatch.evaluation.report import Report

DEFAULT_OUT = "blockbatch-eval"
VANILLA_LIMIT = 4
_PRESET_TASKS = {"gsm8k": "gsm8k-5shot", "humaneval": "humaneval"}


def add_parser(commands: Any) -> None:
    """Adds the command to those of `blockbatch`."""
    parser = commands.add_parser(
        "eval",
        help="measure methods on tasks: accuracy, forwards, time",
        description="Decode the problems of some tasks by every method, as published and, marked +eos, with "
        "the end of blockbatch; judge the answers, compare the methods on the same problems, write a report. "
        "An evaluation that was interrupted goes on when it is started again. It prints what was found in "
        "five lines, then the tables.",
        epilog=examples(
            "blockbatch eval --limit 4",
            "blockbatch eval --run-code --preset fast --out results",
            "blockbatch eval --methods dual_cache,blockbatch --tasks symbolic --limit 100",
            'blockbatch eval --set "own:threshold=0.95,block_sizes=4/8/16" --limit 20',
            "blockbatch eval --preset gsm8k --model GSAI-ML/LLaDA-8B-Instruct --chat",
            "blockbatch eval --tasks own.jsonl --traces traces",
        ),
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
    group.add_argument(
        "--preset",
        action="append",
        default=[],
        metavar="NAME",
        help=f"{', '.join(PRESETS)}: a benchmark of the paper, with its task and length; "
        f"{' or '.join(PRESET_TABLE)}: also a row with these settings; repeatable",
    )
    add_lengths(group)
    group.add_argument(
        "--vanilla-limit",
        type=_count_or_all,
        default=VANILLA_LIMIT,
        metavar="N",
        help=f"problems of each task, or all, for vanilla as published, the slowest ({VANILLA_LIMIT})",
    )
    add_output(parser, DEFAULT_OUT)


def run(options: argparse.Namespace) -> None:
    """Evaluates, or goes on with it, and reports as the options say."""
    from blockbatch.evaluation.report import build_report

    preset = _preset(options)
    tasks = tuple(dict.fromkeys(options.tasks or _default_tasks(preset)))
    gen_length = options.gen_length
    if gen_length is None:
        gen_length = preset.gen_length if preset else default_length(tasks)
    if options.methods is None:
        options.methods = default_methods(options)
    settings = plan_settings(options, gen_length, preset)
    begun = time.perf_counter()
    folder = output_folder(options, DEFAULT_OUT)
    header = {"preset": preset.name if preset else None, "gen_length": gen_length}
    result = decode_recorded(options, tasks, settings, folder, header)
    report = build_report(result, seed=options.seed)
    _write(report, {setting.label: setting.config.method for setting in settings}, folder)
    _print(report, folder, time.perf_counter() - begun)


def plan_settings(options: argparse.Namespace, gen_length: int, preset: Preset | None) -> list[Setting]:
    """The rows of the table: methods as published, methods that stop with the text, settings of one's own.

    Raises:
        ValueError: naming the option.
    """
    named = TABLE_METHODS if options.methods is None else options.methods
    methods = [method for method in named if method != FIXED_BLOCKS]
    given = None if preset is None else METHOD_SETTINGS
    own = preset_settings([name for name in options.preset if name in PRESET_TABLE], gen_length)
    own += [parse_setting(text, gen_length) for text in options.set]
    if FIXED_BLOCKS in named:
        own = [*fixed_block_settings(gen_length), *own]
    rows = (
        []
        if not methods and own
        else table_settings(methods, gen_length, options=given, vanilla_limit=options.vanilla_limit)
    )
    return [setting for setting in (*rows, *own) if setting.limit != 0]


def _preset(options: argparse.Namespace) -> Preset | None:
    """The benchmark among the presets; those of a decode are rows of the table."""
    named = [name for name in options.preset if name not in PRESET_TABLE]
    if len(named) > 1:
        raise ValueError(f"--preset: expected at most one of {', '.join(PRESETS)}, got {', '.join(named)}")
    return get_preset(named[0], (*PRESETS, *PRESET_TABLE)) if named else None


def _default_tasks(preset: Preset | None) -> tuple[str, ...]:
    if preset is None:
        return FAMILIES
    if preset.name not in _PRESET_TASKS:
        raise ValueError(f"--preset: expected --tasks with it, since {preset.name} has no built-in problems")
    return (_PRESET_TASKS[preset.name],)


def _write(report: Report, methods: dict[str, str], folder: Path) -> None:
    from blockbatch.evaluation.markdown import heading, markdown
    from blockbatch.evaluation.verdict import verdict
    from blockbatch.pictures.evaluation import draw

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
    write_text(folder / "report.md", markdown(report, picture=name, verdict=verdict(report)[1:]))
    write_json(str(folder / "summary.json"), report.as_dict())


def _print(report: Report, folder: Path, seconds: float) -> None:
    from blockbatch.evaluation.markdown import main_part, verdict_lines
    from blockbatch.evaluation.verdict import verdict

    print(escape("\n".join(verdict(report))) + "\n")
    print(escape("\n".join([*main_part(report), "", *verdict_lines(report)])))
    names = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file()))
    print(f"\n{duration(seconds)}; in {escape(str(folder))}: {names}")


def _count_or_all(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of problems or all, got {text!r}")
    return int(text)
