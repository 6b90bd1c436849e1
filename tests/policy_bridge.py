"""Carries the oracle's dictionaries over to `blockbatch_kernels` tensors, and compares them afterwards."""

import torch

import blockbatch_kernels as bbk
from oracle import policy


def params_of(config, state, **options):
    """PolicyParams of a resolved OracleConfig and the state's prediction offset; `options` go before them."""
    options.setdefault("query_span", config.query_span)
    options.setdefault("refresh_scope", config.refresh_scope)
    options.setdefault("prediction_offset", state["prediction_offset"])
    steps = config.steps // (config.gen_length // config.block_sizes[0]) if config.commit == "fixed" else None
    return bbk.PolicyParams(
        mask_token_id=state["mask_token_id"],
        eos_token_ids=tuple(sorted(state["eos_token_ids"])),
        threshold=None if config.commit == "fixed" else config.threshold,
        tail_threshold=None if config.commit == "fixed" else config.tail_threshold,
        steps_per_block=steps,
        leap_radius=config.leap_radius if config.commit == "local_leap" else 0,
        leap_threshold=config.leap_threshold,
        merge_threshold=config.merge_threshold,
        sync_threshold=config.sync_threshold,
        refresh_interval=config.refresh_interval,
        eos_exit=config.eos_exit,
        **options,
    )


def to_tensors(states, params):
    """One BranchState of several oracle states with the same block sizes."""
    sizes = [branch["block_size"] for branch in states[0]["branches"]]
    lengths = [state["prompt_length"] for state in states]
    prompts = torch.zeros(len(states), max(lengths), dtype=torch.int32)
    for row, state in zip(prompts, states):
        row[: state["prompt_length"]] = torch.tensor(state["branches"][0]["tokens"][: state["prompt_length"]])
    result = bbk.BranchState.create(
        prompts,
        torch.tensor(lengths, dtype=torch.int32),
        torch.tensor(sizes, dtype=torch.int32),
        states[0]["gen_length"],
        params.mask_token_id,
    )
    row = 0
    for state in states:
        start = state["prompt_length"]
        for branch in state["branches"]:
            result.tokens[row] = torch.tensor(branch["tokens"][start:])
            w0, w1 = branch["window"]
            if params.eos_exit == "prefix":
                eos = policy.first_eos(state, branch)
                w1 = w1 if eos is None or branch["done"] else min(w1, eos)
            result.window_start[row], result.window_end[row] = w0 - start, w1 - start
            for name in ("decoded", "progress", "blocks_since_refresh", "needs_refresh", "done"):
                getattr(result, name)[row] = branch[name]
            for name in ("committed", "merged", "synced"):
                getattr(result, name)[row] = branch[name]
            result.steps_in_block[row] = branch["steps"]
            result.cached_token[row] = torch.tensor(cached_tokens(state, branch))
            for position, token in branch["top"].items():
                if position >= start:
                    result.top_token[row, position - start] = token
                    result.confidence[row, position - start] = branch["confidence"][position]
            row += 1
    return result


def cached_tokens(state, branch):
    """Tokens that the K/V of the generation region were computed from, MASK where there are none yet."""
    positions = range(state["prompt_length"], policy.length_of(state))
    return [branch["cached"].get(position, state["mask_token_id"]) for position in positions]


def step_inputs(states, phases_forwards, phase, query_span="window"):
    """The plan and the predictions that carry each state's forwards to its rows, each computed on its own."""
    gen_length, count = states[0]["gen_length"], len(states[0]["branches"])
    source_row = torch.full((len(states) * count,), -1, dtype=torch.int32)
    query_start, query_end = torch.zeros_like(source_row), torch.zeros_like(source_row)
    # Places behind the queries hold what nobody may read.
    query_position = torch.full((len(source_row), gen_length + 1), -77, dtype=torch.int32)
    target, top, confidence, probe = [], [], [], []
    for request, (state, forwards) in enumerate(zip(states, phases_forwards)):
        for branch, forward in forwards.items():
            row = request * count + branch
            source_row[row] = row
            queries = forward["queries"]
            query_start[row], query_end[row] = queries[0], queries[-1] + 1
            if phase == "block" and query_span == "open":
                query_start[row], query_end[row] = 0, len(queries)
                query_position[row, : len(queries)] = torch.tensor(queries)
            for position in forward["top"]:
                if position >= state["prompt_length"]:
                    target.append(row * gen_length + position - state["prompt_length"])
                    top.append(forward["top"][position])
                    confidence.append(forward["confidence"][position])
                    probe.append(forward["probe"][position])
    padding = 3
    predictions = bbk.Predictions(
        torch.tensor(target + [-1] * padding, dtype=torch.int64),
        torch.tensor(top + [-7] * padding, dtype=torch.int32),
        torch.tensor(confidence + [float("nan")] * padding),
        torch.tensor(probe + [float("nan")] * padding),
    )
    flags = torch.tensor([len(states), bbk.PHASES.index(phase), 0, 0, 0], dtype=torch.int32)
    predict = torch.zeros(len(source_row), gen_length, dtype=torch.bool)
    plan = bbk.StepPlan(query_start, query_end, source_row, predict, flags, query_position)
    return plan, predictions


