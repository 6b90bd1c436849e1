"""`blockbatch ablate KIND`: one knob of BlockBatch turned, all else at its default, on the same problems."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from blockbatch.cli.evaluate import BUILT_IN_LENGTH, DEFAULT_LENGTH, add_problems, read_problems
from blockbatch.cli.files import write_json, write_text


def add_parser(commands: Any) -> None:
    """Adds the command to those of `blockbatch`."""
    from blockbatch.cli.options import add_model

    parser = commands.add_parser(
        "ablate",
        help="turn one knob of blockbatch: accuracy, forwards, time",
        description="Decode the problems of some tasks by blockbatch with one option at several values: "
        "block-sizes, threshold, tail-threshold, merge-threshold, sync-threshold, refresh-interval, "
        "components (merge, sync and refresh switched off), commit or eos-exit. Every value is compared "
        "with the default on the same problems. An ablation that was interrupted goes on when it is started "
        "again.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("kind", metavar="KIND", help="what to vary, of the list above")
    add_model(parser)
    add_problems(parser)
    group = parser.add_argument_group("settings")
    group.add_argument(
        "--gen-length",
        type=int,
        metavar="N",
        help=f"tokens to generate ({BUILT_IN_LENGTH} for built-in tasks, {DEFAULT_LENGTH} otherwise)",
    )
    group.add_argument("--batch-size", type=int, default=1, metavar="N", help="problems decoded at once (1)")
    group = parser.add_argument_group("output")
    group.add_argument(
        "--out",
        metavar="FOLDER",
        help="for results.jsonl, report.md, report.png and summary.json (blockbatch-ablate-KIND)",
    )
    group.add_argument("--fresh", action="store_true", help="drop the results that are there")
    group.add_argument("--traces", metavar="FOLDER", help="save the trace of every decode there")


def run(options: argparse.Namespace) -> None:
    """Runs the ablation, or goes on with it, and reports."""
    from blockbatch.cli.options import load
    from blockbatch.evaluation import ablations, runner
    from blockbatch.evaluation.problems import FAMILIES
    from blockbatch.evaluation.progress import progress_bar

    tasks = tuple(dict.fromkeys(options.tasks or FAMILIES))
    gen_length = options.gen_length
    if gen_length is None:
        gen_length = BUILT_IN_LENGTH if set(tasks) <= set(FAMILIES) else DEFAULT_LENGTH
    settings, default = ablations.ablation_settings(options.kind, gen_length)
    problems = read_problems(options, tasks)
    folder = Path(options.out or f"blockbatch-ablate-{options.kind}")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--out: expected a folder, got the file {folder}")
    model = load(options)
    header = {
        "kind": options.kind,
        "split": options.split,
        "seed": options.seed,
        "run_code": options.run_code,
        "gen_length": gen_length,
        "command": options.command_line,
    }
    begun = time.perf_counter()
    with progress_bar(sys.stderr, "ablate") as show:
        result = runner.run(
            model,
            problems,
            settings,
            folder / "results.jsonl",
            batch_size=options.batch_size,
            chat=options.chat,
            traces=options.traces,
            progress=show,
            fresh=options.fresh,
            header=header,
        )
    report = ablations.ablation_report(options.kind, result, default, seed=options.seed)
    _write(report, folder)
    _print(report, folder, time.perf_counter() - begun)


def _write(report: dict[str, Any], folder: Path) -> None:
    from blockbatch.evaluation.ablation_chart import draw_ablation
    from blockbatch.evaluation.ablations import ablation_table
    from blockbatch.evaluation.markdown import facts

    picture = folder / "report.png"
    try:
        draw_ablation(report, picture)
    except RuntimeError as error:  # without matplotlib the numbers are still worth having
        picture.unlink(missing_ok=True)
        print(f"blockbatch: no picture: {error}", file=sys.stderr)
    header = report["header"]
    lines = [f"# {header['model']}: {report['title']}", "", *facts(header), ""]
    if picture.exists():
        lines += [f"![Accuracy and NFE: {report['title']}]({picture.name})", ""]
    write_text(folder / "report.md", "\n".join([*lines, ablation_table(report)]))
    write_json(str(folder / "summary.json"), report)


def _print(report: dict[str, Any], folder: Path, seconds: float) -> None:
    from blockbatch.cli.terminal import escape
    from blockbatch.evaluation.ablations import ablation_table
    from blockbatch.evaluation.progress import duration

    print(escape(ablation_table(report)))
    names = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file()))
    print(f"{duration(seconds)}; in {escape(str(folder))}: {names}")
