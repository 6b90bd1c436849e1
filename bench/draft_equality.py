"""Decodes with drafts against the same decodes without: equal canvases, in how many fewer block steps.

    python bench/draft_equality.py [--device cpu] [--count 100] [--methods dual_cache,local_leap]

Problems of the built-in model, `--count` of each family, in fp32. A line for each method, threshold and set
of drafts: how many canvases are equal to those without drafts, block steps without and with, and adopted
drafts; each also by family. Every adopted draft is one block step less (`steps_saved_as_adopted` counts the
problems of which that is true). The script ends with status 1 if that fails or a canvas differs, after it has
written its report.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import blockbatch
from blockbatch import tiny
from blockbatch.environment import describe

RESULT = Path(__file__).parent / "results" / "draft_equality.json"
DRAFTS = ((1,), (1, 2), (1, 2, 3))
THRESHOLDS = (0.9, 0.99)


def decode(model, prompts: list[str], batch_size: int, **options) -> list[blockbatch.Result]:
    config = blockbatch.DecodeConfig(**options)
    results = []
    for first in range(0, len(prompts), batch_size):
        results += blockbatch.generate(model, prompts[first : first + batch_size], config)
    return results


def compare(plain: list, drafted: list) -> dict:
    """Counts over decodes of the same prompts."""
    adopted = [result.branches[0].adopted for result in drafted]
    return {
        "total": len(plain),
        "equal": sum(one.canvas == other.canvas for one, other in zip(plain, drafted, strict=True)),
        "block_steps_without": sum(result.nfe.block for result in plain),
        "block_steps_with": sum(result.nfe.block for result in drafted),
        "adopted": sum(adopted),
        "steps_saved_as_adopted": sum(
            one.nfe.block - other.nfe.block == count
            for one, other, count in zip(plain, drafted, adopted, strict=True)
        ),
    }


def lines(model, options: argparse.Namespace, common: dict) -> Iterator[dict]:
    families = {
        family: [problem.prompt for problem in tiny.generate_problems(family, "test", options.count, 1)]
        for family in tiny.FAMILIES
    }
    for method in options.methods.split(","):
        for threshold in options.thresholds:
            settings = {**common, "method": method, "threshold": threshold}
            plain = {
                family: decode(model, prompts, options.batch_size, **settings)
                for family, prompts in families.items()
            }
            for drafts in options.drafts:
                begun = time.perf_counter()
                by_family, ours, theirs = {}, [], []
                for family, prompts in families.items():
                    drafted = decode(model, prompts, options.batch_size, drafts=drafts, **settings)
                    by_family[family] = compare(plain[family], drafted)
                    ours, theirs = [*ours, *drafted], [*theirs, *plain[family]]
                total = compare(theirs, ours)
                saved = 1 - total["block_steps_with"] / total["block_steps_without"]
                yield {
                    "method": method,
                    "threshold": threshold,
                    "drafts": list(drafts),
                    **total,
                    "block_steps_saved": round(saved, 4),
                    "families": by_family,
                    "seconds": round(time.perf_counter() - begun, 1),
                }


def integers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend")
    parser.add_argument("--count", type=int, default=100, help="problems of each family (100)")
    parser.add_argument("--methods", default="dual_cache", help="dual_cache,local_leap (dual_cache)")
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS)
    parser.add_argument("--drafts", type=integers, nargs="+", default=DRAFTS, metavar="1,2")
    parser.add_argument("--gen-length", type=int, default=128)
    parser.add_argument("--eos-exit", default="prefix")
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = blockbatch.load_model("tiny", device=options.device, dtype="float32", backend=options.backend)
    common = {"gen_length": options.gen_length, "eos_exit": options.eos_exit}
    report = {
        "command": " ".join(["python", "bench/draft_equality.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **describe(model.device),
        "dtype": "float32",
        "backend": options.backend,
        **common,
        "batch_size": options.batch_size,
        "lines": [],
    }
    for line in lines(model, options, common):
        report["lines"].append(line)
        print(json.dumps({name: value for name, value in line.items() if name != "families"}), flush=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    bad = [
        line
        for line in report["lines"]
        if not line["equal"] == line["total"] == line["steps_saved_as_adopted"]
    ]
    if bad:
        raise SystemExit(f"draft_equality: expected equal decodes in every line, got {len(bad)} of others")


if __name__ == "__main__":
    main()
