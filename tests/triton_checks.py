"""Triton's policy, packing and cache operators against the reference, bit for bit.

`python tests/triton_checks.py` runs a few cases in Triton's interpreter and prints the mismatches of each as
JSON; `test_triton_policy.py` runs many on a GPU.
"""

import json
import os
import sys

if __name__ == "__main__":  # before triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch

import blockbatch_kernels as bbk
import fast_interpreter
import policy_bridge
from blockbatch_kernels.reference import plan as reference_plan
from oracle import policy
from oracle.states import random_case
from random_branches import differences, moved, params_of, random_batch, random_predictions

LEAP = {"leap_radius": 4, "threshold": 0.7}
FIXED = {"threshold": None, "refresh_interval": 16}
# (block sizes, generated length, settings): every commit rule, EOS exit and span, one branch and many.
POLICY_CASES = [
    ((4, 8, 16, 32), 64, {}),
    (
        (2, 4, 8, 16, 32),
        64,
        {"sync_threshold": 1, "tail_threshold": 0.95, "refresh_interval": 8, "prediction_offset": 1},
    ),
    ((4, 8, 16), 48, {"eos_exit": "none", "merge_threshold": 0.75, "threshold": 1.0}),
    ((4, 8, 16, 32), 64, {"eos_exit": "window", "sync_threshold": 4, "tail_threshold": 0.9, **LEAP}),
    ((3, 9), 27, {"eos_exit": "window", "prediction_offset": 1, "refresh_interval": None}),
    ((8, 16), 32, {**LEAP, "leap_radius": 1, "query_span": "suffix"}),
    ((16,), 64, {**FIXED, "steps_per_block": 5, "eos_exit": "none", "query_span": "canvas"}),
    ((4, 8), 32, {**FIXED, "steps_per_block": 3, "prediction_offset": 1, "query_span": "suffix"}),
    ((1,), 1, {}),
    ((4, 8, 16, 32), 64, {"query_span": "open", "refresh_interval": 16, "sync_threshold": 1}),
    (
        (2, 4, 8),
        32,
        {
            "query_span": "open",
            "refresh_scope": "generation",
            "prediction_offset": 1,
            "eos_exit": "window",
            "sync_threshold": 1,
        },
    ),
    ((8, 16), 48, {"refresh_scope": "generation", "prediction_offset": 1, "refresh_interval": 8}),
]


def check_policy(seed, case, num_requests, turns, device, max_prompt=9):
    """Mismatches over some turns from a random state, every second one into the plan that came in."""
    block_sizes, gen_length, options = case
    generator, params = torch.Generator().manual_seed(seed), params_of(**options)
    state, truth = random_batch(generator, params, block_sizes, gen_length, num_requests, max_prompt)
    other = moved(state, device)
    found = differences(bbk.initial_plan(state, params), bbk.initial_plan(other, params, backend="triton"))
    plan = reference_plan.next_plan(state, params)
    if seed % 3 == 0:  # an init in the middle of things is no less defined
        plan = bbk.initial_plan(state, params)
    other_plan = moved(plan, device)
    for turn in range(turns):
        predictions = random_predictions(generator, params, plan, truth)
        plan, events = bbk.decode_policy(state, predictions, plan, params)
        out = None
        if turn % 2:
            out = other_plan, bbk.PolicyEvents.allocate(*state.tokens.shape, device)
        other_plan, other_events = bbk.decode_policy(
            other, moved(predictions, device), other_plan, params, out=out, backend="triton"
        )
        for pair in ((state, other), (plan, other_plan), (events, other_events)):
            found += [f"turn {turn}: {text}" for text in differences(*pair)]
        if found:
            break
    return found


