"""A report as Markdown whose tables also read as plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from blockbatch.evaluation import statistics
from blockbatch.evaluation.report import Report
from blockbatch.evaluation.statistics import Change, Comparison, Summary

_VERSIONS = ("python", "torch", "cuda", "driver", "triton")
_ENDS_NOTE = """\
- Rows marked +eos, and blockbatch: decoding stops when everything before the first EOS is decoded. Baselines
  without the mark run as published and fill the canvas."""
_BLOCK_ENDS_NOTE = """\
- Every row stops with the text: block_diffusion with the block that holds the first EOS, blockbatch when
  everything before it is decoded."""
_SPLITS_NOTE = "split into the first one, those of a block, and refreshes."
_BLOCK_SPLITS_NOTE = """split into the
  prompt's, those that denoise a block (some store the block before on the way), and those that only store."""
_NOTES = """\
{ends}
- right: of the answers that were judged. Intervals hold 95%: Wilson's for accuracy, bootstrap over problems
  for the mean NFE.
- NFE: forwards of the model for one answer, mean; {splits}
- s/problem: mean time of a decode; of several at once, its share. tokens/s: tokens before the first EOS;
  filling behind it does not count."""
_METHODS_NOTE = """\
Answers: McNemar's exact test, the difference with Agresti and Min's interval. Forwards and time: change of
the mean, interval by paired bootstrap over problems. Each comparison stands alone, without correction for
their number. That no difference is shown does not mean that there is none: the interval says how large it
may be."""


def markdown(report: Report, *, picture: str | None = None, verdict: Sequence[str] = ()) -> str:
    """The report as Markdown, `verdict` first; `picture` is the name of a file to show in it."""
    found = [f"- {_cell(' '.join(line.split()))}" for line in verdict]
    lines = [
        f"# {heading(report)}",
        "",
        *found,
        *([""] if found else []),
        *facts(report.header),
        "",
        *_cautions(report),
    ]
    if picture:
        lines += ["", f"![Accuracy against NFE and against seconds]({picture})"]
    lines += ["", "## All tasks" if len(report.by_task) > 1 else "## Results", "", *main_part(report)]
    lines += ["", "## Paired comparisons", "", *verdict_lines(report)]
    if len(report.by_task) > 1:
        for task, summaries in report.by_task.items():
            lines += ["", f"## {_cell(task)}", "", *summary_table(summaries)]
    return "\n".join(lines) + "\n"


def main_part(report: Report) -> list[str]:
    """The tables of all tasks together."""
    in_blocks = any("denoise" in summary.nfe for summary in report.overall.values())
    notes = _NOTES.format(
        ends=_BLOCK_ENDS_NOTE if in_blocks else _ENDS_NOTE,
        splits=_BLOCK_SPLITS_NOTE if in_blocks else _SPLITS_NOTE,
    )
    lines = [*summary_table(report.overall), "", *notes.splitlines()]
    if report.factors:
        lines += ["", "### Against the references", "", *_factor_table(report)]
    if report.exits:
        lines += ["", "### What stopping with the text gives by itself", "", *_exit_part(report)]
    return lines


def heading(report: Report) -> str:
    """Model and problems."""
    total = sum(report.problems.values())
    parts = ", ".join(f"{count} {_cell(task)}" for task, count in report.problems.items())
    return f"{_cell(str(report.header['model']))}: {total} problems ({parts})"


def facts(header: dict[str, Any]) -> list[str]:
    """What the run was taken on and how, from the header of its file."""
    versions = ", ".join(f"{name} {header[name]}" for name in _VERSIONS if header.get(name))
    lines = [
        f"- model: {_cell(str(header['model']))}, {header['dtype']}, operators: "
        f"{header['backend'] or 'the fastest that run'}",
        f"- device: {_cell(str(header['device']))}; threads: {header['threads']}; {versions}",
        f"- problems decoded at once: {header['batch_size']}; chat format: {_yes(header['chat'])}; traces "
        f"recorded: {_yes(header['traced'])}",
    ]
    names = ("kind", "gen_length", "preset", "split", "seed", "run_code")
    named = [name for name in names if header.get(name) is not None]
    if named:
        lines.append("- " + "; ".join(f"{name}: {_cell(str(header[name]))}" for name in named))
    lines.append(f"- started: {header['started']}")
    if header.get("command"):
        lines += ["", "```", str(header["command"]).replace("```", "'''"), "```"]
    return lines


def _cautions(report: Report) -> list[str]:
    lines = []
    total = sum(report.problems.values())
    for label, summary in report.overall.items():
        if summary.count < total:
            lines.append(
                f"- {_cell(label)} decoded {summary.count} of the {total} problems; it is compared on these."
            )
    for task, summaries in report.by_task.items():
        missing = max(summary.count - summary.judged for summary in summaries.values())
        if missing:
            lines.append(f"- {_cell(task)}: {missing} answers of a setting not judged{_why(report, task)}.")
    if report.header.get("traced"):
        lines.append("- Traces were recorded: the seconds hold the time that it took.")
    return lines


