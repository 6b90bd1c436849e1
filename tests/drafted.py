"""Decodes with drafts by a made-up model that often means what it meant before, so that drafts match."""

import torch

import blockbatch_kernels as bbk
from random_branches import EOS, MASK, chance, choose, draw, params_of, random_batch

# (block size, generated length, settings): every commit rule and EOS exit, few drafts and many.
CASES = [
    (16, 48, {"drafts": (1, 2), "refresh_interval": 16}),
    (8, 32, {"drafts": (1, 2, 3, 4), "eos_exit": "none", "refresh_interval": None, "prediction_offset": 1}),
    (16, 32, {"drafts": (1, 3), "eos_exit": "window", "refresh_interval": 16, "refresh_scope": "generation"}),
    (12, 24, {"drafts": (1, 2, 4), "leap_radius": 2, "threshold": 0.8, "refresh_interval": 12}),
    (16, 32, {"drafts": (2,), "threshold": None, "steps_per_block": 8, "refresh_interval": 16}),
    (8, 40, {"drafts": (1, 2), "tail_threshold": 0.95, "eos_exit": "window", "refresh_interval": 24}),
]

# For a GPU.
LARGE_CASES = [
    (32, 256, {"drafts": (1, 2, 3, 4, 5, 6, 7, 8), "refresh_interval": 32}),
    (32, 1000, {"drafts": (1, 2), "eos_exit": "none", "refresh_interval": 32, "prediction_offset": 1}),
]


def start(generator, case, num_requests):
    """(state, plan, params) before the first forward."""
    block_size, gen_length, options = case
    params = params_of(**options)
    lengths = draw(generator, 1, 10, num_requests)
    prompts = draw(generator, 0, MASK, num_requests, 9)
    prompts[torch.arange(9) >= lengths.unsqueeze(1)] = 0
    sizes = torch.full((1 + len(params.drafts),), block_size)
    state = bbk.BranchState.create(prompts, lengths, sizes, gen_length, MASK)
    return state, bbk.initial_plan(state, params), params


def midway(generator, case, num_requests):
    """(state, plan, params) at any place of a decode, the drafts as the policy writes them."""
    block_size, gen_length, options = case
    params, branches = params_of(**options), 1 + len(options["drafts"])
    state, _ = random_batch(generator, params, (block_size,) * branches, gen_length, num_requests)
    is_draft = torch.arange(state.num_rows) % branches > 0
    state.needs_refresh.masked_fill_(is_draft, False)  # drafts ask for nothing
    plan = bbk.StepPlan.allocate(state.num_rows, gen_length, state.tokens.device)
    plan.source_row.fill_(-1)
    plan.flags[1] = bbk.structs.PHASE_REFRESH  # in which no row takes part: only plans
    nothing = torch.zeros(0, dtype=torch.int32)
    nothing = bbk.Predictions(nothing.long(), nothing, nothing.float(), nothing.float())
    return state, bbk.decode_policy(state, nothing, plan, params)[0], params


def predictions_of(generator, state, plan, params):
    """Mostly what the request's branch holds as its top tokens, as sure as it was; in any order, padded."""
    target = plan.predict.flatten().nonzero().squeeze(1)
    target = target[torch.randperm(target.numel(), generator=generator)]
    size = target.numel()
    row, position = target // state.gen_length, target % state.gen_length
    branch = row - row % state.num_branches
    top = torch.where(chance(generator, 0.03, size), choose(generator, EOS, size).int(), 0)
    top = torch.where(top == 0, draw(generator, 0, EOS[0], size), top)
    confidence = choose(generator, (0.125, 0.25, 0.5, 0.75, 0.8, 0.9, 0.97, 1.0), size)
    same = chance(generator, 0.9, size) & (state.confidence[branch, position] > 0)
    top = torch.where(same, state.top_token[branch, position], top)
    confidence = torch.where(same, state.confidence[branch, position], confidence)
    nan, probe = torch.full((3,), float("nan")), torch.rand(size, generator=generator)
    return bbk.Predictions(
        torch.cat((target, torch.full((3,), -1))),
        torch.cat((top, torch.full((3,), -7, dtype=torch.int32))),
        torch.cat((confidence, nan)),
        torch.cat((probe, nan)) if params.eos_exit == "window" else None,
    )
