"""Triton against the reference with open queries, refreshes of the generation region, and drafts.

`python tests/triton_option_checks.py` runs in Triton's interpreter and prints mismatches as JSON.
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
import drafted
import fast_interpreter
import policy_random
from blockbatch_kernels.ops import dispatch
from oracle.states import random_case
from random_branches import differences, moved
from test_conformance import DATA
from test_pages import as_writes, random_positions, random_table
from triton_checks import against_oracle

STEP_OPERATORS = ("copy_pages", "decode_policy", "initial_plan", "pack_windows", "share_pages")
RECORDS = json.loads((DATA / "open_queries.json").read_text())
# Of the records, some that take few forwards; and decodes that drafts shorten.
DECODED = (19, 35, 45)
DRAFTED = (
    {"method": "dual_cache", "gen_length": 32, "block_size": 16, "eos_exit": "none"},
    {"method": "local_leap", "gen_length": 32, "block_size": 32, "eos_exit": "prefix"},
)


def check_random(seed, device, **limits):
    """Mismatches of a turn of the policy from a random state, all settings random too."""
    state, predictions, plan, params = policy_random.random_batch(seed, **limits)
    if params.query_span != "open":
        state.cached_token.fill_(params.mask_token_id)  # which nobody keeps
    other, other_plan = moved(state, device), moved(plan, device)
    found = differences(bbk.initial_plan(state, params), bbk.initial_plan(other, params, backend="triton"))
    plan, events = bbk.decode_policy(state, predictions, plan, params)
    out = None
    if params.query_span == "open" and seed % 2:  # whatever stands in the plan that is written
        out = policy_random.garbage(other)
    predictions = moved(predictions, device)
    got = bbk.decode_policy(other, predictions, other_plan, params, out=out, backend="triton")
    for pair in ((plan, got[0]), (events, got[1])):
        found += differences(*pair)
    return found + state_differences(state, other)


def state_differences(expected, got):
    """As `differences`, and NaN equals itself."""
    got = moved(got, "cpu")
    assert torch.equal(expected.confidence.isnan(), got.confidence.isnan())
    expected = moved(expected, "cpu")
    expected.confidence.nan_to_num_(-1.0)
    got.confidence.nan_to_num_(-1.0)
    return differences(expected, got)


def is_telling(seed, **limits):
    """Whether the turn of `check_random` ends with open queries or a refresh of the generation region."""
    state, predictions, plan, params = policy_random.random_batch(seed, **limits)
    if params.query_span != "open" and params.refresh_scope != "generation":
        return False
    _, phase, query_tokens, *_ = bbk.decode_policy(state, predictions, plan, params)[0].flags.tolist()
    new = {bbk.structs.PHASE_BLOCK: params.query_span == "open"}
    new[bbk.structs.PHASE_REFRESH] = params.refresh_scope == "generation"
    return query_tokens > 0 and new[phase]


def check_oracle(seed, device):
    """The first difference from the naive oracle after one phase of a random state."""
    phase, config, state, forwards = random_case(seed, cheaper_forwards=True)
    if phase == "refresh" and not forwards:
        return []
    for branch in state["branches"]:
        for position, token in enumerate(branch["tokens"]):
            if token == state["mask_token_id"]:  # in every decode such K/V are those of MASK
                branch["cached"].pop(position, None)
    return against_oracle(phase, config, state, forwards, device)


def check_drafts(seed, case, num_requests, turns, device):
    """Mismatches on the turns of random decodes with drafts, every second one into the plan that came in."""
    generator = torch.Generator().manual_seed(seed)
    state, plan, params = (drafted.midway, drafted.start)[seed % 2](generator, case, num_requests)
    other, other_plan = moved(state, device), moved(plan, device)
    found = differences(bbk.initial_plan(state, params), bbk.initial_plan(other, params, backend="triton"))
    for turn in range(turns):
        if found or not plan.flags[0]:
            break
        predictions = drafted.predictions_of(generator, state, plan, params)
        plan, events = bbk.decode_policy(state, predictions, plan, params)
        out = policy_random.garbage(other)
        out[0].query_position.zero_()  # of no meaning, and left alone
        if turn % 2:
            out = other_plan, out[1]
        other_plan, other_events = bbk.decode_policy(
            other, moved(predictions, device), other_plan, params, out=out, backend="triton"
        )
        for pair in ((state, other), (plan, other_plan), (events, other_events)):
            found += [f"turn {turn}: {text}" for text in differences(*pair)]
    return found


def check_pack(seed, device):
    """Mismatches of packs of random open queries: exact, padded, and cut short."""
    seed = next(s for s in range(100 * seed, 100 * seed + 100) if is_open_block(s))
    state, _, plan, params = policy_random.random_batch(seed, max_requests=3)
    plan.predict.copy_(torch.rand(plan.predict.shape) < 0.6)
    columns = -(-(state.prompt_tokens.shape[1] + state.gen_length) // 4)
    table = torch.randperm(state.num_rows * columns).view(-1, columns).int()
    tokens = int((plan.query_end - plan.query_start).sum())
    found = []
    for capacity, predict_capacity in (
        (tokens, tokens),
        (tokens + 300, tokens + 5),
        (tokens // 2, tokens // 3),
    ):
        options = dict(page_size=4, capacity=capacity, predict_capacity=predict_capacity, scattered=True)
        options["prediction_offset"] = params.prediction_offset
        expected = bbk.pack_windows(state, plan, table, **options)
        got = (moved(state, device), moved(plan, device), table.to(device))
        found += differences(expected, bbk.pack_windows(*got, **options, backend="triton"))
    return found


def is_open_block(seed):
    _, _, plan, params = policy_random.random_batch(seed, max_requests=3)
    return params.query_span == "open" and int(plan.flags[1]) == bbk.structs.PHASE_BLOCK


def check_pages(seed, device):
    """Mismatches after scattered writes into a random table."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    num_requests, num_branches = rng.choice(((1, 1), (1, 6), (3, 2), (2, 4)))
    page_size, columns = rng.choice(((4, 6), (16, 3), (8, 1), (1, 20)))
    table = random_table(rng, num_requests, num_branches, columns)
    kv = torch.randn(2, 2, table.numel(), page_size, 1, 3)
    chosen = [random_positions(rng, page_size * columns, page_size) for _ in range(len(table))]
    start, end, places = as_writes(rng, chosen, page_size * columns, rng.choice((0, 0, 2)))
    if seed % 2:
        places = places.t().contiguous().t()  # any strides
    other_kv, other_table = kv.to(device, copy=True), table.to(device, copy=True)
    bbk.copy_pages(kv, table, start, end, num_branches=num_branches, write_positions=places)
    writes = (x.to(device) for x in (start, end))
    options = dict(num_branches=num_branches, write_positions=places.to(device))
    bbk.copy_pages(other_kv, other_table, *writes, **options, backend="triton")
    same = torch.equal(table, other_table.cpu()) and torch.equal(kv, other_kv.cpu())
    return [] if same else [f"tables {table.tolist()} {other_table.tolist()}"]