def _why(report: Report, task: str) -> str:
    if task in ("code", "humaneval") and report.header.get("run_code") is False:
        return " (generated code runs only with --run-code)"
    return " (their problems have no answer)"


def summary_table(summaries: dict[str, Summary]) -> list[str]:
    """A line for each setting."""
    counted = next(iter(summaries.values())).nfe if summaries else ()
    phases = [phase for phase in counted if phase != "total"]
    head = ("setting", "problems", "right", "accuracy %", "NFE", *phases)
    rows = []
    for label, row in summaries.items():
        accuracy = "-"
        if row.accuracy is not None:
            low, high = row.interval_95
            accuracy = f"{100 * row.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        rows.append(
            (
                label,
                str(row.count),
                f"{row.right}/{row.judged}" if row.judged else "-",
                accuracy,
                f"{row.nfe['total']:.2f} [{row.nfe_95[0]:.2f}, {row.nfe_95[1]:.2f}]",
                *(f"{row.nfe[phase]:.2f}" for phase in phases),
                _seconds(row.seconds),
                f"{row.tokens_per_second:.1f}",
            )
        )
    return table((*head, "s/problem", "tokens/s"), rows)


def _factor_table(report: Report) -> list[str]:
    references = list(dict.fromkeys(comparison.reference for comparison in report.factors))
    by_pair = {(c.setting, c.reference): c for c in report.factors}
    rows = []
    for label in report.overall:
        cells = [by_pair.get((label, reference)) for reference in references]
        rows.append((label, *("-" if c is None else _factor(c) for c in cells)))
    return [
        *table(("setting", *(f"vs {reference}" for reference in references)), rows),
        "",
        "Times as fast, and change of NFE, on the problems that both decoded.",
    ]


def _factor(comparison: Comparison) -> str:
    return f"{1 / comparison.seconds.ratio:.2f}x, {percent(comparison.nfe)}"


def _exit_part(report: Report) -> list[str]:
    rows = [
        (
            exit.method,
            str(exit.comparison.count),
            f"{exit.same_text}/{exit.comparison.count}",
            _interval(exit.comparison.nfe),
            _interval(exit.comparison.seconds),
        )
        for exit in report.exits
    ]
    lines = table(("method", "problems", "same text", "NFE with the exit", "seconds with the exit"), rows)
    by_pair = {(c.setting, c.reference): c for c in report.verdicts}
    for exit in report.exits:
        fair = by_pair.get(("blockbatch", exit.comparison.setting))
        published = by_pair.get(("blockbatch", exit.method))
        if fair and published:
            lines += [
                "",
                f"BlockBatch against {exit.method}: {percent(published.nfe)} NFE as published on "
                f"{published.count} problems; stopping with the text gives {exit.method} itself "
                f"{percent(exit.comparison.nfe)}, and against that {percent(fair.nfe)} remain "
                f"({fair.count} problems).",
            ]
    return lines


def verdict_lines(report: Report) -> list[str]:
    """The paired comparisons in words."""
    if not report.verdicts:
        return ["Nothing to compare: one setting alone."]
    lines = []
    for comparison in report.verdicts:
        nfe, seconds = (
            statistics.change_verdict(change, less, more, f"no difference in {what} shown")
            for change, less, more, what in (
                (comparison.nfe, "fewer forwards", "more forwards", "forwards"),
                (comparison.seconds, "less time", "more time", "time"),
            )
        )
        lines += [
            f"- **{_cell(comparison.setting)}** against **{_cell(comparison.reference)}** "
            f"({comparison.count} problems)",
            f"  - answers: {_cell(statistics.accuracy_verdict(comparison))}",
            f"  - {nfe}",
            f"  - {seconds}",
        ]
    return [*lines, "", *_METHODS_NOTE.splitlines()]


def percent(change: Change) -> str:
    """The change of a mean in percent."""
    return f"{100 * (change.ratio - 1):+.1f}%"


def _interval(change: Change) -> str:
    low, high = change.interval_95
    return f"{percent(change)} [{100 * (low - 1):+.1f}, {100 * (high - 1):+.1f}]"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table with columns of equal width, the first at the left and the others right."""
    lines = [[_cell(cell) for cell in row] for row in (head, *rows)]
    widths = [max(3, *(len(row[column]) for row in lines)) for column in range(len(head))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return [
        "| " + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))) + " |"
        for row in (lines[0], rule, *lines[1:])
    ]


def _cell(text: str) -> str:
    """Text that stays in its cell and is no markup: names come from files and command lines."""
    shown = "".join(char if char.isprintable() else " " for char in text)
    return shown.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds < 10 else f"{seconds:.1f}"


def _yes(value: Any) -> str:
    return "yes" if value else "no"
