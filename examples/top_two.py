"""A commit rule of one's own: the two surest tokens of every window are written, however sure they are.

    python examples/top_two.py "Divide with remainder until zero: 51 and 16."
    blockbatch generate "PROMPT" --plugin examples/top_two.py --method top_two

A step then always costs one forward and brings two tokens, as with the fixed schedules of LLaDA's sampler.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import blockbatch


def top_two(state: blockbatch.RuleState, candidates: Tensor, confidence: Tensor) -> Tensor:
    # [rows, gen_length]; 0 where nothing is to be chosen, and what is chosen there does not count.
    best = confidence.topk(min(2, confidence.shape[1]), dim=1).indices
    return torch.zeros_like(candidates).scatter(1, best, True)


blockbatch.register_method(
    "top_two",
    blockbatch.commit_rule(top_two),
    title="top two",
    summary="the dual cache, two tokens a step",
    replace=True,
)


def main(prompt: str, model_name: str = "tiny") -> None:
    model = blockbatch.load_model(model_name)
    config = blockbatch.DecodeConfig(method="top_two", gen_length=64, eos_exit="prefix")
    result = blockbatch.generate(model, prompt, config)
    print(result.text)
    print(f"{len(result.tokens)} tokens, {result.nfe.total} forwards")


if __name__ == "__main__":
    main(*sys.argv[1:])
