"""A commit rule with a memory: a token is written once two forwards in a row predicted it.

    python examples/stable_tokens.py "Divide with remainder until zero: 51 and 16."
    blockbatch generate "PROMPT" --plugin examples/stable_tokens.py --method stable_tokens --threshold 0.7

It follows the idea of KLASS (arXiv 2511.05664), which commits where a prediction is sure and hardly changes
from step to step. KLASS measures the change as the divergence of two whole distributions; a rule sees the
most probable token alone, so that here it is whether that stays the same. The results are not KLASS's.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import blockbatch


def stable_tokens(state: blockbatch.RuleState, candidates: Tensor, confidence: Tensor) -> Tensor:
    # What the last forward predicted, plus 1: 0, which every request begins with, is no prediction.
    seen = state.memory["seen"]
    stable = seen == state.top_token + 1
    # Rows that were not in this forward, and positions outside of the windows, keep what they had.
    seen.copy_(torch.where(candidates, state.top_token + 1, seen))
    return stable & (confidence >= state.options["threshold"])


blockbatch.register_method(
    "stable_tokens",
    blockbatch.commit_rule(
        stable_tokens, base="blockbatch", options={"threshold": 0.6}, memory={"seen": torch.int32}
    ),
    title="stable tokens",
    summary="BlockBatch's branches; commits what two forwards in a row predict",
    replace=True,
)


def main(prompt: str, model_name: str = "tiny") -> None:
    model = blockbatch.load_model(model_name)
    config = blockbatch.DecodeConfig(method="stable_tokens", gen_length=64)
    result = blockbatch.generate(model, prompt, config)
    print(result.text)
    print(f"{len(result.tokens)} tokens, {result.nfe.total} forwards")


if __name__ == "__main__":
    main(*sys.argv[1:])
