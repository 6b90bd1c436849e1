"""`blockbatch ablate KIND`: one knob of BlockBatch turned, all else at its default, on the same problems."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from blockbatch.cli.arguments import add_model
from blockbatch.cli.files import write_json, write_text
from blockbatch.cli.help import examples, rows
from blockbatch.cli.recorded import (
    add_lengths,
    add_output,
    add_problems,
    decode_recorded,
    default_length,
    output_folder,
)
from blockbatch.cli.terminal import escape
from blockbatch.evaluation.knobs import ABLATIONS
from blockbatch.evaluation.progress import duration
from blockbatch.tasks import FAMILIES


def add_parser(commands: Any) -> None:
    """Adds the command to those of `blockbatch`."""
    parser = commands.add_parser(
        "ablate",
        help="turn one knob of blockbatch: accuracy, forwards, time",
        description="Decode the problems of some tasks by blockbatch with one option at several values. "
        "Every value is compared with the default on the same problems. An ablation that was interrupted "
        "goes on when it is started again.",
        epilog=rows("Kinds", {kind: one.title for kind, one in ABLATIONS.items()})
        + "\n\n"
        + examples(
            "blockbatch ablate sync-threshold --limit 10",
            "blockbatch ablate max-step-tokens --tasks symbolic,arithmetic",
            "blockbatch ablate components --run-code --out components",
        ),
    )
    parser.set_defaults(run=run)
    parser.add_argument("kind", metavar="KIND", help="what to vary, of the list below")
    add_model(parser)
    add_problems(parser)
    add_lengths(parser.add_argument_group("settings"))
    add_output(parser, "blockbatch-ablate-KIND")


def run(options: argparse.Namespace) -> None:
    """Runs the ablation, or goes on with it, and reports."""
    from blockbatch.evaluation import ablations

    tasks = tuple(dict.fromkeys(options.tasks or FAMILIES))
    gen_length = default_length(tasks) if options.gen_length is None else options.gen_length
    settings, default = ablations.ablation_settings(options.kind, gen_length)
    begun = time.perf_counter()
    folder = output_folder(options, f"blockbatch-ablate-{options.kind}")
    header = {"kind": options.kind, "gen_length": gen_length}
    result = decode_recorded(options, tasks, settings, folder, header, "ablate")
    report = ablations.ablation_report(options.kind, result, default, seed=options.seed)
    _write(report, folder)
    _print(report, folder, time.perf_counter() - begun)


def _write(report: dict[str, Any], folder: Path) -> None:
    from blockbatch.evaluation.ablations import ablation_table
    from blockbatch.evaluation.markdown import facts
    from blockbatch.pictures.ablation import draw_ablation

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
    from blockbatch.evaluation.ablations import ablation_table

    print(escape(ablation_table(report)))
    names = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file()))
    print(f"{duration(seconds)}; in {escape(str(folder))}: {names}")
