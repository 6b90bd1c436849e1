"""Small mixes of requests with Triton's policy, packing and pages, as JSON: name -> what went wrong."""

import json
import os
import sys

if __name__ == "__main__":  # before triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch

import blockbatch
import fast_interpreter
from engine_mixes import random_mix, scripted

# Seed, whether by Dream's rules, and settings; None: random ones.
CASES = (
    (1, False, None),
    (2, False, {"gen_length": 16, "method": "dual_cache", "block_size": 8, "drafts": (1, 2)}),
    (3, True, None),
)


def interpreted_checks():
    found = {}
    for seed, dream, given in CASES:
        model = scripted(seed, dream, backend="triton")
        try:
            config = given and blockbatch.DecodeConfig(**given)
            options = dict(gen_lengths=(8,), max_requests=2, max_tokens_per_step=20)
            random_mix(model, seed, 3, dream=dream, config=config, **options)
            found[f"mix {seed}"] = []
        except AssertionError as error:
            found[f"mix {seed}"] = [str(error)]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    fast_interpreter.replace_language_once()
    json.dump(interpreted_checks(), sys.stdout)
