"""What `clock.py` says of its decodes: answers, forwards, milliseconds, and the targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from clock_model import refreshes_canvas
from clock_record import Decode
from clock_settings import BY_LABEL, DUAL, DUAL_CHEAP, FAST, GEN_LENGTH, LEAP, LEAP_CHEAP, Row

from blockbatch import tiny
from blockbatch.evaluation import statistics

PHASES = ("init", "block", "refresh")
# Of the preset "fast", by prompt length: at least so many times as fast as these settings.
_TIMES = {
    1024: {"dual cache as published": 1.7, "LocalLeap as published": 1.4, "cheaper": 1.15, "drafts": 1.2},
    160: {"dual cache as published": 1.35, "LocalLeap as published": 1.15, "cheaper": 1.15, "drafts": 1.25},
}
_POINTS = 0.01  # of accuracy that "fast" may lie below the dual cache


def answers(decodes: dict[str, list[Decode]]) -> list[dict[str, Any]]:
    """Right answers and forwards of every setting on all problems.

    The reference is the dual cache as published, or else the first setting.
    """
    reference = decodes.get(DUAL) or next(iter(decodes.values()))
    lines = []
    for label, own in decodes.items():
        only = sum(a.right and not b.right for a, b in zip(own, reference, strict=True))
        only_reference = sum(b.right and not a.right for a, b in zip(own, reference, strict=True))
        right, nfe = sum(decode.right for decode in own), np.array([decode.nfe() for decode in own])
        total = nfe.sum(1)
        change = statistics.bootstrap_ratio(total, [sum(decode.nfe()) for decode in reference])
        lines.append(
            {
                "setting": label,
                "group": BY_LABEL[label].group,
                "fast": label == FAST,
                "problems": len(own),
                "right": right,
                "right_by_family": {
                    family: sum(decode.right for decode in own if decode.family == family)
                    for family in tiny.FAMILIES
                },
                "accuracy_95": statistics.wilson(right, len(own)),
                "only_this_solves": only,
                "only_reference_solves": only_reference,
                "p_value": statistics.mcnemar(only, only_reference),
                "accuracy_change": (only - only_reference) / len(own),
                "accuracy_change_95": statistics.paired_difference(only, only_reference, len(own)),
                "tokens": float(np.mean([decode.tokens for decode in own])),
                "nfe": dict(zip(PHASES, nfe.mean(0).tolist())) | {"total": float(total.mean())},
                "tokens_per_forward": sum(decode.tokens for decode in own) / float(total.sum()),
                "nfe_of_reference": {"ratio": change.ratio, "interval_95": change.interval_95},
            }
        )
    return lines


def queries(row: Row, decodes: list[Decode], prompt_length: int) -> dict[str, float]:
    """Mean queries of a decode by phase."""
    canvas = refreshes_canvas(row)
    each = np.array([decode.queries(prompt_length, GEN_LENGTH, canvas) for decode in decodes])
    return dict(zip(PHASES, each.mean(0).tolist()))


def clocks(decodes: dict[str, list[Decode]], times: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """What the milliseconds `times` of the first decodes say of each setting; all of the same problems."""
    rivals = {
        "dual_cache": DUAL,
        "local_leap": LEAP,
        "dual_cache_generation": DUAL_CHEAP,
        "local_leap_generation": LEAP_CHEAP,
    }
    found = {}
    for label, taken in times.items():
        tokens = [decode.tokens for decode in decodes[label][: len(taken)]]
        without = BY_LABEL[label].without
        against = rivals | ({"without_drafts": without} if without else {})
        found[label] = {
            "problems": len(taken),
            "decode_ms": float(np.mean(taken)),
            "decode_ms_95": statistics.bootstrap_mean(taken),
            "tokens_per_second": 1e3 * sum(tokens) / sum(taken),
            "times_as_fast_as": {
                name: _speed(taken, times[other]) for name, other in against.items() if other in times
            },
        }
    return found


def _speed(taken: Sequence[float], rival: Sequence[float]) -> dict[str, Any]:
    change = statistics.bootstrap_ratio(rival, taken)
    return {"ratio": change.ratio, "interval_95": change.interval_95}


def targets(prompt_length: int, lines: dict[str, dict[str, Any]], right: list[dict[str, Any]]) -> list[dict]:
    """What was wanted of the preset "fast" and of drafts, and what came."""
    wanted, found = _TIMES.get(prompt_length), []
    if wanted is None or FAST not in lines:
        return []

    def add(name: str, limit: float, setting: str, rival: str) -> None:
        if setting in lines and rival in lines:
            ratio, every = (
                of[rival]["decode_ms"] / of[setting]["decode_ms"]
                for of in (lines, {label: line["all_problems"] for label, line in lines.items()})
            )
            found.append(
                {
                    "target": f"P = {prompt_length}: {name}",
                    "setting": setting,
                    "against": rival,
                    "times_as_fast": ratio,
                    "times_as_fast_all_problems": every,
                    "wanted": limit,
                    "reached": ratio >= limit,
                    "of_wanted": ratio / limit,
                }
            )

    add("fast against the dual cache as published", wanted["dual cache as published"], FAST, DUAL)
    add("fast against LocalLeap as published", wanted["LocalLeap as published"], FAST, LEAP)
    cheap = [label for label in (DUAL_CHEAP, LEAP_CHEAP) if label in lines]
    if cheap:
        best = min(cheap, key=lambda label: lines[label]["decode_ms"])
        add("fast against the better of both with cheaper forwards", wanted["cheaper"], FAST, best)
    for label, row in BY_LABEL.items():
        if row.without:
            add("drafts against none", wanted["drafts"], label, row.without)
    change = next((line["accuracy_change"] for line in right if line["setting"] == FAST), None)
    if change is not None:
        found.append(
            {
                "target": "right answers of fast against the dual cache, a share of all problems",
                "setting": FAST,
                "change": change,
                "wanted": -_POINTS,
                "reached": change >= -_POINTS,
            }
        )
    return found


def print_table(title: str, lines: Sequence[dict[str, Any]], right: Sequence[dict[str, Any]]) -> None:
    """The figures of one shape beside the right answers."""
    by_label = {line["setting"]: line for line in right}
    print(f"\n{title}")
    head = (
        ("ms", 8),
        (" 95%", 16),
        ("tok/s", 7),
        ("NFE", 7),
        ("refresh", 8),
        ("right %", 8),
        ("p", 6),
        ("vs dual", 8),
    )
    print(" " * 46 + "".join(f"{name:>{width}}" for name, width in head))
    for line in lines:
        answer = by_label[line["setting"]]
        low, high = line["decode_ms_95"]
        share = f"{100 * line['share_refresh']:.0f}%" if "share_refresh" in line else "-"
        speed = line["times_as_fast_as"].get("dual_cache", {}).get("ratio", float("nan"))
        print(
            f"{'* ' if answer['fast'] else '  '}{line['setting']:44}{line['decode_ms']:8.1f} "
            f"{f'{low:.0f}-{high:.0f}':>15}{line['tokens_per_second']:7.0f}{answer['nfe']['total']:7.1f}"
            f"{share:>8}"
            f"{100 * answer['right'] / answer['problems']:8.1f}{answer['p_value']:6.2f}{speed:8.2f}",
            flush=True,
        )
