"""Intervals and paired tests against known values, exact enumeration and constructed data."""

import math

import numpy as np
import pytest

from blockbatch.evaluation import statistics
from blockbatch.evaluation.records import Record


def record(problem, setting, right=True, nfe=4, seconds=1.0, tokens=10, task="t"):
    phases = {"init": 1, "block": nfe - 1, "refresh": 0, "total": nfe}
    return Record(task, str(problem), setting, "text", tokens, right, phases, seconds, "eos", 32, "digest")


@pytest.mark.parametrize(
    "right, count, low, high",
    [  # published tables of Wilson's interval
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),
    ],
)
def test_wilson_known_values(right, count, low, high):
    assert statistics.wilson(right, count) == pytest.approx((low, high), abs=5e-5)


def test_wilson_holds_the_truth_as_often_as_it_says():
    count, coverage = 40, []
    bounds = [statistics.wilson(right, count) for right in range(count + 1)]
    for truth in np.linspace(0.05, 0.95, 19):
        chance = [math.comb(count, k) * truth**k * (1 - truth) ** (count - k) for k in range(count + 1)]
        coverage.append(sum(p for p, (low, high) in zip(chance, bounds) if low <= truth <= high))
    assert 0.94 < np.mean(coverage) < 0.97


@pytest.mark.parametrize(
    "only_a, only_b, p_value",
    [(0, 0, 1.0), (3, 5, 0.7265625), (5, 3, 0.7265625), (0, 6, 0.03125), (1, 9, 0.021484375), (10, 10, 1.0)],
)
def test_mcnemar_exact(only_a, only_b, p_value):
    assert statistics.mcnemar(only_a, only_b) == p_value


def test_mcnemar_of_many_pairs():
    # The normal approximation, with continuity correction, of 1000 against 1200.
    z = (200 - 1) / math.sqrt(2200)
    assert statistics.mcnemar(1000, 1200) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02)
    with pytest.raises(ValueError, match="-1"):
        statistics.mcnemar(-1, 2)


def test_paired_difference_holds_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    for only_a, only_b in ((0.1, 0.05), (0.02, 0.02), (0.3, 0.1)):
        draws = random.multinomial(100, (only_a, only_b, 1 - only_a - only_b), size=2000)
        bounds = [statistics.paired_difference(int(a), int(b), 100) for a, b, _ in draws]
        held = np.mean([low <= only_a - only_b <= high for low, high in bounds])
        assert 0.93 < held < 1.0
    low, high = statistics.paired_difference(0, 0, 100)
    assert low < 0 < high  # a hundred equal answers do not prove that the two never differ
    assert statistics.paired_difference(5, 3, 100) == pytest.approx(
        tuple(-bound for bound in reversed(statistics.paired_difference(3, 5, 100)))
    )


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).normal(10, 2, size=400)
    middle, spread = values.mean(), 1.96 * values.std() / 20
    low, high = statistics.bootstrap_mean(values)
    assert low == pytest.approx(middle - spread, abs=0.02) and high == pytest.approx(
        middle + spread, abs=0.02
    )


def test_bootstrap_of_a_ratio_is_paired():
    random = np.random.default_rng(2)
    old = random.lognormal(0, 1.5, size=60)  # problems differ by far more than the two settings
    exact = statistics.bootstrap_ratio(0.8 * old, old)
    assert exact.ratio == pytest.approx(0.8) and exact.interval_95 == pytest.approx((0.8, 0.8))
    noisy = statistics.bootstrap_ratio(0.8 * old * random.normal(1, 0.05, size=60), old)
    low, high = noisy.interval_95
    assert low < 0.8 < high and high - low < 0.1
    with pytest.raises(ValueError, match="got 2 and 3"):
        statistics.bootstrap_ratio([1, 2], [1, 2, 3])


def test_bootstrap_is_repeatable_and_bounded_in_memory(monkeypatch):
    values = np.random.default_rng(3).normal(size=50)
    whole = statistics.bootstrap_mean(values, seed=7)
    assert whole == statistics.bootstrap_mean(values, seed=7) != statistics.bootstrap_mean(values, seed=8)
    monkeypatch.setattr(statistics, "_CHUNK", 1000)
    assert statistics.bootstrap_mean(values, seed=7) == pytest.approx(whole, abs=0.02)


def test_summaries():
    records = [
        record(1, "a", right=True, nfe=4, seconds=1.0, tokens=10),
        record(2, "a", right=False, nfe=8, seconds=3.0, tokens=30),
        record(3, "a", right=None, nfe=6, seconds=2.0, tokens=20),
        record(1, "b", right=None),
    ]
    summaries = statistics.summarize(records)
    a, b = summaries["a"], summaries["b"]
    assert (a.count, a.judged, a.right, a.accuracy) == (3, 2, 1, 0.5)
    assert a.interval_95 == statistics.wilson(1, 2)
    assert a.nfe == {"init": 1.0, "block": 5.0, "refresh": 0.0, "total": 6.0}
    assert (a.seconds, a.tokens, a.tokens_per_second) == (2.0, 20.0, 10.0)
    assert b.accuracy is None and b.interval_95 is None


def test_comparisons_take_common_problems_alone():
    records = [record(n, "slow", right=n != 3, nfe=10 + n % 5, seconds=2.0) for n in range(40)]
    records += [record(n, "fast", right=n >= 8, nfe=5, seconds=0.5) for n in range(5, 45)]
    found = statistics.compare(records, "fast", "slow")
    assert (found.count, found.judged, found.only_setting, found.only_reference) == (35, 35, 0, 3)
    assert found.p_value == 0.25 and found.accuracy_change == pytest.approx(-3 / 35)
    assert found.nfe.ratio == pytest.approx(5 / np.mean([10 + n % 5 for n in range(5, 40)]))
    assert found.seconds.ratio == 0.25
    assert statistics.compare(records, "fast", "missing") is None


def test_verdicts_in_words():
    def answers(only_a, only_b):
        both = [record(n, label) for n in range(100, 120) for label in "ab"]
        lonely = [record(n, label, right=label == "a") for n in range(only_a) for label in "ab"]
        other = [record(n, label, right=label == "b") for n in range(50, 50 + only_b) for label in "ab"]
        return statistics.accuracy_verdict(statistics.compare(both + lonely + other, "a", "b"))

    assert answers(3, 5).startswith(
        "no difference shown: 3 problems only a solves, 5 only b, of 28, p = 0.73; -7.1 points ["
    )
    assert answers(1, 0).startswith("no difference shown: 1 problem only a solves, 0 only b, of 21, p = 1.00")
    assert answers(12, 0).startswith("more right: 12 problems only a solves, 0 only b, of 32, p < 0.001")
    assert answers(1, 9).startswith("fewer right: 1 problem only a solves, 9 only b, of 30, p = 0.021")
    unjudged = [record(1, label, right=None) for label in "ab"]
    assert statistics.accuracy_verdict(statistics.compare(unjudged, "a", "b")) == "answers not judged"

    words = {"less": "fewer forwards", "more": "more forwards"}
    for ratio, interval, verdict in (
        (0.739, (0.71, 0.77), "fewer forwards: -26.1% [-29.0, -23.0]"),
        (1.2, (1.1, 1.3), "more forwards: +20.0% [+10.0, +30.0]"),
        (0.9, (0.8, 1.0), "no difference shown: -10.0% [-20.0, +0.0]"),
        (1.0, (0.9, 1.2), "no difference shown: +0.0% [-10.0, +20.0]"),
    ):
        assert statistics.change_verdict(statistics.Change(ratio, interval), **words) == verdict
