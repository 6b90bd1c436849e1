"""Ablations: what turning one knob of BlockBatch makes of accuracy and forwards, all else at its default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from blockbatch.evaluation import statistics
from blockbatch.evaluation.knobs import ABLATIONS, KINDS, ablation_settings
from blockbatch.evaluation.records import Record, Run

__all__ = ["ABLATIONS", "EVERYTHING", "KINDS", "ablation_report", "ablation_settings", "ablation_table"]

EVERYTHING = "all"  # the name of all tasks together


def ablation_report(kind: str, run: Run, default: str, *, seed: int = 0) -> dict[str, Any]:
    """What each setting made of the problems, and how it compares with the default.

    Args:
        kind: one of `KINDS`.
        run: of the settings that `ablation_settings` gives.
        default: the label of the default among them.
        seed: draws the resamples of the intervals.

    Returns:
        plain data for JSON: `kind`, `title`, `default`, `tasks`, `rows` and the run's `header`. A row has its
        `setting`, `options`, `summary` (by task, and over "all") and `against_default` (None for itself).
    """
    tasks = list(dict.fromkeys(record.task for record in run.records))
    by_task = {task: [record for record in run.records if record.task == task] for task in tasks}
    summaries = {EVERYTHING: statistics.summarize(run.records, seed=seed)}
    summaries |= {task: statistics.summarize(records, seed=seed) for task, records in by_task.items()}
    rows = []
    for label in summaries[EVERYTHING]:
        rows.append(
            {
                "setting": label,
                "options": ABLATIONS[kind].variants[label],
                "summary": {name: asdict(found[label]) for name, found in summaries.items()},
                "against_default": None
                if label == default
                else _comparison(run.records, label, default, seed),
            }
        )
    return {
        "kind": kind,
        "title": ABLATIONS[kind].title,
        "default": default,
        "tasks": tasks,
        "rows": rows,
        "header": run.header,
    }


def _comparison(records: Sequence[Record], label: str, default: str, seed: int) -> dict[str, Any] | None:
    found = statistics.compare(records, label, default, seed=seed)
    if found is None:
        return None
    return {
        **asdict(found),
        "accuracy_verdict": statistics.accuracy_verdict(found),
        "nfe_verdict": statistics.change_verdict(found.nfe, "fewer", "more"),
    }


_COLUMNS = (
    "right, %",
    "95%",
    "NFE",
    "init + block + refresh",
    "s",
    "points against default",
    "NFE against default",
)


def ablation_table(report: dict[str, Any]) -> str:
    """The report as a Markdown table over all tasks, and one of right answers and NFE by task."""
    header = [report["title"], *_COLUMNS]
    lines = [_line(header), _line(["---", *["---:"] * 5, "---", "---"])]
    lines += [_line(_cells(row, report["default"])) for row in report["rows"]]
    if len(report["tasks"]) > 1:
        lines += ["", _line([report["title"], *report["tasks"]])]
        lines.append(_line(["---", *["---:"] * len(report["tasks"])]))
        for row in report["rows"]:
            parts = [_accuracy_and_nfe(row["summary"][task]) for task in report["tasks"]]
            lines.append(_line([_name(row, report["default"]), *parts]))
        lines += ["", "By task: right, %; mean NFE."]
    summary = report["rows"][0]["summary"][EVERYTHING]
    notes = [f"{summary['count']} problems, {summary['judged']} of them judged; seconds for an answer, mean."]
    if summary["judged"]:
        notes.append(
            "Intervals: Wilson's for right answers, else paired bootstrap over problems. Points of accuracy "
            "against the default on the same problems, with McNemar's exact test."
        )
    return "\n".join([*lines, "", " ".join(notes)]) + "\n"


def _cells(row: dict[str, Any], default: str) -> list[str]:
    summary, against = row["summary"][EVERYTHING], row["against_default"]
    nfe = summary["nfe"]
    interval = "-"
    if summary["interval_95"] is not None:
        interval = "{:.1f}-{:.1f}".format(*(100 * bound for bound in summary["interval_95"]))
    return [
        _name(row, default),
        _percent(summary["accuracy"]),
        interval,
        f"{nfe['total']:.2f}",
        f"{nfe['init']:.2f} + {nfe['block']:.2f} + {nfe['refresh']:.2f}",
        f"{summary['seconds']:.3f}",
        _accuracy_change(against) if against else "-",
        _nfe_change(against) if against else "-",
    ]


def _accuracy_change(against: dict[str, Any]) -> str:
    if against["p_value"] is None:
        return "not judged"
    low, high = (100 * bound for bound in against["accuracy_change_95"])
    p_value = statistics.p_text(against["p_value"])
    return f"{100 * against['accuracy_change']:+.1f} [{low:+.1f}, {high:+.1f}], p {p_value}"


def _nfe_change(against: dict[str, Any]) -> str:
    low, high = (100 * (bound - 1) for bound in against["nfe"]["interval_95"])
    return f"{100 * (against['nfe']['ratio'] - 1):+.1f}% [{low:+.1f}, {high:+.1f}]"


def _name(row: dict[str, Any], default: str) -> str:
    return f"{row['setting']} (default)" if row["setting"] == default else row["setting"]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _accuracy_and_nfe(summary: dict[str, Any]) -> str:
    return f"{_percent(summary['accuracy'])}; {summary['nfe']['total']:.2f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
