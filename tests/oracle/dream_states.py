"""Random states of a request in the middle of decoding by Dream's published rule, to test one phase of it."""

import random

import numpy as np

from oracle import dream_policy as policy
from oracle.dream_decoder import DreamConfig
from oracle.states import BLOCK_SIZE_SETS, EOS, MASK


def random_case(seed):
    """(phase, config, state, forwards), for `full_phase` ("init", "refresh") or `block_phase` ("block").

    Branches share most tokens, so that they are often compatible, and predict what others hold.
    Probabilities repeat and meet 0.2, one half and the threshold exactly, so that ties and bounds are tested.
    """
    rng = random.Random(seed)
    sizes = rng.choice(BLOCK_SIZE_SETS)
    config = DreamConfig(
        gen_length=max(sizes) * rng.choice((1, 2)),
        block_sizes=sizes,
        threshold=rng.choice((0.9, 0.7, 1.0)),
        sync_threshold=rng.choice((1, 4, 8, None)),
        refresh_interval=rng.choice((8, 16, 32, None)),
        eos_exit=rng.choice(("prefix", "none")),
    )
    prompt = [rng.randrange(MASK) for _ in range(rng.randint(1, 9))]
    state = policy.new_state(prompt, config, MASK, EOS)
    phase = rng.choice(("init", "block", "block", "block", "block", "refresh"))
    truth = [rng.randrange(EOS[0]) for _ in range(policy.length_of(state))]
    if phase != "init":
        front = rng.randrange(config.gen_length)
        for branch in state["branches"]:
            fill(rng, state, branch, truth, front)
    state["refresh_due"] = phase == "refresh"
    forwards = {}
    for i in range(len(sizes)):
        predicted = range(len(prompt), policy.length_of(state))
        forwards[i] = random_forward(rng, config, state, truth, predicted)
        if phase == "init":
            return phase, config, state, dict.fromkeys(range(len(sizes)), forwards[0])
    return phase, config, state, forwards


def fill(rng, state, branch, truth, front):
    """Gives a branch of a fresh state tokens, map and counter of the middle of a decode; it stays open."""
    start, length = state["prompt_length"], policy.length_of(state)
    first_mask = min(max(start + front + rng.randint(-6, 6), start), length - 1)
    in_front, behind, wrong = (
        rng.random(),
        rng.choice((0.0, 0.3, 0.9)),
        rng.choice((0.0, 0.0, 0.0, 0.0, 0.02, 0.3)),
    )
    for p in range(start, length):
        known = 1.0 if p < first_mask else in_front if p < first_mask + 8 else behind
        if p != first_mask and rng.random() < known:
            branch["tokens"][p] = rng.randrange(EOS[0]) if rng.random() < wrong else truth[p]
    if rng.random() < 0.5 and first_mask + 1 < length:
        branch["tokens"][rng.randrange(first_mask + 1, length)] = rng.choice(EOS)
    for p in range(start, length):
        if rng.random() < 0.5:
            branch["map"][p] = random_likely(rng, truth[p], number=rng.randint(1, 6))
    branch["since"] = rng.randint(0, 20)
    policy.realign(state, branch)


def random_likely(rng, token, number=4):
    """{token: probability}, in no order; often the expected token is one of them."""
    tokens = [token] if rng.random() < 0.9 else []
    tokens += [other for other in rng.sample(range(MASK + 1), number) if other != token]
    values = (0.25, 0.49, 0.5, 0.5, 0.75, 0.9, rng.uniform(0.21, 1.0))
    return {other: np.float32(rng.choice(values)) for other in tokens[:number]}


def random_forward(rng, config, state, truth, predicted):
    forward = {"top": {}, "confidence": {}, "likely": {}}
    agreement, level = rng.choice((0.5, 0.9, 1.0)), rng.choice((0.3, 1.0))
    for p in predicted:
        top = truth[p] if rng.random() < agreement else rng.randrange(EOS[0])
        forward["top"][p] = rng.choice(EOS) if rng.random() < 0.1 else top
        value = rng.choice((rng.random(), rng.randrange(17) / 16, config.threshold)) * level
        forward["confidence"][p] = float(np.float32(value))
        forward["likely"][p] = random_likely(rng, truth[p]) if rng.random() < 0.7 else {}
    return forward
