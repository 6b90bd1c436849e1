"""Carries states of the oracle of Dream's published rule over to `blockbatch_kernels` tensors and back."""

import torch

import blockbatch_kernels as bbk
from oracle import dream_policy as policy
from policy_bridge import planned_queries

NEVER = 2**30
FUNCTIONS = {"init": policy.full_phase, "refresh": policy.full_phase, "block": policy.block_phase}
ENTRIES = 32  # more than any random case needs
HALF = 0.5


def params_of(config, state, eos_token_ids, **options):
    return bbk.PolicyParams(
        mask_token_id=state["mask_token_id"],
        eos_token_ids=tuple(eos_token_ids),
        threshold=config.threshold,
        sync_threshold=NEVER if config.sync_threshold is None else config.sync_threshold,
        refresh_interval=config.refresh_interval,
        eos_exit=config.eos_exit,
        policy="dream_published",
        **{"prediction_offset": 1, **options},
    )


def to_tensors(state, params):
    """A BranchState of one request; the map without what can no longer be taken."""
    start, branches = state["prompt_length"], state["branches"]
    result = bbk.BranchState.create(
        torch.tensor([branches[0]["tokens"][:start]], dtype=torch.int32),
        torch.tensor([start], dtype=torch.int32),
        torch.tensor([branch["block_size"] for branch in branches], dtype=torch.int32),
        state["gen_length"],
        params.mask_token_id,
        ENTRIES,
    )
    for row, branch in enumerate(branches):
        result.tokens[row] = torch.tensor(branch["tokens"][start:])
        window = branch["window"] or (start + state["gen_length"],) * 2
        result.window_start[row], result.window_end[row] = (bound - start for bound in window)
        result.progress[row], result.decoded[row] = window[0] - start, branch["holds"]
        result.moved_since_refresh[row], result.done[row] = branch["since"], branch["done"]
        for name in ("committed", "merged", "synced"):
            getattr(result, name)[row] = branch[name]
        for position, entries in branch["map"].items():
            kept = {token: value for token, value in entries.items() if value >= HALF}
            for place, (token, value) in enumerate(kept.items()):
                result.map_token[row, position - start, place] = token
                result.map_probability[row, position - start, place] = float(value)
    return result


def step_inputs(state, forwards, phase):
    """The plan and the predictions that carry the forwards to the rows; padding must not be read."""
    start, gen_length, count = state["prompt_length"], state["gen_length"], len(state["branches"])
    plan = bbk.StepPlan.allocate(count, gen_length, torch.device("cpu"))
    plan.flags[1] = bbk.PHASES.index(phase)
    plan.source_row.fill_(-1)
    target, top, confidence, token, probability = [], [], [], [], []
    for row, forward in forwards.items():
        plan.source_row[row] = row
        for position in forward["top"]:
            target.append(row * gen_length + position - start)
            top.append(forward["top"][position])
            confidence.append(forward["confidence"][position])
            likely = sorted(forward["likely"][position].items(), key=lambda entry: -entry[1])
            likely += [(-1, 0.0)] * (bbk.NUM_LIKELY - len(likely))
            token.append([entry[0] for entry in likely])
            probability.append([float(entry[1]) for entry in likely])
    nan = float("nan")
    predictions = bbk.Predictions(
        torch.tensor([*target, -1, -1], dtype=torch.int64),
        torch.tensor([*top, -7, -7], dtype=torch.int32),
        torch.tensor([*confidence, nan, nan]),
        None,
        torch.tensor([*token, *[[5] * 4] * 2], dtype=torch.int32),
        torch.tensor([*probability, *[[0.9] * 4] * 2]),
    )
    return plan, predictions


def taken_of(state, row, position):
    """{token: probability} of a line of the map, of those entries that can be taken."""
    line = zip(state.map_token[row, position].tolist(), state.map_probability[row, position].tolist())
    return {token: value for token, value in line if value >= HALF}


def assert_same(state, config, tensors, plan, events):
    """Everything that decides anything later must be equal."""
    start, branches = state["prompt_length"], state["branches"]
    ended = state["winner"] is not None
    assert bool(tensors.finished[0]) == ended and int(plan.flags[0]) == 1 - ended
    leaders = list(range(len(branches)))
    for source, destination in state["kv_copies"]:
        leaders[destination] = source
    assert events.sync_source.tolist() == leaders
    merged = {i: number for kind, i, number in state["events"] if kind == "merge"}
    assert events.merged.sum(-1).tolist() == [merged.get(i, 0) for i in range(len(branches))]
    for row, branch in enumerate(branches):
        assert tensors.tokens[row].tolist() == branch["tokens"][start:], f"tokens of branch {row}"
        names = {"decoded": "holds", "moved_since_refresh": "since"}
        for name in ("decoded", "moved_since_refresh", "done", "committed", "merged", "synced"):
            assert int(getattr(tensors, name)[row]) == branch[names.get(name, name)], f"{name} of {row}"
        if not branch["done"]:
            window = int(tensors.window_start[row]) + start, int(tensors.window_end[row]) + start
            assert window == branch["window"], f"window of branch {row}"
        for position in range(state["gen_length"]):
            if branch["tokens"][start + position] != state["mask_token_id"]:
                continue  # nobody asks for it again
            entries = branch["map"].get(start + position, {})
            expected = {token: float(value) for token, value in entries.items() if value >= HALF}
            assert taken_of(tensors, row, position) == expected, f"map of branch {row} at {position}"
    if ended:
        assert int(tensors.winner[0]) == state["winner"]
        assert bbk.STOP_REASONS[int(tensors.stop_reason[0])] == state["stop_reason"]
        return
    assert_plan(state, plan)


def assert_plan(state, plan, offset=1):
    """The plan of the next forward of a running request."""
    start, length = state["prompt_length"], policy.length_of(state)
    refresh = state["refresh_due"]
    assert bbk.PHASES[int(plan.flags[1])] == ("refresh" if refresh else "block")
    seen, asked = {}, 0
    for row, branch in enumerate(state["branches"]):
        masks = [p for p in range(start, length) if branch["tokens"][p] == state["mask_token_id"]]
        if refresh:
            source = seen.setdefault(tuple(branch["tokens"]), row)
            queries, predicted = range(length), masks[:1]
        else:
            source, queries = row, range(*(bound - offset for bound in branch["window"]))
            predicted = [p for p in masks if p in range(*branch["window"])]
        if source != row:
            queries, predicted = [], []
        assert int(plan.source_row[row]) == source
        assert planned_queries(plan, row, False) == list(queries)
        assert (plan.predict[row].nonzero().flatten() + start).tolist() == predicted
        asked += len(predicted)
    assert int(plan.flags[3]) == asked
