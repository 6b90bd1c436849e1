"""A rule that says what the published one says, against the policy itself, on random batches.

As a program: in Triton's interpreter, with what differs as JSON.
"""

import copy
import dataclasses
import json
import os

if __name__ == "__main__":  # before triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch

import blockbatch_kernels as bbk
import fast_interpreter
from blockbatch.decoding.rule import CHOSEN, CommitRule, RuleRun
from policy_random import garbage, random_batch, to_device


def at_threshold(state, candidates, confidence):
    return confidence >= state.options["threshold"]


def mismatches(seed, device="cpu", backend=None):
    """Fields of state, plan and events that differ; None: the case is none that a rule may have."""
    state, predictions, plan, params = random_batch(seed)
    threshold = 0.75 if params.threshold is None else params.threshold
    params = dataclasses.replace(
        params, threshold=threshold, steps_per_block=None, tail_threshold=None, leap_radius=0
    )
    broken = not (predictions.confidence.isfinite().all() and state.confidence.isfinite().all())
    if broken or (params.eos_exit == "window" and state.num_branches > 1):
        return None

    published, ours = to_device(state, device), to_device(state, device)
    expected, got = garbage(published), garbage(ours)
    bbk.decode_policy(
        published,
        to_device(predictions, device),
        to_device(plan, device),
        params,
        out=expected,
        backend=backend,
    )
    rule = CommitRule("copy", at_threshold, (("threshold", threshold),))
    run = RuleRun(rule, dataclasses.replace(params, threshold=CHOSEN), copy.deepcopy(ours))
    run.decode_policy(ours, to_device(predictions, device), to_device(plan, device), got, backend)
    found = [name for name, value in vars(published).items() if not torch.equal(value, getattr(ours, name))]
    for one, other in zip(expected, got, strict=True):
        found += [name for name, a, b in zip(one._fields, one, other, strict=True) if not torch.equal(a, b)]
    return found


if __name__ == "__main__":
    fast_interpreter.replace_language_once()
    results = {seed: mismatches(seed, backend="triton") for seed in range(60)}
    print(json.dumps({seed: found for seed, found in results.items() if found is not None}))
