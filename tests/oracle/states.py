"""Random states of a request in the middle of decoding, to test one phase of the policy at a time."""

import random
from dataclasses import replace

import numpy as np

from oracle import policy
from oracle.config import OracleConfig

BLOCK_SIZE_SETS = ((4, 8, 16, 32), (8, 32), (1, 2, 4, 8), (16,), (2, 32), (1, 32), (4, 8, 16, 32, 64))
VOCABULARY, MASK, EOS = 16, 15, (13, 14)


def random_case(seed, cheaper_forwards=False):
    """(phase, config, state, forwards), for `policy.init_phase`, `block_phase` or `refresh_phase`.

    The states keep what every decode keeps: windows are blocks, nothing is masked before a window, a branch
    that is done has no MASK, and in prefix mode no branch is finished already. Branches share most tokens,
    so that they are often compatible; confidences repeat and meet the thresholds exactly, so that ties and
    bounds are tested.
    Token ids are below VOCABULARY, MASK is the MASK id, EOS the ids that end a text.

    cheaper_forwards: query_span, refresh_scope and the prediction offset are drawn too, and K/V that are
    those of another token than the one held.
    """
    rng = random.Random(seed)
    sizes = rng.choice(BLOCK_SIZE_SETS)
    config = OracleConfig(
        gen_length=max(sizes) * rng.choice((1, 2)),
        block_sizes=sizes,
        threshold=rng.choice((0.9, 0.7, 1.0)),
        merge_threshold=rng.choice((0.5, 0.5, 0.75)),
        sync_threshold=rng.choice((1, 4, 8)),
        refresh_interval=rng.choice((8, 16, 32)),
        eos_exit=rng.choice(("prefix", "window", "none")),
        commit=rng.choice(("threshold", "threshold", "local_leap")),
        leap_radius=rng.choice((1, 4)),
        leap_threshold=0.6,
        tail_threshold=rng.choice((None, None, 1.0)),
    ).resolve()
    prompt = [rng.randrange(MASK) for _ in range(rng.randint(1, 9))]
    offset = 0
    if cheaper_forwards:
        config = replace(
            config,
            query_span=rng.choice(("open", "open", "window")),
            refresh_scope=rng.choice(("canvas", "generation")),
        )
        offset = rng.choice((0, 1))
    state = policy.new_state(prompt, config, MASK, EOS, offset)
    phase = rng.choice(("init", "block", "block", "block", "refresh"))
    truth = [rng.randrange(EOS[0]) for _ in range(policy.length_of(state))]
    if phase == "init":
        everything = range(policy.length_of(state))
        forward = random_forward(rng, config, truth, state["branches"][0], everything)
        forward["queries"] = list(everything)
        return phase, config, state, dict.fromkeys(range(len(sizes)), forward)

    front = rng.randrange(config.gen_length)
    for branch in state["branches"]:
        fill(rng, config, state, branch, truth, front)
        if cheaper_forwards:
            fill_cached(rng, state, branch)
    state["refresh_due"] = phase == "refresh"
    rows = policy.refresh_rows(state) if phase == "refresh" else policy.block_rows(state, config)
    forwards = {}
    for i in rows:
        branch = state["branches"][i]
        queries, predicted = queries_of(phase, config, state, branch)
        forwards[i] = random_forward(rng, config, truth, branch, predicted)
        forwards[i]["queries"] = queries
    return phase, config, state, forwards


def queries_of(phase, config, state, branch):
    """The positions that a forward of the branch computes, and those that it predicts."""
    length, offset = policy.length_of(state), state["prediction_offset"]
    window = range(*policy.window_of(state, config, branch))
    if phase == "refresh":
        queries = policy.refresh_queries(state, config)
        return list(queries), range(queries[0] + offset, length)
    if config.query_span == "open":
        queries = policy.open_queries(state, config, branch)
        return queries, [p for p in window if p - offset in queries]
    return [p - offset for p in window], window


def fill(rng, config, state, branch, truth, front):
    """Give one branch of a fresh state the tokens, window and counters of the middle of a decode."""
    start, length = state["prompt_length"], policy.length_of(state)
    size, wrong = branch["block_size"], rng.choice((0.0, 0.0, 0.02, 0.3))
    first_mask = min(max(start + front + rng.randint(-6, 6), start), length - 1)
    w0 = start + (first_mask - start) // size * size
    branch["done"] = rng.random() < 0.08
    in_window, behind = rng.random(), rng.choice((0.0, 0.0, 0.1, 0.5))
    for p in range(start, length):
        known = 1.0 if p < w0 or branch["done"] else in_window if p < w0 + size else behind
        if rng.random() < known:
            branch["tokens"][p] = rng.randrange(EOS[0]) if rng.random() < wrong else truth[p]
    if rng.random() < 0.5 and not (branch["done"] and config.eos_exit == "prefix"):
        p = rng.randrange(start, length)
        unfinished = MASK in branch["tokens"][start:p]
        if config.eos_exit != "prefix" or unfinished:
            branch["tokens"][p] = rng.choice(EOS)
    branch["window"] = (length, length) if branch["done"] else (w0, min(w0 + size, length))
    branch["progress"] = config.gen_length if branch["done"] else w0 - start
    branch["decoded"] = rng.randint(1, 16)
    branch["blocks_since_refresh"] = rng.randint(0, 3)
    branch["needs_refresh"] = rng.random() < 0.1
    earlier = random_forward(rng, config, truth, branch, range(length))
    branch["top"], branch["confidence"] = earlier["top"], earlier["confidence"]


def fill_cached(rng, state, branch):
    """Tokens that the K/V of the generation region were computed from: at times MASK or another's.

    That of a MASK is always a MASK's: tokens never become MASKs.
    """
    stale = rng.choice((0.0, 0.1, 0.5, 1.0))
    for p in range(state["prompt_length"], policy.length_of(state)):
        other = rng.choice((MASK, MASK, rng.randrange(MASK)))
        is_stale = rng.random() < stale and branch["tokens"][p] != MASK
        branch["cached"][p] = other if is_stale else branch["tokens"][p]


def random_forward(rng, config, truth, branch, predicted):
    forward = {"top": {}, "confidence": {}, "probe": {}}
    agreement = rng.choice((0.5, 0.9, 1.0))
    for p in predicted:
        top = truth[p] if rng.random() < agreement else rng.randrange(EOS[0])
        if rng.random() < 0.05:
            top = rng.choice(EOS)
        if rng.random() < 0.01:
            top = MASK
        forward["top"][p] = top
        forward["confidence"][p] = random_probability(rng, config)
        forward["probe"][p] = (
            forward["confidence"][p] if branch["tokens"][p] == top else rng.randrange(9) / 32
        )
    return forward


def random_probability(rng, config):
    exact = (config.threshold, config.merge_threshold, config.leap_threshold)
    value = rng.choice((rng.random(), rng.randrange(17) / 16, rng.choice(exact)))
    return float(np.float32(value))