def step_operators_alone(name, op, example, **options):
    """In place of `dispatch.module_for`: the model's operators take the interpreter minutes."""
    return _module_for(name if op in STEP_OPERATORS else "reference", op, example, **options)


_module_for = dispatch.module_for


def check_record(model, record):
    """Mismatches of a recorded decode."""
    options = {name: record[name] for name in ("query_span", "refresh_scope")}
    result = blockbatch.generate(
        model, record["prompt"], blockbatch.DecodeConfig(**record["options"], **options)
    )
    nfe = [result.nfe.init, result.nfe.block, result.nfe.refresh]
    same = (result.canvas, nfe) == (record["canvas"], record["nfe"])
    return [] if same else [f"{nfe} for {record['nfe']}: {result.canvas}"]


def check_drafted_decode(model, plain, prompt, options):
    """Mismatches of a decode with drafts: tokens of the one without, forwards of the reference's."""
    expected = blockbatch.generate(plain, prompt, blockbatch.DecodeConfig(**options))
    config = blockbatch.DecodeConfig(**options, drafts=(1, 2))
    reference, result = (blockbatch.generate(each, prompt, config) for each in (plain, model))
    found = []
    if result.canvas != expected.canvas or result.stop_reason != expected.stop_reason:
        found.append(f"expected {expected.canvas}, got {result.canvas}")
    if result.nfe != reference.nfe or not result.nfe.total < expected.nfe.total:
        found.append(f"{result.nfe}, on the reference {reference.nfe}, without drafts {expected.nfe}")
    return found


# What the interpreter runs: batches of few small requests, and decodes with drafts.
LIMITS = dict(max_requests=2, max_branches=3, max_length=32)
RANDOM_SEEDS, DRAFT_SEEDS, DRAFT_TURNS = range(800), range(12), 8


def draft_case(seed):
    return drafted.CASES[seed // 2 % len(drafted.CASES)]


def interpreted_checks():
    """name -> mismatches."""
    cpu = torch.device("cpu")
    results = {}
    for seed in [seed for seed in RANDOM_SEEDS if is_telling(seed, **LIMITS)]:
        results[f"random {seed}"] = check_random(seed, cpu, **LIMITS)
    for seed in range(24):
        results[f"oracle {seed}"] = check_oracle(seed, cpu)
    for seed in DRAFT_SEEDS:
        results[f"drafts {draft_case(seed)}, seed {seed}"] = check_drafts(
            seed, draft_case(seed), 2, DRAFT_TURNS, cpu
        )
    for seed in range(12):
        results[f"pack {seed}"] = check_pack(seed, cpu)
    for seed in range(24):
        results[f"pages {seed}"] = check_pages(seed, cpu)
    dispatch.module_for = step_operators_alone
    model, plain = (
        blockbatch.load_model(DATA, device="cpu", dtype="float32", backend=backend)
        for backend in ("triton", "reference")
    )
    for index in DECODED:
        results[f"decode {index}"] = check_record(model, RECORDS[index])
    for options in DRAFTED:
        results[f"decode {options}"] = check_drafted_decode(model, plain, RECORDS[3]["prompt"], options)
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    fast_interpreter.replace_language_once()
    json.dump(interpreted_checks(), sys.stdout)
