"""Accuracy and NFE of the built-in model by method and family on a fixed, seeded part of the test split.

    python bench/accuracy.py [--count 200] [--out bench/results/accuracy.json]

Every method decodes the same problems, in batches, and stops at the first EOS; one token per step, which is
slow, only the first of them. An interval is Wilson's, 95%.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import blockbatch
from blockbatch import tiny
from blockbatch.environment import describe

RESULT = Path(__file__).parent / "results" / "accuracy.json"
GEN_LENGTH = 256
# The last row shows what small blocks with a stricter threshold give.
SETTINGS = {
    "one token per step": {"method": "vanilla", "eos_exit": "prefix"},
    "dual_cache": {"method": "dual_cache", "eos_exit": "prefix"},
    "prefix_cache": {"method": "prefix_cache", "eos_exit": "prefix"},
    "local_leap": {"method": "local_leap", "eos_exit": "prefix"},
    "blockbatch": {"method": "blockbatch"},
    "blockbatch, careful": {"method": "blockbatch", "block_sizes": (4, 8, 16), "threshold": 0.95},
}


def wilson(right: int, count: int) -> tuple[float, float]:
    """95% interval of a proportion."""
    z, share = 1.96, right / count
    middle = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (middle - spread) / scale, (middle + spread) / scale


def evaluate(model: blockbatch.Model, problems: list, options: dict, batch_size: int) -> dict:
    config = blockbatch.DecodeConfig(gen_length=GEN_LENGTH, **options)
    right = nfe = tokens = 0
    begun = time.perf_counter()
    for first in range(0, len(problems), batch_size):
        batch = problems[first : first + batch_size]
        for problem, result in zip(
            batch, blockbatch.generate(model, [p.prompt for p in batch], config), strict=True
        ):
            right += tiny.check(problem, result.text)
            nfe += result.nfe.total
            tokens += len(result.tokens)
    low, high = wilson(right, len(problems))
    return {
        "count": len(problems),
        "right": right,
        "accuracy": round(right / len(problems), 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "nfe_mean": round(nfe / len(problems), 2),
        "tokens_mean": round(tokens / len(problems), 1),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200, help="problems per family")
    parser.add_argument("--slow-count", type=int, default=50, help="the first so many for one token per step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--methods", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    model = blockbatch.load_model("tiny", device=options.device, dtype=options.dtype)
    results: dict[str, dict] = {}
    for family in tiny.FAMILIES:
        problems = tiny.generate_problems(family, "test", options.count, options.seed)
        for method in options.methods:
            count = options.slow_count if method == "one token per step" else options.count
            row = evaluate(model, problems[:count], SETTINGS[method], options.batch_size)
            results.setdefault(family, {})[method] = row
            print(f"{family:11} {method:19} {row}", flush=True)
    report = {
        "command": f"python bench/accuracy.py --count {options.count} --slow-count {options.slow_count} "
        f"--seed {options.seed} --batch-size {options.batch_size}",
        "split": "test",
        "gen_length": GEN_LENGTH,
        "dtype": str(model.dtype),
        **describe(model.device),
        "settings": {name: SETTINGS[name] for name in options.methods},
        "families": results,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