def check_pack(seed, case, num_requests, device, max_prompt=9):
    """Mismatches of packs of a random plan: exact, padded, cut short, and of some rows alone."""
    block_sizes, gen_length, options = case
    generator, params = torch.Generator().manual_seed(seed), params_of(**options)
    state, _ = random_batch(generator, params, block_sizes, gen_length, num_requests, max_prompt)
    plan = bbk.initial_plan(state, params) if seed % 2 else reference_plan.next_plan(state, params)
    tokens, predictions = plan.flags[2:4].tolist()
    scattered = params.query_span == "open" and int(plan.flags[1]) == bbk.structs.PHASE_BLOCK
    page_size = (4, 16)[seed // 2 % 2]
    columns = -(-(max_prompt + gen_length) // page_size)
    page_table = torch.randperm(state.num_rows * columns, generator=generator).view(-1, columns).int()
    half = torch.arange(state.num_rows) < state.num_rows // 2
    some_rows = plan._replace(query_start=plan.query_start * half, query_end=plan.query_end * half)
    found = []
    for name, chunk, capacity, predict_capacity in (
        ("exact", plan, tokens, predictions),
        ("padded", plan, tokens + 700, predictions + 300),
        ("short", plan, tokens // 2, predictions // 3),
        ("short of tokens", plan, tokens // 2, predictions),
        ("none", plan, 0, 0),
        ("some rows", some_rows, tokens, predictions),
    ):
        options = dict(page_size=page_size, capacity=capacity, predict_capacity=predict_capacity)
        options |= dict(prediction_offset=params.prediction_offset, scattered=scattered)
        expected = bbk.pack_windows(state, chunk, page_table, **options)
        got = bbk.pack_windows(
            moved(state, device), moved(chunk, device), page_table.to(device), **options, backend="triton"
        )
        found += [f"{name}: {text}" for text in differences(expected, got)]
    return found


def check_pages(seed, shape, turns, device, dtype=torch.float32):
    """Mismatches over a random history of writes and shares: tables, contents, and what each row reads."""
    num_requests, num_branches, columns, page_size, kv_heads, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    rows, length = num_requests * num_branches, columns * page_size
    kv = torch.randn(3, 2, rows * columns, page_size, kv_heads, head_dim, generator=generator).to(dtype)
    table = torch.full((rows, columns), -1, dtype=torch.int32)
    other_kv, other_table = kv.to(device, copy=True), table.to(device, copy=True)
    plain = torch.full((rows, length), float("nan"))  # every row's own copy of its contents
    first_row = torch.arange(rows) // num_branches * num_branches
    found = []
    for turn in range(turns):
        start = torch.randint(length, (rows,), generator=generator)
        end = start + torch.randint(-length // 4, length // 2, (rows,), generator=generator)
        end = torch.minimum(torch.maximum(start, end), torch.tensor(length))
        if turn == 0:  # the first forward computes one row of each request whole
            start, end = torch.zeros(rows).long(), torch.where(first_row == torch.arange(rows), length, 0)
        ranges = start.int(), end.int()
        bbk.copy_pages(kv, table, *ranges, num_branches=num_branches)
        bbk.copy_pages(
            other_kv,
            other_table,
            *(x.to(device) for x in ranges),
            num_branches=num_branches,
            backend="triton",
        )
        if not torch.equal(kv, other_kv.cpu()):
            found.append(f"turn {turn}: {int((kv != other_kv.cpu()).sum())} elements copied")
        for row in range(rows):
            for position in range(int(start[row]), int(end[row])):
                page, offset = int(table[row, position // page_size]), position % page_size
                plain[row, position] = turn * 8 + row % 8
                for cache in (kv, other_kv):
                    cache[:, :, page, offset] = plain[row, position]
        source = first_row.clone()
        if turn:
            source = torch.where(torch.rand(rows, generator=generator) < 0.3, first_row, torch.arange(rows))
            source[torch.rand(rows, generator=generator) < 0.2] = -1
        bbk.share_pages(table, source.int())
        bbk.share_pages(other_table, source.int().to(device), backend="triton")
        plain = plain[torch.where(source < 0, torch.arange(rows), source)]
        if not torch.equal(table, other_table.cpu()):
            found.append(f"turn {turn}: tables {table.tolist()} {other_table.tolist()}")
        if not torch.equal(kv, other_kv.cpu()):
            found.append(f"turn {turn}: {int((kv != other_kv.cpu()).sum())} elements of the cache")
        seen = other_kv.cpu()[:, :, other_table.cpu().long()].flatten(3, 4)[..., 0, 0]
        if not (seen == plain).all():
            found.append(f"turn {turn}: rows read other contents than they wrote")
        if found:
            break
    return found


PAGE_SHAPES = [
    (1, 1, 3, 4, 1, 1),
    (1, 6, 4, 4, 1, 3),
    (3, 2, 5, 2, 2, 4),
    (2, 4, 3, 8, 1, 8),
    (1, 9, 20, 1, 1, 1),
]


def check_oracle(seed, device):
    """The first difference from the naive oracle after one phase of a random state."""
    return against_oracle(*random_case(seed), device)


def against_oracle(phase, config, state, forwards, device):
    """The first difference from the naive oracle after this phase of this state, which it changes."""
    params = policy_bridge.params_of(config, state)
    other = moved(policy_bridge.to_tensors([state], params), device)
    plan, predictions = policy_bridge.step_inputs([state], [forwards], phase, config.query_span)
    plan, events = bbk.decode_policy(
        other, moved(predictions, device), moved(plan, device), params, backend="triton"
    )
    getattr(policy, f"{phase}_phase")(state, config, forwards)
    try:
        policy_bridge.assert_same([state], [config], other, plan, events)
        policy_bridge.assert_plan(state, config, plan)
    except AssertionError as error:
        return [f"{phase}, {config}: {error}"]
    return []


# Index and seed of policy cases that bring, in two turns, all three phases and what is rare: branches that
# differ only behind an EOS, a merge that completes a window, two branches that end with different scores.
INTERPRETED = ((0, 28), (0, 3), (1, 48), (2, 2), (3, 6), (3, 66), (4, 2), (5, 7), (6, 0), (7, 1), (8, 1))


def interpreted_checks():
    """name -> mismatches, a few small cases of each operator."""
    cpu = torch.device("cpu")
    results = {}
    for index, seed in INTERPRETED:
        results[f"policy {POLICY_CASES[index]}, seed {seed}"] = check_policy(
            seed, POLICY_CASES[index], 2, 2, cpu
        )
    for seed in (3, 6, 8, 13, 16, 18):
        results[f"policy oracle {seed}"] = check_oracle(seed, cpu)
    for seed, case in enumerate(POLICY_CASES[4:8]):
        results[f"pack {case}"] = check_pack(seed, case, 2, cpu)
    for seed, shape in enumerate(PAGE_SHAPES):
        results[f"pages {shape}"] = check_pages(seed, shape, 3, cpu)
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    fast_interpreter.replace_language_once()
    json.dump(interpreted_checks(), sys.stdout)
