"""Random batches for the policy "dream_published", far wider than what a decode meets: any mix of finished
and running requests, tokens and windows anywhere, up to 32 branches. For backends against the reference."""

import random

import torch

import blockbatch_kernels as bbk
from policy_random import EOS, MASK, confidences, flags, random_plan


def random_batch(seed, max_requests=4, max_branches=8, max_length=96):
    """(state, predictions, plan, params) on the CPU."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    requests, branches = rng.randint(1, max_requests), rng.randint(1, max_branches)
    sizes = sorted(rng.choice((1, 2, 3, 4, 8, 16, 32, 64)) for _ in range(branches))
    gen_length = rng.randint(1, max_length)
    params = bbk.PolicyParams(
        mask_token_id=MASK,
        eos_token_ids=rng.choice((EOS, EOS[:1], ())),
        threshold=rng.choice((0.5, 0.9, 1.0)),
        sync_threshold=rng.choice((0, 1, 8, 2**30)),
        refresh_interval=rng.choice((None, 1, 16, 64)),
        eos_exit=rng.choice(("prefix", "none")),
        prediction_offset=rng.choice((0, 1)),
        policy="dream_published",
    )
    state = random_state(rng, requests, sizes, gen_length)
    plan = random_plan(rng, state, params)
    return state, random_predictions(rng, state, plan), plan, params


def random_state(rng, requests, sizes, gen_length):
    rows, shape = requests * len(sizes), (requests * len(sizes), gen_length)
    lengths = torch.randint(1, 9, (requests,), dtype=torch.int32)
    prompts = torch.zeros(requests, int(lengths.max()), dtype=torch.int32)
    sizes = torch.tensor(sizes, dtype=torch.int32)
    entries = rng.choice((1, 3, 20))
    state = bbk.BranchState.create(prompts, lengths, sizes, gen_length, MASK, entries)
    truth = torch.randint(0, 13, (requests, gen_length), dtype=torch.int32)
    truth = truth.repeat_interleave(len(sizes), 0)
    front = torch.randint(0, gen_length + 2, (requests, 1)).repeat_interleave(len(sizes), 0)
    front = front + torch.randint(-6, 7, (rows, 1))
    known = flags(*shape, rate=rng.choice((0.0, 0.3, 0.9))) | (torch.arange(gen_length) < front)
    tokens = torch.where(known & flags(rows, 1, rate=0.97), truth, MASK)
    wrong = flags(*shape, rate=rng.choice((0.0, 0.0, 0.02, 0.3)))
    tokens = torch.where(wrong, torch.randint(0, 16, shape, dtype=torch.int32), tokens)
    state.tokens.copy_(tokens)
    state.top_token.copy_(torch.where(flags(*shape, rate=0.7), truth, torch.randint(0, 15, shape)))
    state.confidence.copy_(confidences(*shape))
    used = torch.arange(entries) < torch.randint(0, entries + 1, (*shape, 1))
    # A line holds a token once: those that follow each other from the expected one on, or from another.
    first = torch.where(flags(*shape, rate=0.7), truth, torch.randint(0, 15, shape)).unsqueeze(-1)
    state.map_token.copy_(torch.where(used, (first + torch.arange(entries)) % 40, 0))
    values = torch.tensor((0.25, 0.5, 0.5, 0.75, 0.9))[torch.randint(0, 5, (*shape, entries))]
    state.map_probability.copy_(torch.where(used, values, 0.0))
    for name in ("window_start", "window_end", "progress", "decoded"):
        getattr(state, name).copy_(torch.randint(0, gen_length + 1, (rows,)))
    for name in ("moved_since_refresh", "committed", "merged", "synced", "steps_in_block"):
        getattr(state, name).copy_(torch.randint(0, 30, (rows,)))
    state.done.copy_(flags(rows, rate=0.2))
    state.needs_refresh.copy_(flags(rows, rate=0.2))
    state.nfe.copy_(torch.randint(0, 100, (requests, 3)))
    state.finished.copy_(flags(requests, rate=rng.choice((0.0, 0.0, 0.3))))
    state.winner.copy_(torch.randint(0, len(sizes), (requests,)))
    state.stop_reason.copy_(torch.where(state.finished, torch.randint(1, 3, (requests,)), 0))
    return state


def random_predictions(rng, state, plan):
    rate = rng.choice((0.2, 1.0, 1.0))
    own = plan.source_row == torch.arange(state.num_rows)
    target = (flags(*state.tokens.shape, rate=rate) & own.unsqueeze(1)).flatten().nonzero().flatten()
    target = torch.cat((target, torch.full((rng.choice((0, 5)),), -1)))
    if rng.random() < 0.5:  # no order is promised
        target = target[torch.randperm(target.numel())]
    size = target.numel()
    held = state.top_token.flatten()[target.clamp(min=0)]
    top = torch.where(flags(size, rate=0.7), held, torch.randint(0, 15, (size,)))
    first = torch.where(flags(size, rate=0.7), held, torch.randint(0, 15, (size,)))
    likely = ((first.unsqueeze(1) + 3 * torch.arange(bbk.NUM_LIKELY)) % 40).int()
    values = torch.tensor((0.0, 0.2, 0.25, 0.49, 0.5, 0.75, 1.0, float("nan")))
    values = values[torch.randint(0, 7 + (rng.random() < 0.2), (size, bbk.NUM_LIKELY))]
    return bbk.Predictions(target, top.int(), confidences(size), None, likely, values)
