"""What an evaluation found, in five lines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from blockbatch.evaluation import statistics
from blockbatch.evaluation.markdown import heading, percent
from blockbatch.evaluation.report import Report
from blockbatch.evaluation.settings import EOS_SUFFIX
from blockbatch.evaluation.statistics import Comparison, Summary

# What a verdict is about where several comparisons were made: the strongest baseline of the paper.
_REFERENCE = "dual_cache" + EOS_SUFFIX


def verdict(report: Report) -> list[str]:
    """Five lines: the problems; which settings have most right answers, fewest forwards and least time, of
    those that decoded all problems; and the comparison that matters most."""
    most = max(summary.count for summary in report.overall.values())
    whole = {label: summary for label, summary in report.overall.items() if summary.count == most}
    judged = {label: summary for label, summary in whole.items() if summary.accuracy is not None}
    return [
        heading(report),
        "most right answers: " + _best(judged, lambda found: -found.accuracy, _accuracy, "none was judged"),
        "fewest forwards:    " + _best(whole, lambda found: found.nfe["total"], _forwards),
        "least time:         " + _best(whole, lambda found: found.seconds, _time),
        _comparison(report),
    ]


def _best(
    found: dict[str, Summary],
    rank: Callable[[Summary], float],
    say: Callable[[Summary], str],
    otherwise: str = "-",
) -> str:
    """The settings that come first, as a rule one, and their figure."""
    if not found:
        return otherwise
    least = min(map(rank, found.values()))
    first = [label for label, summary in found.items() if rank(summary) == least]
    named = ", ".join(first[:3]) + (f" and {len(first) - 3} more" if len(first) > 3 else "")
    return f"{named}: {say(found[first[0]])}"


def _accuracy(summary: Summary) -> str:
    low, high = (100 * bound for bound in summary.interval_95)
    of = "" if summary.judged == summary.count else f" of the {summary.judged} answers that were judged"
    return f"{100 * summary.accuracy:.1f}% [{low:.1f}, {high:.1f}]{of}"


def _forwards(summary: Summary) -> str:
    return f"{summary.nfe['total']:.2f} an answer"


def _time(summary: Summary) -> str:
    return f"{summary.seconds:.3f} s an answer"


def _comparison(report: Report) -> str:
    if not report.verdicts:
        return "nothing to compare: one setting alone"
    first = report.verdicts[0]
    subject = [found for found in report.verdicts if found.setting == first.setting]
    chosen = next((found for found in subject if found.reference == _REFERENCE), first)
    return (
        f"{chosen.setting} against {chosen.reference}: {_answers(chosen)}; "
        f"forwards {_change(chosen.nfe)}; time {_change(chosen.seconds)}"
    )


def _answers(found: Comparison) -> str:
    if found.p_value is None:
        return "answers not judged"
    if found.p_value >= statistics.LEVEL:
        said = "no difference in right answers shown"
    else:
        said = "more right answers" if found.only_setting > found.only_reference else "fewer right answers"
    return f"{said} ({100 * found.accuracy_change:+.1f} points, p {statistics.p_text(found.p_value)})"


def _change(change: Any) -> str:
    low, high = change.interval_95
    return percent(change) + (" (no difference shown)" if low <= 1 <= high else "")
