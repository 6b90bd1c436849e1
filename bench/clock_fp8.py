"""Milliseconds of whole decodes with weights in e4m3, beside bf16.

    python bench/clock_fp8.py [--prompt-lengths 1024 160] [--problems 3] [--rounds 2]

The decodes are those of clock.py: a model of random weights in the shape of LLaDA-8B follows recorded decodes
of the built-in model forward by forward, and each must end with the recorded canvas and number of forwards.
So what is compared is the time of the same forwards; what e4m3 does to the forwards of a decode is a matter
of fp8_accuracy.py. The numbers take turns, several rounds of all problems.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import clock_record
import numpy as np
import torch
from clock_record import HEAD_SCALE, SEED, SPLIT
from clock_replay import Section
from clock_settings import DUAL, FAST, GEN_LENGTH, LEAP, PUBLISHED, chosen
from random_models import DTYPES, quantized, random_model
from timing import clean, device_of, parser, rounded, write_report

from blockbatch import tiny
from blockbatch.evaluation import statistics

SHAPE = "llada-8b"
KINDS = ("bf16", "fp8", "fp8-all")
SETTINGS = (FAST, DUAL, LEAP, PUBLISHED)
# Of a decode by the preset "fast" with a prompt of 1024 tokens: times as fast with layers in e4m3.
WANTED = 1.6


def compare(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Lines of every setting, kind of numbers and prompt length."""
    rows = chosen(options.settings)
    traces = {row: clock_record.load(row, options.folder)[1] for row in rows}
    problems = min(options.problems * len(tiny.FAMILIES), min(map(len, traces.values())))
    plain = random_model(options.shapes[0], device, DTYPES[options.dtype], backend=options.backend)
    models = {kind: plain if kind == "bf16" else quantized(plain, kind) for kind in KINDS}
    lines = []
    for prompt_length in options.prompt_lengths:
        sections = {kind: Section(model, prompt_length, traces) for kind, model in models.items()}
        rounds = []
        for number in range(options.rounds):
            until = time.perf_counter() + (options.seconds if number == 0 else float("inf"))
            each = {}
            for kind, section in sections.items():
                each[kind] = section.measure(problems, until)
                # Later ones decode as many problems as the first had the time for.
                problems, until = min(problems, *map(len, each[kind].values())), float("inf")
            rounds.append(each)
        for row in rows:
            spans = {
                kind: np.mean(
                    [[decode.decode_ms for decode in each[kind][row][:problems]] for each in rounds], axis=0
                ).tolist()
                for kind in KINDS
            }
            line = {"prompt_length": prompt_length, "setting": row.label, "problems": problems, "ms": {}}
            for kind, taken in spans.items():
                line["ms"][kind] = float(np.mean(taken))
                if kind != "bf16":
                    change = statistics.bootstrap_ratio(spans["bf16"], taken)
                    line[f"times_as_fast_{kind}"] = change.ratio
                    line[f"times_as_fast_{kind}_95"] = change.interval_95
            lines.append(rounded(line))
            print(lines[-1], flush=True)
        del sections
        clean(device)
    return lines


def main() -> None:
    arguments = parser(__doc__, "clock_fp8", [SHAPE])
    arguments.add_argument("--prompt-lengths", type=int, nargs="*", default=[1024, 160])
    arguments.add_argument("--problems", type=int, default=3, help="to decode, of each family")
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--settings", nargs="*", default=list(SETTINGS), help="of clock_settings.py")
    arguments.add_argument("--folder", default=clock_record.FOLDER, help="of the recorded decodes")
    arguments.add_argument(
        "--seconds", type=float, default=60, help="of the first round of a length, after which none is begun"
    )
    options = arguments.parse_args()
    device = device_of(options)
    lines, targets = compare(options, device), []
    for line in lines:
        if options.shapes == [SHAPE] and line["setting"] == FAST and line["prompt_length"] == 1024:
            ratio = line["times_as_fast_fp8"]
            name = "fast, prompt of 1024: times as fast as in bf16"
            targets.append({"target": name, "measured": ratio, "wanted": WANTED, "reached": ratio >= WANTED})
            print(f"{name}: {ratio:.3f}, at least {WANTED} wanted")
    about = {"split": SPLIT, "seed": SEED, "head_scale": HEAD_SCALE, "gen_length": GEN_LENGTH}
    write_report(options, device, **about, lines=lines, targets=targets)


if __name__ == "__main__":
    main()
