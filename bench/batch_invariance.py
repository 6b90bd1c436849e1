"""How far a request's decode depends on what else is in its batch.

    python bench/batch_invariance.py [--count 24] [--out bench/results/batch_invariance.json]

Attention works on each row alone, so only the matrix library can make a difference: it may sum in another
order when a product has more rows. Reported: prompts whose canvas and NFE are the same alone and in a batch,
and the largest difference between the confidences of the same commits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from decode_cpu import sample_prompts

import blockbatch
from blockbatch.environment import describe

RESULT = Path(__file__).parent / "results" / "batch_invariance.json"


def commits(trace: list[dict]) -> dict[tuple[int, int, int], float]:
    """(forward, branch, position) -> confidence."""
    return {
        (index, change["branch"], position): confidence
        for index, record in enumerate(trace)
        for change in record["commits"]
        for position, confidence in zip(change["positions"], change["confidence"], strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=24, help="prompts, a third from each family")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    model = blockbatch.load_model("tiny", device="cpu")
    prompts = sample_prompts(options.count // 3)
    config = blockbatch.DecodeConfig(gen_length=256, trace=True)
    together = blockbatch.generate(model, prompts, config)
    same, difference = 0, 0.0
    for prompt, result in zip(prompts, together, strict=True):
        alone = blockbatch.generate(model, prompt, config)
        if (alone.canvas, alone.nfe) == (result.canvas, result.nfe):
            same += 1
            ours, theirs = commits(alone.trace), commits(result.trace)
            difference = max([difference, *(abs(ours[key] - theirs[key]) for key in ours)])
    report = {
        "command": f"python bench/batch_invariance.py --count {options.count}",
        **describe(model.device),
        "prompts_in_one_batch": len(prompts),
        "same_canvas_and_nfe": same,
        "largest_confidence_difference": difference,
    }
    print(json.dumps(report, indent=1))
    options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
