"""The frontier of accuracy against NFE over the settings of a decode, on the built-in model.

    python bench/frontier.py --device cuda                                    # search on held-out problems
    python bench/frontier.py --split test --count 200 --chosen --device cpu   # confirm once
    python bench/frontier.py --report                                         # report the records alone

Settings are searched on held-out problems; the chosen one and those it is compared with are decoded once on
the test split. Every method stops at the first EOS, so that NFE compare like with like. The records hold one
line for each setting; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from frontier_plot import draw

import blockbatch
from blockbatch import tiny
from blockbatch.environment import describe
from blockbatch.evaluation import statistics

RESULTS = Path(__file__).parent / "results"
GEN_LENGTH = 256
ONE_TOKEN, DUAL, PUBLISHED = "vanilla", "dual_cache", "blockbatch"
CHOSEN = {"threshold": 0.8, "tail_threshold": 0.98}


def settings() -> dict[str, dict[str, Any]]:
    """Options of `DecodeConfig` by label: baselines, knobs of BlockBatch one at a time, two thresholds."""
    rows = [{"method": ONE_TOKEN}, {"method": DUAL}, {}]
    rows += [CHOSEN]
    rows += [{"method": DUAL, "threshold": value} for value in (0.8, 0.95, 0.99, None)]
    rows += [{"method": DUAL, "block_size": size} for size in (8, 16, 64, 128)]
    rows += [{"method": "local_leap"}, {"method": "prefix_cache"}]
    rows += [{"threshold": value} for value in (0.7, 0.8, 0.85, 0.95, 0.97, 0.99)]
    heads = (0.5, 0.6, 0.7, 0.8, 0.9)
    rows += [
        {"threshold": head, "tail_threshold": tail}
        for head in heads
        for tail in (0.95, 0.97, 0.98, 0.99, 0.995)
    ]
    rows += [{"block_sizes": sizes} for sizes in BLOCK_SIZES]
    rows += [{"merge_threshold": value} for value in (0.6, 0.7, 0.8, 0.9, None)]
    rows += [{"sync_threshold": value} for value in (0, 4, 16, 32, 64, None)]
    rows += [{"refresh_interval": value} for value in (4, 8, 16, 64, 128, None)]
    rows += [{"commit": "local_leap"}, {"eos_exit": "window"}, {"eos_exit": "none"}]
    rows += [{**CHOSEN, "refresh_interval": value} for value in (16, 64, None)]
    rows += [{**CHOSEN, "sync_threshold": value} for value in (4, None)]
    rows += [{**CHOSEN, "merge_threshold": None}]
    rows += [{**CHOSEN, "block_sizes": sizes} for sizes in ((4, 8, 16, 32), (32, 128), (128,))]
    return {label_of(options): options for options in rows}


BLOCK_SIZES = (
    (4, 8, 16),
    (4, 8, 16, 32),
    (8, 16, 32),
    (16, 32, 64),
    (16, 32, 64, 128),
    (32, 64, 128),
    (32, 64),
    (32,),
    (64,),
    (128,),
    (256,),
    (4, 8, 16, 32, 64, 128, 256),
)


def label_of(options: dict[str, Any]) -> str:
    words = [f"{name} {_short(value)}" for name, value in options.items() if name != "method"]
    return ", ".join([options.get("method", PUBLISHED), *words])


def _short(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value).lower()


def decode(
    model: blockbatch.Model, problems: Sequence[tiny.Problem], options: dict[str, Any], batch_size: int
) -> tuple[list[str], list[int]]:
    """Text and NFE of every problem."""
    config = blockbatch.DecodeConfig(gen_length=GEN_LENGTH, **{"eos_exit": "prefix"} | options)
    texts, nfe = [], []
    for first in range(0, len(problems), batch_size):
        prompts = [problem.prompt for problem in problems[first : first + batch_size]]
        for result in blockbatch.generate(model, prompts, config):
            texts.append(result.text)
            nfe.append(result.nfe.total)
    model.runners = None  # no later setting has this shape: its buffers would only hold memory
    return texts, nfe


class Judge:
    """Whether texts are right; equal texts are judged once."""

    def __init__(self) -> None:
        self._pool, self._known = ThreadPoolExecutor(os.cpu_count() or 1), {}

    def __call__(self, problems: Sequence[tiny.Problem], texts: Sequence[str]) -> list[bool]:
        def judge(problem: tiny.Problem, text: str) -> bool:
            key = problem.prompt, text
            if key not in self._known:
                self._known[key] = tiny.check(problem, text)
            return self._known[key]

        return list(self._pool.map(judge, problems, texts))


def search(model: blockbatch.Model, chosen: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    """Decodes and judges every setting that the records lack, and appends a line for each."""
    begun = time.perf_counter()
    problems = {
        family: tiny.generate_problems(family, options.split, options.count, options.seed)
        for family in tiny.FAMILIES
    }
    known = {_key(record) for record in read_records(options.records)}
    judge = Judge()
    for label, config in chosen.items():
        record = {"setting": label, "options": config}
        record |= {"split": options.split, "count": options.count, "seed": options.seed}
        if _key(record) in known or time.perf_counter() - begun > options.seconds:
            continue
        started, families = time.perf_counter(), {}
        for family, drawn in problems.items():
            texts, nfe = decode(model, drawn, config, options.batch_size)
            right = judge(drawn, texts)
            families[family] = {"right": "".join(str(int(ok)) for ok in right), "nfe": nfe}
        record |= {"seconds": round(time.perf_counter() - started, 2), "families": families}
        record |= {"dtype": str(model.dtype).removeprefix("torch."), **describe(model.device)}
        with options.records.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{label:60} {_summary_line(record)}", flush=True)


def read_records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _key(record: dict[str, Any]) -> str:
    return json.dumps([record[name] for name in ("options", "split", "count", "seed")], sort_keys=True)


def write_report(records: Path, out: Path) -> dict[str, Any]:
    """Writes means, intervals and paired tests of all records as JSON, and returns them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in read_records(records):
        found.setdefault(record["split"], []).append(record)
    report = {
        "command": "python bench/frontier.py --device cuda; "
        "python bench/frontier.py --split test --count 200 --chosen --device cpu",
        "model": "tiny",
        "gen_length": GEN_LENGTH,
        "chosen": label_of(CHOSEN),
        "splits": {split: list(_rows(lines)) for split, lines in found.items()},
    }
    partial = out.with_name(out.name + ".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(out)
    return report


def _rows(records: list[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    references = {record["setting"]: record for record in records}
    for record in records:
        against = {
            label: _compared(record, references[label])
            for label in (ONE_TOKEN, DUAL, PUBLISHED)
            if label in references and label != record["setting"]
        }
        right, nfe = joined(record)
        yield {
            **{name: value for name, value in record.items() if name != "families"},
            **_summary(right, nfe),
            "families": {
                name: _summary(data["right"], data["nfe"]) for name, data in record["families"].items()
            },
            "against": against,
        }


def joined(record: dict[str, Any]) -> tuple[str, list[int]]:
    """Right answers ("1") and NFE of all families."""
    families = record["families"].values()
    return "".join(data["right"] for data in families), [n for data in families for n in data["nfe"]]


def _summary(right: str, nfe: list[int]) -> dict[str, Any]:
    low, high = statistics.wilson(right.count("1"), len(right))
    return {
        "problems": len(right),
        "right": right.count("1"),
        "accuracy": round(right.count("1") / len(right), 4),
        "accuracy_95": [round(low, 4), round(high, 4)],
        "nfe": round(sum(nfe) / len(nfe), 3),
    }


def _compared(record: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    (ours, nfe), (theirs, other) = joined(record), joined(reference)
    only = sum(a > b for a, b in zip(ours, theirs, strict=True))
    only_reference = sum(a < b for a, b in zip(ours, theirs, strict=True))
    change = statistics.bootstrap_ratio(nfe, other)
    points = statistics.paired_difference(only, only_reference, len(ours))
    return {
        "only_this_right": only,
        "only_the_other_right": only_reference,
        "mcnemar_p": round(statistics.mcnemar(only, only_reference), 5),
        "points": round(100 * (only - only_reference) / len(ours), 2),
        "points_95": [round(100 * bound, 2) for bound in points],
        "nfe_ratio": round(change.ratio, 4),
        "nfe_ratio_95": [round(bound, 4) for bound in change.interval_95],
    }


def _summary_line(record: dict[str, Any]) -> str:
    parts = [
        f"{family[:5]} {100 * data['right'].count('1') / len(data['nfe']):5.1f}% "
        f"{sum(data['nfe']) / len(data['nfe']):6.2f}"
        for family, data in record["families"].items()
    ]
    return f"{'  '.join(parts)}  {record['seconds']:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--split", default="held_out", choices=("held_out", "test"))
    parser.add_argument("--count", type=int, default=300, help="problems per family")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--chosen", action="store_true", help="the chosen setting, the published one and the dual cache alone"
    )
    parser.add_argument("--batch-size", type=int, default=300)
    parser.add_argument("--cache-gb", type=float, default=36.0, help="the most that the K/V cache may take")
    parser.add_argument("--device", default=None)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing after these")
    parser.add_argument("--records", type=Path, default=RESULTS / "frontier.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS / "frontier.json")
    parser.add_argument("--report", action="store_true", help="decode nothing; report and picture alone")
    options = parser.parse_args()
    if not options.report:
        cache_bytes = int(options.cache_gb * 1e9)
        model = blockbatch.load_model("tiny", device=options.device, dtype="float32", cache_bytes=cache_bytes)
        rows = settings()
        if options.chosen:
            rows = {label: rows[label] for label in (DUAL, PUBLISHED, label_of(CHOSEN))}
        search(model, rows, options)
    report = write_report(options.records, options.out)
    draw(report, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
