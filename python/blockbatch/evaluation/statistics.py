"""Intervals and paired tests for settings that decoded the same problems."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from blockbatch.evaluation.records import Record

LEVEL = 0.05  # of a test; intervals hold 95%
RESAMPLES = 10_000
_Z = 1.959963984540054  # 97.5% of a normal distribution lie below
# Resampled values at a time.
_CHUNK = 1 << 22

Interval = tuple[float, float]


@dataclass(frozen=True)
class Summary:
    """What one setting made of its problems.

    Attributes:
        count: problems decoded.
        judged, right: of them judged, and right.
        accuracy: right of judged; None if none was judged.
        interval_95: of the accuracy, Wilson's.
        nfe: mean model forwards: init, block, refresh, total.
        nfe_95: of the mean total, by bootstrap.
        tokens: mean tokens before the first EOS.
        seconds: mean.
        seconds_95: of the mean, by bootstrap.
        tokens_per_second: tokens before the first EOS alone.
        adopted: mean forwards that were taken over from drafts.
    """

    count: int
    judged: int
    right: int
    accuracy: float | None
    interval_95: Interval | None
    nfe: dict[str, float]
    nfe_95: Interval
    tokens: float
    seconds: float
    seconds_95: Interval
    tokens_per_second: float
    adopted: float = 0.0


@dataclass(frozen=True)
class Change:
    """By how much a mean over the same problems changes.

    Attributes:
        ratio: the new mean divided by the old one.
        interval_95: of the ratio, by paired bootstrap.
    """

    ratio: float
    interval_95: Interval


@dataclass(frozen=True)
class Comparison:
    """Two settings on the problems that both decoded.

    Attributes:
        setting, reference: their labels.
        count: problems that both decoded.
        judged: of them judged for both.
        only_setting, only_reference: problems that only one of them solves.
        p_value: McNemar's exact test of the two; None if nothing was judged.
        accuracy_change: right answers of the setting less those of the reference, as a share of the judged.
        accuracy_change_95: its interval, Agresti and Min's.
        nfe, seconds: of the setting relative to the reference.
    """

    setting: str
    reference: str
    count: int
    judged: int
    only_setting: int
    only_reference: int
    p_value: float | None
    accuracy_change: float | None
    accuracy_change_95: Interval | None
    nfe: Change
    seconds: Change


def summarize(records: Sequence[Record], *, seed: int = 0) -> dict[str, Summary]:
    """One summary for each setting, in the order in which they come first."""
    by_setting: dict[str, list[Record]] = {}
    for record in records:
        by_setting.setdefault(record.setting, []).append(record)
    return {label: _summary(group, seed) for label, group in by_setting.items()}


def _summary(records: list[Record], seed: int) -> Summary:
    verdicts = [record.right for record in records if record.right is not None]
    phases = records[0].nfe
    nfe = {phase: float(np.mean([record.nfe[phase] for record in records])) for phase in phases}
    seconds = [record.seconds for record in records]
    tokens = [record.tokens for record in records]
    return Summary(
        count=len(records),
        judged=len(verdicts),
        right=sum(verdicts),
        accuracy=sum(verdicts) / len(verdicts) if verdicts else None,
        interval_95=wilson(sum(verdicts), len(verdicts)) if verdicts else None,
        nfe=nfe,
        nfe_95=bootstrap_mean([record.nfe["total"] for record in records], seed=seed),
        tokens=float(np.mean(tokens)),
        seconds=float(np.mean(seconds)),
        seconds_95=bootstrap_mean(seconds, seed=seed),
        tokens_per_second=sum(tokens) / sum(seconds),
        adopted=float(np.mean([record.adopted for record in records])),
    )


def compare(records: Sequence[Record], setting: str, reference: str, *, seed: int = 0) -> Comparison | None:
    """`setting` against `reference` on the problems that both decoded; None where there is none."""
    ours, theirs = (
        {(record.task, record.problem): record for record in records if record.setting == label}
        for label in (setting, reference)
    )
    pairs = [(ours[key], theirs[key]) for key in ours if key in theirs]
    if not pairs:
        return None
    judged = [(a.right, b.right) for a, b in pairs if a.right is not None and b.right is not None]
    only_setting = sum(a and not b for a, b in judged)
    only_reference = sum(b and not a for a, b in judged)
    count = len(judged)
    return Comparison(
        setting=setting,
        reference=reference,
        count=len(pairs),
        judged=count,
        only_setting=only_setting,
        only_reference=only_reference,
        p_value=mcnemar(only_setting, only_reference) if count else None,
        accuracy_change=(only_setting - only_reference) / count if count else None,
        accuracy_change_95=paired_difference(only_setting, only_reference, count) if count else None,
        nfe=bootstrap_ratio(
            [a.nfe["total"] for a, _ in pairs], [b.nfe["total"] for _, b in pairs], seed=seed
        ),
        seconds=bootstrap_ratio([a.seconds for a, _ in pairs], [b.seconds for _, b in pairs], seed=seed),
    )


def _change(pairs: Sequence[tuple[Record, Record]], value: Callable[[Record], float], seed: int) -> Change:
    return bootstrap_ratio([value(new) for new, _ in pairs], [value(old) for _, old in pairs], seed=seed)


def wilson(right: int, count: int) -> Interval:
    """95% interval of a proportion (Wilson, 1927)."""
    if not 0 <= right <= count or count < 1:
        raise ValueError(f"right: expected 0 to count, and count at least 1, got {right} of {count}")
    share = right / count
    middle = share + _Z**2 / (2 * count)
    spread = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    scale = 1 + _Z**2 / count
    # At the ends the bound is exact; rounding must not push it past them.
    low = 0.0 if right == 0 else (middle - spread) / scale
    high = 1.0 if right == count else (middle + spread) / scale
    return low, high


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p-value of McNemar's exact test: may the discordant pairs be tosses of a fair coin?"""
    if only_a < 0 or only_b < 0:
        raise ValueError(f"only_a, only_b: expected counts, got {only_a} and {only_b}")
    count, least = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(count, k) for k in range(least + 1))
    return min(1.0, 2 * tail / 2**count)  # integers until here: exact for any count