def assert_same(states, configs, tensors, plan, events):
    """Every field that decides anything later must be equal."""
    count = tensors.num_branches
    for request, (state, config) in enumerate(zip(states, configs)):
        finished = state["winner"] is not None
        assert bool(tensors.finished[request]) == finished
        if finished:
            assert int(tensors.winner[request]) == state["winner"]
            assert bbk.STOP_REASONS[int(tensors.stop_reason[request])] == state["stop_reason"]
        start = state["prompt_length"]
        sync_source = list(range(request * count, request * count + count))
        for source, destination in state["kv_copies"]:
            sync_source[destination] = request * count + source
        if not finished:
            assert events.sync_source[request * count : request * count + count].tolist() == sync_source
        for index, branch in enumerate(state["branches"]):
            row = request * count + index
            assert tensors.tokens[row].tolist() == branch["tokens"][start:], f"tokens of branch {index}"
            if config.query_span == "open":
                cached = cached_tokens(state, branch)
                assert tensors.cached_token[row].tolist() == cached, f"cached tokens of branch {index}"
            for name in ("decoded", "committed", "merged", "synced"):
                assert int(getattr(tensors, name)[row]) == branch[name], f"{name} of branch {index}"
            if finished:
                continue
            for name in ("progress", "blocks_since_refresh", "needs_refresh", "done"):
                assert int(getattr(tensors, name)[row]) == int(branch[name]), f"{name} of branch {index}"
            if not branch["done"]:
                w0, w1 = policy.window_of(state, config, branch)
                window = int(tensors.window_start[row]) + start, int(tensors.window_end[row]) + start
                assert window == (w0, w1), f"window of branch {index}"


def assert_plan(state, config, plan, query_span=None, prediction_offset=None):
    """The plan of the next forward of a single running request. None: as the state and config have it."""
    query_span = config.query_span if query_span is None else query_span
    offset = state["prediction_offset"] if prediction_offset is None else prediction_offset
    if state["winner"] is not None:
        assert int(plan.flags[0]) == 0
        return
    assert int(plan.flags[0]) == 1
    assert bbk.PHASES[int(plan.flags[1])] == ("refresh" if state["refresh_due"] else "block")
    length, start = policy.length_of(state), state["prompt_length"]
    queries, predicted = [[] for _ in state["branches"]], [[] for _ in state["branches"]]
    source_row = [-1] * len(state["branches"])
    if state["refresh_due"]:
        seen = {}
        for index in policy.refresh_rows(state):
            source_row[index] = seen.setdefault(tuple(state["branches"][index]["tokens"]), index)
            if source_row[index] == index:
                queries[index] = list(policy.refresh_queries(state, config))
                predicted[index] = [query + offset for query in queries[index]]
    else:
        for index in policy.block_rows(state, config):
            branch = state["branches"][index]
            source_row[index] = index
            w0, w1 = policy.window_of(state, config, branch)
            spans = {"window": range(w0 - offset, w1 - offset), "suffix": range(w0 - offset, length)}
            spans["open"] = policy.open_queries(state, config, branch)
            queries[index] = list(spans.get(query_span, range(length)))
            predicted[index] = [query + offset for query in queries[index]]
            if query_span == "open":
                predicted[index] = [position for position in predicted[index] if w0 <= position < w1]
    assert plan.source_row.tolist() == source_row
    scattered = query_span == "open" and not state["refresh_due"]
    assert [planned_queries(plan, row, scattered) for row in range(len(queries))] == queries
    assert int(plan.flags[2]) == sum(len(row) for row in queries)
    assert int(plan.flags[3]) == int(plan.predict.sum())
    # What may be left out: positions where no branch could still look at the prediction.
    wanted_ids = state["eos_token_ids"] | {state["mask_token_id"]}
    for position in range(start, length):
        relevant = any(branch["tokens"][position] in wanted_ids for branch in state["branches"])
        for row, positions in enumerate(predicted):
            assert bool(plan.predict[row, position - start]) == (relevant and position in positions)


def planned_queries(plan, row, scattered):
    """The canvas positions that a plan computes of a row, in order."""
    start, end = int(plan.query_start[row]), int(plan.query_end[row])
    if not scattered:
        return list(range(start, end))
    assert start == 0, "open queries fill their row of query_position from its start"
    return plan.query_position[row, :end].tolist()
