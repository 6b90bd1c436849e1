"""Random batches for the policy's operators, far wider than what a decode meets: any mix of finished and
running requests, windows anywhere, up to 32 branches, every setting. For backends against the reference."""

import dataclasses
import random

import torch

import blockbatch_kernels as bbk

MASK, EOS = 15, (13, 14)


def random_batch(seed, max_requests=4, max_branches=8, max_length=96):
    """(state, predictions, plan, params) on the CPU."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    requests, branches = rng.randint(1, max_requests), rng.randint(1, max_branches)
    sizes = sorted(rng.choice((1, 2, 3, 4, 8, 16, 32, 64)) for _ in range(branches))
    gen_length = rng.randint(1, max_length)
    params = random_params(rng)
    state = random_state(rng, requests, sizes, gen_length)
    plan = random_plan(rng, state, params)
    return state, random_predictions(rng, state, params, plan), plan, params


def random_params(rng):
    scheduled = rng.random() < 0.25
    threshold = None if scheduled else rng.choice((0.5, 0.9, 1.0))
    return bbk.PolicyParams(
        mask_token_id=MASK,
        eos_token_ids=rng.choice((EOS, EOS[:1], ())),
        threshold=threshold,
        tail_threshold=None if scheduled else rng.choice((None, max(threshold, 0.9), 1.0)),
        steps_per_block=rng.randint(1, 40) if scheduled else None,
        leap_radius=rng.choice((0, 0, 1, 4, 100)),
        leap_threshold=rng.choice((0.25, 0.6)),
        merge_threshold=rng.choice((0.5, 0.75, 1.0)),
        sync_threshold=rng.choice((0, 1, 8)),
        refresh_interval=rng.choice((None, 1, 16, 64)),
        eos_exit=rng.choice(bbk.EOS_EXITS),
        query_span=rng.choice((*bbk.QUERY_SPANS, "open")),
        refresh_scope=rng.choice(bbk.policy_params.REFRESH_SCOPES),
        prediction_offset=rng.choice((0, 1)),
    )


def flags(*shape, rate):
    return torch.rand(shape) < rate


def confidences(*shape):
    """Many ties, the thresholds met exactly, some of everything else, and at times NaN."""
    values = torch.where(flags(*shape, rate=0.7), torch.randint(0, 9, shape) / 8, torch.rand(shape))
    values = torch.where(flags(*shape, rate=0.1), torch.tensor(0.9), values)
    missing = 0.02 if torch.rand(()) < 0.25 else 0.0
    return values.masked_fill(flags(*shape, rate=missing), float("nan"))


def random_state(rng, requests, sizes, gen_length):
    rows, shape = requests * len(sizes), (requests * len(sizes), gen_length)
    lengths = torch.randint(1, 9, (requests,), dtype=torch.int32)
    prompts = torch.randint(0, 13, (requests, int(lengths.max())), dtype=torch.int32)
    prompts.masked_fill_(torch.arange(prompts.shape[1]) >= lengths.unsqueeze(1), 0)
    state = bbk.BranchState.create(
        prompts, lengths, torch.tensor(sizes, dtype=torch.int32), gen_length, mask_token_id=MASK
    )
    truth = torch.randint(0, 13, (requests, gen_length), dtype=torch.int32).repeat_interleave(len(sizes), 0)

    def some_tokens(wrong):
        other = torch.randint(0, 16, shape, dtype=torch.int32)
        return torch.where(flags(*shape, rate=wrong), other, truth)

    state.tokens.copy_(some_tokens(rng.choice((0.0, 0.01, 0.2))))
    state.tokens.masked_fill_(flags(*shape, rate=rng.choice((0.0, 0.1, 0.5, 0.9))), MASK)
    if rng.random() < 0.3:  # some rows equal the row before
        for row in range(1, rows):
            if rng.random() < 0.5:
                state.tokens[row] = state.tokens[row - 1]
    if rng.random() < 0.1:
        state.tokens.fill_(MASK)
    state.top_token.copy_(some_tokens(rng.choice((0.05, 0.3))))
    state.confidence.copy_(confidences(*shape))
    other = torch.where(flags(*shape, rate=0.7), MASK, some_tokens(0.5))
    state.cached_token.copy_(
        torch.where(flags(*shape, rate=rng.choice((0.0, 0.1, 0.6))), other, state.tokens)
    )
    start = torch.randint(0, gen_length + 1, (rows,), dtype=torch.int32)
    start = torch.where(flags(rows, rate=0.7), start // state.block_size * state.block_size, start)
    state.window_start.copy_(start)
    state.window_end.copy_(torch.clamp(start + state.block_size, max=gen_length))
    for name, high in (
        ("decoded", gen_length + 3),
        ("progress", gen_length + 1),
        ("blocks_since_refresh", 9),
        ("steps_in_block", 9),
        ("committed", 40),
        ("merged", 40),
        ("synced", 9),
    ):
        getattr(state, name).copy_(torch.randint(0, high, (rows,)))
    if rng.random() < 0.1:
        state.decoded.zero_()
    state.needs_refresh.copy_(flags(rows, rate=rng.choice((0.0, 0.0, 0.1, 0.5))))
    state.done.copy_(flags(rows, rate=rng.choice((0.0, 0.1, 0.9, 1.0))))
    state.nfe.copy_(torch.randint(0, 100, (requests, 3)))
    state.finished.copy_(flags(requests, rate=rng.choice((0.0, 0.0, 0.3))))
    state.winner.copy_(torch.randint(0, len(sizes), (requests,)))
    state.stop_reason.copy_(torch.where(state.finished, torch.randint(1, 3, (requests,)), 0))
    return state


def random_plan(rng, state, params):
    """As the policy reads it: the phase, the row whose predictions each row takes, and open queries."""
    rows, first = state.num_rows, 0
    phase = rng.choice((bbk.structs.PHASE_INIT, bbk.structs.PHASE_REFRESH, *[bbk.structs.PHASE_BLOCK] * 3))
    source = []
    for row in range(rows):
        first = row - row % state.num_branches
        earlier = [other for other in range(first, row) if source[other] == other]
        choices = [row] if phase == bbk.structs.PHASE_BLOCK else [row, *earlier]
        source.append(rng.choice(choices) if rng.random() < 0.85 else -1)
    plan = bbk.StepPlan.allocate(rows, state.gen_length, torch.device("cpu"))
    plan.source_row.copy_(torch.tensor(source))
    plan.flags[1] = phase
    if params.query_span == "open" and phase == bbk.structs.PHASE_BLOCK:
        random_open_queries(rng, state, plan)
    return plan


def random_open_queries(rng, state, plan):
    """Any canvas positions from the last of the prompt on; what stands behind them must not be read."""
    if rng.random() < 0.5:
        plan.query_position.copy_(torch.randint(-5, 200, plan.query_position.shape))
    rate = rng.choice((0.05, 0.5, 0.9, 1.0))
    for row in range(state.num_rows):
        if plan.source_row[row] < 0:
            continue
        chosen = flags(state.gen_length + 1, rate=rate).nonzero().flatten()
        plan.query_end[row] = len(chosen)
        prompt = state.prompt_length[row // state.num_branches]
        plan.query_position[row, : len(chosen)] = chosen + prompt - 1


def random_predictions(rng, state, params, plan):
    rate = rng.choice((0.0, 0.2, 1.0))
    own = plan.source_row == torch.arange(state.num_rows)
    target = (flags(*state.tokens.shape, rate=rate) & own.unsqueeze(1)).flatten().nonzero().flatten()
    target = torch.cat((target, torch.full((rng.choice((0, 5)),), -1)))
    if rng.random() < 0.5:  # no order is promised
        target = target[torch.randperm(target.numel())]
    size = target.numel()
    probe = confidences(size) if params.eos_exit == "window" or rng.random() < 0.3 else None
    return bbk.Predictions(target, torch.randint(0, 16, (size,), dtype=torch.int32), confidences(size), probe)


def to_device(record, device):
    """The same record (a dataclass or a named tuple of tensors) with its tensors copied to `device`."""
    if dataclasses.is_dataclass(record):
        names = [field.name for field in dataclasses.fields(record)]
        return type(record)(**{name: getattr(record, name).to(device, copy=True) for name in names})
    return type(record)(*(None if x is None else x.to(device, copy=True) for x in record))


def garbage(state):
    """(plan, events) to be written into, full of what nobody may take over."""
    device = state.tokens.device
    plan = bbk.StepPlan.allocate(state.num_rows, state.gen_length, device)
    events = bbk.PolicyEvents.allocate(state.num_rows, state.gen_length, device)
    for tensor in (*plan, *events):
        tensor.copy_(torch.randint(0, 2, tensor.shape) if tensor.dtype == torch.bool else torch.tensor(-77))
    return plan, events


def assert_equal_records(got, expected, what):
    """Bit for bit."""
    names = got._fields if hasattr(got, "_fields") else [f.name for f in dataclasses.fields(got)]
    for name in names:
        ours, theirs = getattr(got, name).cpu(), getattr(expected, name).cpu()
        if ours.dtype.is_floating_point:
            ours, theirs = ours.view(torch.int32), theirs.view(torch.int32)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, f"{what}.{name}"
        if not torch.equal(ours, theirs):
            at = (ours != theirs).nonzero()[0].tolist()
            where = tuple(at)
            raise AssertionError(f"{what}.{name}{at}: expected {theirs[where]}, got {ours[where]}")