def paired_difference(only_a: int, only_b: int, count: int) -> Interval:
    """95% interval of the difference of two proportions of the same problems (Agresti and Min, 2005).

    Half a problem is added to each of the four outcomes, so that the interval has a width even where the two
    never differ.
    """
    count_, more, less = count + 2, only_a + 0.5, only_b + 0.5
    difference = (more - less) / count_
    spread = _Z * math.sqrt(more + less - (more - less) ** 2 / count_) / count_
    return max(-1.0, difference - spread), min(1.0, difference + spread)


def bootstrap_mean(values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """95% percentile interval of a mean."""
    array = np.asarray(values, dtype=float)
    return _percentiles(lambda chosen: array[chosen].mean(axis=1), len(array), resamples, seed)


def bootstrap_ratio(
    new: Sequence[float], old: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> Change:
    """The mean of `new` divided by that of `old`; problems are resampled, each with both its values."""
    if len(new) != len(old) or not len(new):
        raise ValueError(f"new, old: expected values of the same problems, got {len(new)} and {len(old)}")
    ours, theirs = np.asarray(new, dtype=float), np.asarray(old, dtype=float)
    interval = _percentiles(
        lambda chosen: ours[chosen].sum(axis=1) / theirs[chosen].sum(axis=1), len(ours), resamples, seed
    )
    return Change(float(ours.sum() / theirs.sum()), interval)


def _percentiles(statistic: Callable, count: int, resamples: int, seed: int) -> Interval:
    """2.5% and 97.5% of a statistic over resampled indices [resamples, count]."""
    random = np.random.default_rng(seed)
    step = max(1, _CHUNK // count)
    values = [
        statistic(random.integers(count, size=(min(step, resamples - first), count)))
        for first in range(0, resamples, step)
    ]
    low, high = np.quantile(np.concatenate(values), (LEVEL / 2, 1 - LEVEL / 2))
    return float(low), float(high)


def accuracy_verdict(comparison: Comparison) -> str:
    """Whether one setting solves more problems, in words."""
    if comparison.p_value is None:
        return "answers not judged"
    significant = comparison.p_value < LEVEL
    better = comparison.only_setting > comparison.only_reference
    said = ("more right" if better else "fewer right") if significant else "no difference shown"
    low, high = comparison.accuracy_change_95
    return (
        f"{said}: {_problems(comparison.only_setting)} only {comparison.setting} solves, "
        f"{comparison.only_reference} only {comparison.reference}, of {comparison.judged}, "
        f"p {p_text(comparison.p_value)}; {100 * comparison.accuracy_change:+.1f} points "
        f"[{100 * low:+.1f}, {100 * high:+.1f}]"
    )


def change_verdict(change: Change, less: str, more: str, neither: str = "no difference shown") -> str:
    """The word for a mean that falls, rises or does neither for sure, and its change with interval."""
    low, high = change.interval_95
    said = less if high < 1 else more if low > 1 else neither
    return f"{said}: {100 * (change.ratio - 1):+.1f}% [{100 * (low - 1):+.1f}, {100 * (high - 1):+.1f}]"


def p_text(p_value: float) -> str:
    """A p-value with its sign of relation."""
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}" if p_value < 0.1 else f"= {p_value:.2f}"


def _problems(count: int) -> str:
    return f"{count} problem" if count == 1 else f"{count} problems"
