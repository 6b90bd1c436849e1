"""What `block_decodes.py` says of decodes: intervals, paired tests, and where forwards go."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from blockbatch.evaluation.statistics import bootstrap_ratio, mcnemar, paired_difference, wilson

KINDS = ("prefill", "denoise", "store")


@dataclass
class Decodes:
    """Decodes by one rule, in the order of the problems.

    Attributes:
        options: of `DecodeConfig`.
        right: a "1" or "0" for each answer; a text of twelve problems has twelve.
        prefill, denoise, store: forwards of each decode.
        ids: a checksum of each decode's tokens, by which equal ones are told.
        seconds: of all decodes together.
    """

    options: dict[str, Any]
    right: str
    prefill: list[int]
    denoise: list[int]
    store: list[int]
    ids: list[int]
    seconds: float

    @property
    def totals(self) -> list[int]:
        return [sum(kinds) for kinds in zip(self.prefill, self.denoise, self.store, strict=True)]

    def first_of(self, families: int, taken: int) -> Decodes:
        """The first `taken` of each of as many equally long families."""
        count = len(self.denoise) // families
        chosen = [at for at in range(len(self.denoise)) if at % count < taken]
        picked = {name: [getattr(self, name)[at] for at in chosen] for name in (*KINDS, "ids")}
        right = "".join(self.right[at] for at in chosen)
        return Decodes(self.options, right, **picked, seconds=self.seconds)

    def record(self) -> dict[str, Any]:
        """As a report holds it: lists of numbers as texts, a line each."""
        return {
            name: " ".join(map(str, value)) if isinstance(value, list) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def read(cls, record: dict[str, Any]) -> Decodes:
        """The inverse of `record`."""
        lists = {name: [int(word) for word in record[name].split()] for name in (*KINDS, "ids")}
        return cls(**{**record, **lists})


def accuracy(right: str) -> dict[str, Any]:
    """Right answers with Wilson's interval."""
    low, high = wilson(right.count("1"), len(right))
    return {
        "problems": len(right),
        "right": right.count("1"),
        "accuracy": round(right.count("1") / len(right), 4),
        "accuracy_95": [round(low, 4), round(high, 4)],
    }


def mean_nfe(found: Decodes) -> dict[str, float]:
    """Mean forwards of a decode, by kind."""
    kinds = {kind: round(statistics.mean(getattr(found, kind)), 3) for kind in KINDS}
    return kinds | {"total": round(statistics.mean(found.totals), 3)}


def ratio(new: Sequence[float], old: Sequence[float]) -> dict[str, Any]:
    """Ratio of two means over the same problems, with its interval by paired bootstrap."""
    change = bootstrap_ratio(new, old)
    return {"ratio": round(change.ratio, 4), "ratio_95": [round(bound, 4) for bound in change.interval_95]}


def compared(found: Decodes, other: Decodes) -> dict[str, Any]:
    """Two rules on the same problems: McNemar's exact test, and the ratio of their forwards."""
    pairs = list(zip(found.right, other.right, strict=True))
    only, only_other = pairs.count(("1", "0")), pairs.count(("0", "1"))
    points = paired_difference(only, only_other, len(pairs))
    return {
        "only_this_right": only,
        "only_the_other_right": only_other,
        "mcnemar_p": round(mcnemar(only, only_other), 4),
        "points": round(100 * (only - only_other) / len(pairs), 2),
        "points_95": [round(100 * bound, 2) for bound in points],
        "same_tokens": sum(a == b for a, b in zip(found.ids, other.ids, strict=True)),
        "nfe": ratio(found.totals, other.totals),
    }


def lines(rules: dict[str, Decodes], references: Sequence[str], families: Sequence[str]) -> list[dict]:
    """A line for each rule. One that decoded fewer problems is compared on those.

    Args:
        families: names of equally many problems in a row; empty: no such parts.
    """
    found = []
    for name, mine in rules.items():
        line: dict[str, Any] = {"rule": name, "options": mine.options, **accuracy(mine.right)}
        line |= {"nfe": mean_nfe(mine), "seconds_in_batches": round(mine.seconds / len(mine.denoise), 4)}
        if families:
            count = len(mine.right) // len(families)
            line["families"] = {
                family: {
                    "right": mine.right[at * count : (at + 1) * count].count("1"),
                    "nfe": round(statistics.mean(mine.totals[at * count : (at + 1) * count]), 3),
                }
                for at, family in enumerate(families)
            }
        for other in references:
            if name != other and other in rules:
                theirs = rules[other]
                if len(theirs.denoise) != len(mine.denoise):
                    theirs = theirs.first_of(len(families), len(mine.denoise) // len(families))
                line[f"against_{other}"] = compared(mine, theirs)
        found.append(line)
    return found


def steps(published: Decodes, joined: Decodes, one: Decodes, several: Decodes) -> list[dict]:
    """From the published rule to BlockBatch, one change at a time, and what each of them saves.

    A text's last block is stored for nobody. BlockBatch leaves that store out; `last_store_left_out` is what
    the published rule in joined forwards would need without it.
    """
    ways = {
        "published": published.totals,
        "stores_joined": joined.totals,
        "last_store_left_out": [
            total - store for total, store in zip(joined.totals, joined.store, strict=True)
        ],
        "one_branch": one.totals,
        "several_branches": several.totals,
    }
    found, before = [], published.totals
    for name, forwards in ways.items():
        found.append(
            {
                "way": name,
                "nfe": round(statistics.mean(forwards), 3),
                "of_published": ratio(forwards, published.totals),
                "of_the_way_before": ratio(forwards, before),
                "saved_of_published": round((sum(before) - sum(forwards)) / sum(published.totals), 4),
            }
        )
        before = forwards
    return found
