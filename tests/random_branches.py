"""Random batches of branches in the middle of decoding, made of tensors: fast enough for thousands.

Branches of a request share most tokens, so that they are often compatible; confidences repeat and meet the
thresholds exactly; a few requests are finished and a few branches done.
"""

import dataclasses

import torch

import blockbatch_kernels as bbk

VOCABULARY, MASK, EOS = 16, 15, (13, 14)


def params_of(**options):
    return bbk.PolicyParams(MASK, EOS, **{"threshold": 0.9, "leap_threshold": 0.6, **options})


def draw(generator, low, high, *shape):
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)


def chance(generator, probability, *shape):
    """bool; `probability` is a number or one for each row."""
    return torch.rand(shape, generator=generator) < torch.as_tensor(probability)


def choose(generator, values, *shape):
    return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]


def probabilities(generator, params, *shape):
    exact = [params.threshold or 0.5, params.merge_threshold, params.leap_threshold]
    values = torch.stack(
        (
            torch.rand(shape, generator=generator),
            draw(generator, 0, 17, *shape) / 16,
            choose(generator, exact, *shape),
        )
    )
    return values.gather(0, torch.randint(3, (1, *shape), generator=generator))[0].float()


def random_tops(generator, truth, *shape):
    top = draw(generator, 0, EOS[0], *shape)
    agreement = choose(generator, (0.5, 0.9, 1.0), shape[0], *(1 for _ in shape[1:]))
    top = torch.where(chance(generator, agreement, *shape), truth, top)
    top = torch.where(chance(generator, 0.05, *shape), choose(generator, EOS, *shape).int(), top)
    return torch.where(chance(generator, 0.01, *shape), MASK, top).int()


def random_batch(generator, params, block_sizes, gen_length, num_requests, max_prompt=9):
    """A BranchState of `num_requests` requests, and the text [R, G] that most branches agree on."""
    rows, branches = num_requests * len(block_sizes), len(block_sizes)
    lengths = draw(generator, 1, max_prompt + 1, num_requests)
    prompts = draw(generator, 0, MASK, num_requests, max_prompt)
    prompts[torch.arange(max_prompt) >= lengths.unsqueeze(1)] = 0
    state = bbk.BranchState.create(prompts, lengths, torch.tensor(block_sizes), gen_length, MASK)
    truth = draw(generator, 0, EOS[0], num_requests, gen_length).repeat_interleave(branches, 0)
    position, size = torch.arange(gen_length), state.block_size.unsqueeze(1)

    front = draw(generator, 0, gen_length, num_requests, 1).repeat_interleave(branches, 0)
    first_mask = (front + draw(generator, -6, 7, rows, 1)).clamp(0, gen_length - 1)
    start = first_mask - first_mask % size
    done = chance(generator, 0.08, rows, 1)
    known = torch.rand(rows, 1, generator=generator).expand(rows, gen_length).clone()
    known[(position >= start + size)] = -1.0
    known = torch.where(known < 0, choose(generator, (0.0, 0.0, 0.1, 0.5), rows, 1), known)
    known[(position < start) | done] = 1.0
    tokens = torch.where(chance(generator, known, rows, gen_length), truth, MASK)
    wrong = choose(generator, (0.0, 0.0, 0.02, 0.3), rows, 1)
    wrong = chance(generator, wrong, rows, gen_length) & (tokens != MASK)
    tokens = torch.where(wrong, draw(generator, 0, EOS[0], rows, gen_length), tokens)
    ends = chance(generator, 0.5, rows, 1) & (position == draw(generator, 0, gen_length, rows, 1))
    if params.eos_exit == "prefix":  # one with nothing open before it would have ended the request
        ends &= (tokens == MASK).int().cumsum(1) > (tokens == MASK).int()
    state.tokens.copy_(torch.where(ends, choose(generator, EOS, rows, gen_length).int(), tokens))

    end = (start + size).clamp(max=gen_length)
    if params.eos_exit == "prefix":
        is_eos = (state.tokens == EOS[0]) | (state.tokens == EOS[1])
        first_eos = torch.where(is_eos, position, gen_length).amin(1, keepdim=True)
        end = torch.minimum(end, first_eos)
    start, end = (torch.where(done, gen_length, bound) for bound in (start, end))
    state.window_start.copy_(start.squeeze(1))
    state.window_end.copy_(end.squeeze(1))
    state.progress.copy_(start.squeeze(1))
    state.done.copy_(done.squeeze(1))
    state.decoded.copy_(draw(generator, 0, 17, rows))
    state.blocks_since_refresh.copy_(draw(generator, 0, 4, rows))
    state.steps_in_block.copy_(draw(generator, 0, 5, rows))
    state.needs_refresh.copy_(chance(generator, 0.02, rows))
    state.top_token.copy_(random_tops(generator, truth, rows, gen_length))
    state.confidence.copy_(probabilities(generator, params, rows, gen_length))
    if params.query_span == "open":
        stale = chance(generator, choose(generator, (0.0, 0.1, 0.6), rows, 1), rows, gen_length)
        other = torch.where(chance(generator, 0.7, rows, gen_length), MASK, truth)
        state.cached_token.copy_(torch.where(stale, other, state.tokens))
    state.finished.copy_(chance(generator, 0.05, num_requests))
    for counter in (state.committed, state.merged, state.synced, state.nfe):
        counter.copy_(draw(generator, 0, 9, *counter.shape))
    return state, truth


def random_predictions(generator, params, plan, truth):
    """What a forward of the plan might have said, in any order and with padding."""
    target = plan.predict.flatten().nonzero().squeeze(1)
    target = target[torch.randperm(target.numel(), generator=generator)]
    size = target.numel()
    top = random_tops(generator, truth.flatten()[target], size)
    confidence, probe = (probabilities(generator, params, size) for _ in range(2))
    nan = torch.full((3,), float("nan"))
    return bbk.Predictions(
        torch.cat((target, torch.full((3,), -1))),
        torch.cat((top, torch.full((3,), -7, dtype=torch.int32))),
        torch.cat((confidence, nan)),
        torch.cat((probe, nan)) if params.eos_exit == "window" else None,
    )


def moved(record, device):
    """A copy of a record of tensors on a device."""
    if dataclasses.is_dataclass(record):
        names = [field.name for field in dataclasses.fields(record)]
        return type(record)(*(getattr(record, name).to(device, copy=True) for name in names))
    return type(record)(*(None if x is None else x.to(device, copy=True) for x in record))


def differences(expected, got):
    """Names of the fields of two records that are not the same bits, with the first such place."""
    names = getattr(expected, "_fields", None) or [field.name for field in dataclasses.fields(expected)]
    found = []
    for name in names:
        a, b = getattr(expected, name), getattr(got, name).cpu()
        if a.dtype != b.dtype or a.shape != b.shape:
            found.append(f"{name}: expected {a.dtype} {list(a.shape)}, got {b.dtype} {list(b.shape)}")
        elif not torch.equal(a, b):
            where = (a != b).nonzero()
            index = tuple(where[0].tolist())
            found.append(f"{name}: {len(where)} places, {index}: expected {a[index]}, got {b[index]}")
    return found
