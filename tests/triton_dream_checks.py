"""Triton's version of Dream's published rule against the reference: `check_batch` for any device.

As a script it interprets Triton on the CPU and prints the mismatches by case as JSON.
"""

import json
import os
import random
import sys

if __name__ == "__main__":  # before triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch

import blockbatch
import blockbatch_kernels as bbk
import fast_interpreter
from blockbatch.generation import generate
from dream_random import random_batch
from oracle import ScriptedModel
from oracle.dream_decoder import DreamConfig, decode
from random_branches import differences, moved
from scripted_engine import EngineScripted


def check_batch(seed, device, **limits):
    """The fields that differ from the reference after one turn, in the plan of it and in the initial plan."""
    state, predictions, plan, params = random_batch(seed, **limits)
    other, given, other_plan = (moved(record, device) for record in (state, predictions, plan))
    expected = bbk.decode_policy(state, predictions, plan, params, backend="reference")
    out = None
    if seed % 2:  # the plan that comes in is the one that goes out
        out = other_plan, bbk.PolicyEvents.allocate(state.num_rows, state.gen_length, torch.device(device))
    got = bbk.decode_policy(other, given, other_plan, params, out=out, backend="triton")
    pairs = [(state, other), (expected[0], got[0]), (expected[1], got[1])]
    both = (state, "reference"), (other, "triton")
    pairs.append(tuple(bbk.initial_plan(one, params, backend=name) for one, name in both))
    for record in (state, other):  # one NaN is not equal to the other
        record.confidence.nan_to_num_(nan=-2.0)
    return [text for pair in pairs for text in differences(*pair)]


def check_decode(seed):
    """A whole decode of the scripted engine on Triton's policy, packing and pages, against the oracle."""
    rng = random.Random(seed)
    model = ScriptedModel(seed, peak=(1.0, 8.0), eos_rate=0.05, prediction_offset=1, suppress_mask=True)
    options = dict(gen_length=16, block_sizes=(2, 4, 8), sync_threshold=2, refresh_interval=6)
    options["eos_exit"] = rng.choice(("prefix", "none"))
    expected = decode(model, [1, 2, 3], DreamConfig(**options))
    engine = EngineScripted(model, page_size=4)
    engine.backend = "triton"
    result = generate(engine, [1, 2, 3], blockbatch.DecodeConfig(**options, policy="dream_published"))
    found = [] if result.canvas == expected.canvas else [f"canvas: {expected.canvas}, {result.canvas}"]
    nfe = result.nfe.init, result.nfe.block, result.nfe.refresh
    if nfe != (expected.nfe_init, expected.nfe_block, expected.nfe_refresh):
        found.append(f"forwards: {nfe}")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    fast_interpreter.replace_language_once()
    results = {f"batch {seed}": check_batch(seed, "cpu", max_requests=2, max_length=40) for seed in range(24)}
    results |= {f"decode {seed}": check_decode(seed) for seed in range(2)}
    json.dump(results, sys.stdout)
