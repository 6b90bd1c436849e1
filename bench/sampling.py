"""Drawn tokens on the built-in models: temperature 0 against greedy decoding, and accuracy at others.

    python bench/sampling.py [--count 4] [--samples 3] [--out bench/results/sampling_cpu.json]

Problems of the built-in models, `--count` of each family, 64 tokens, in fp32. For each line first whether
the operator that draws tokens gives the greedy tokens at temperature 0 (with a ban on MASK, which is never
written, so that it is the one that runs); if it does not, the run ends with status 1. Then at each
temperature, over `--samples` seeds: the share of right answers, of problems that one of the seeds solves,
different texts of a problem (mean), and forwards.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import blockbatch
from blockbatch import tiny
from blockbatch.environment import describe

RESULT = Path(__file__).parent / "results" / "sampling_cpu.json"
GEN_LENGTH, BATCH = 64, 12
TEMPERATURES = (0.3, 0.7, 1.0, 1.5)
# Label, model and options.
LINES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("blockbatch", "tiny", {}),
    ("dual cache", "tiny", dict(method="dual_cache", eos_exit="prefix")),
    ("dual cache, threshold 0.5", "tiny", dict(method="dual_cache", eos_exit="prefix", threshold=0.5)),
    (
        "dual cache, threshold 0.5, top_p 0.9",
        "tiny",
        dict(method="dual_cache", eos_exit="prefix", threshold=0.5, top_p=0.9),
    ),
    ("block diffusion", "tiny-block", dict(method="block_diffusion")),
)


def decode(
    model: blockbatch.Model, prompts: list[str], config: blockbatch.DecodeConfig
) -> list[blockbatch.Result]:
    results = []
    for first in range(0, len(prompts), BATCH):
        results += blockbatch.generate(model, prompts[first : first + BATCH], config)
    return results


def line_of(label: str, model: blockbatch.Model, problems: list, options: dict, samples: int) -> dict:
    begun, prompts = time.perf_counter(), [problem.prompt for problem in problems]
    options = {"gen_length": GEN_LENGTH, **options}
    filters = {name: options.pop(name) for name in ("top_p", "top_k") if name in options}

    def measure(results: list[list[blockbatch.Result]]) -> dict:
        """Of each seed's results."""
        right = [
            [tiny.check(problem, result.text) for problem, result in zip(problems, of_seed, strict=True)]
            for of_seed in results
        ]
        texts = [len({result.text for result in of_problem}) for of_problem in zip(*results, strict=True)]
        return {
            "right": round(statistics.mean(map(statistics.mean, right)), 3),
            "right_by_any_seed": round(statistics.mean(map(any, zip(*right, strict=True))), 3),
            "different_texts": round(statistics.mean(texts), 2),
            "nfe": round(statistics.mean(r.nfe.total for of_seed in results for r in of_seed), 2),
        }

    greedy = decode(model, prompts, blockbatch.DecodeConfig(**options))
    banned = (model.spec.mask_token_id,)
    drawn = decode(model, prompts, blockbatch.DecodeConfig(bad_token_ids=banned, **options))
    same = all(one.canvas == other.canvas for one, other in zip(greedy, drawn, strict=True))
    if not same:
        raise SystemExit(f"{label}: expected the greedy tokens at temperature 0, got others")
    found = {"0": {**measure([greedy]), "equal_to_greedy": same}}
    for temperature in TEMPERATURES:
        configs = [
            blockbatch.DecodeConfig(temperature=temperature, seed=seed, **options, **filters)
            for seed in range(samples)
        ]
        found[str(temperature)] = measure([decode(model, prompts, config) for config in configs])
    print(f"{label}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    return {"label": label, "model": model.name, "temperatures": found}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=4, help="problems of each family")
    parser.add_argument("--samples", type=int, default=3, help="seeds")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    problems = [
        problem
        for family in tiny.FAMILIES
        for problem in tiny.generate_problems(family, "test", options.count, seed=3)
    ]
    models = {name: blockbatch.load_model(name, device="cpu") for name in {line[1] for line in LINES}}
    lines = [line_of(label, models[model], problems, given, options.samples) for label, model, given in LINES]
    report = {
        "command": f"python bench/sampling.py --count {options.count} --samples {options.samples}",
        "date": time.strftime("%Y-%m-%d"),
        "dtype": "float32",
        "backend": "reference",
        **describe(torch.device("cpu")),
        "problems": len(problems),
        "lines": lines,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
