"""The oracle's policy against cases worked out by hand."""

import pytest

from hand_made_states import config_of, forward, make_state
from oracle import policy


def test_commit_takes_the_sure_ones_and_always_the_best():
    config = config_of()
    state = make_state(config, [[9, 9, 9, 9]])
    policy.block_phase(state, config, {0: forward(2, [1, 2, 3, 4], [0.3, 0.9, 0.8999, 0.95])})
    assert state["branches"][0]["tokens"][2:] == [9, 2, 9, 4]
    policy.block_phase(state, config, {0: forward(2, [1, 2, 3, 4], [0.4, 0.9, 0.4, 0.95])})
    assert state["branches"][0]["tokens"][2:] == [1, 2, 9, 4], "the first position leads a tie"
    assert state["branches"][0]["decoded"] == 1 + 3


def test_behind_the_first_unsure_mask_the_tail_threshold_decides():
    confidences = [0.95, 0.5, 0.98, 0.99]
    for tail, tokens in ((None, [1, 9, 3, 4]), (0.99, [1, 9, 9, 4]), (1.0, [1, 9, 9, 4])):
        config = config_of(tail_threshold=tail)
        state = make_state(config, [[9, 9, 9, 9]])
        policy.block_phase(state, config, {0: forward(2, [1, 2, 3, 4], confidences)})
        assert state["branches"][0]["tokens"][2:] == tokens, tail
    # The unsure mask is decided now: what stands behind it is no tail any more.
    policy.block_phase(state, config, {0: forward(2, [1, 2, 3, 4], [0.9] * 4)})
    assert state["branches"][0]["tokens"][2:] == [1, 2, 3, 4]


def test_a_mask_of_the_tail_is_no_anchor_of_local_leap():
    for tail, tokens in ((None, [9, 2, 3, 9]), (0.95, [9, 9, 3, 9])):
        config = config_of(commit="local_leap", leap_radius=1, tail_threshold=tail)
        state = make_state(config, [[9, 9, 9, 9]])
        policy.block_phase(state, config, {0: forward(2, [1, 2, 3, 4], [0.5, 0.8, 0.92, 0.7])})
        assert state["branches"][0]["tokens"][2:] == tokens, tail


def test_local_leap_commits_near_an_anchor():
    config = config_of(commit="local_leap", leap_radius=1)
    state = make_state(config, [[9, 9, 9, 9]])
    policy.block_phase(state, config, {0: forward(2, [1, 2, 3, 4], [0.92, 0.8, 0.8, 0.7])})
    assert state["branches"][0]["tokens"][2:] == [1, 2, 9, 9]


def test_fixed_number_per_step_gives_the_remainder_first():
    config = config_of(method="vanilla", block_size=4, steps=3)
    state = make_state(config, [[9, 9, 9, 9]])
    counts = []
    for _ in range(3):
        policy.block_phase(state, config, {0: forward(2, [1, 2, 3, 4], [0.1, 0.4, 0.3, 0.2])})
        counts.append(state["branches"][0]["decoded"] - 1)
    assert counts == [2, 3, 4] and state["branches"][0]["tokens"][2:] == [1, 2, 3, 4]


def test_advance_counts_blocks_until_a_refresh_is_due():
    config = config_of(gen_length=8, block_sizes=(2,), refresh_interval=4)
    state = make_state(config, [[9] * 8])
    due = []
    for start in (2, 4, 6):
        policy.block_phase(state, config, {0: forward(start, [1, 1], [1.0, 1.0])})
        due.append(state["refresh_due"])
        assert state["branches"][0]["window"] == (start + 2, start + 4)
    assert due == [False, True, True]
    policy.refresh_phase(state, config, {0: forward(0, [1] * 10, [0.2] * 10)})
    assert not state["refresh_due"] and state["branches"][0]["blocks_since_refresh"] == 0
    assert state["branches"][0]["tokens"][2:] == [1] * 7 + [9], "a refresh commits the window"


def merge_case(confidence):
    """Branches of sizes 2 and 4: the larger one may take the token at position 2 from the smaller one."""
    config = config_of(block_sizes=(2, 4), sync_threshold=99)
    state = make_state(config, [[1, 9, 9, 9], [9, 9, 9, 4]])
    state["branches"][1].update(
        top={2: 1, 3: 5, 4: 6, 5: 4}, confidence={2: confidence, 3: 0.9, 4: 0.9, 5: 1.0}
    )
    return config, state


def test_merge_takes_the_own_top_token_when_a_source_holds_it():
    config, state = merge_case(confidence=0.51)
    policy.merge(state, config)
    assert state["branches"][1]["tokens"][2:] == [1, 9, 9, 4] and state["branches"][1]["merged"] == 1
    assert state["branches"][1]["decoded"] == 1, "merged tokens do not count as decoded"
    assert state["branches"][0]["tokens"][2:] == [1, 9, 9, 9], "the smaller window gets nothing back"


@pytest.mark.parametrize("change", ["unsure", "other token", "conflict", "outside the source's window"])
def test_merge_refuses(change):
    config, state = merge_case(confidence=0.5 if change == "unsure" else 0.9)
    source, destination = state["branches"]
    if change == "other token":
        source["tokens"][2] = 3
    if change == "conflict":
        source["tokens"][5] = 3
    if change == "outside the source's window":
        source["window"] = (4, 6)
        destination["window"] = (2, 7)  # its end stays the larger one, so that it stays the destination
    policy.merge(state, config)
    assert destination["merged"] == 0


def test_merge_that_fills_a_window_advances():
    config = config_of(gen_length=8, block_sizes=(2, 4), sync_threshold=99)
    state = make_state(config, [[1, 9] + [9] * 6, [9, 2, 3, 4] + [9] * 4])
    state["branches"][1].update(top={2: 1}, confidence={2: 0.8})
    policy.merge(state, config)
    assert state["branches"][1]["window"] == (6, 10)
    assert state["branches"][1]["blocks_since_refresh"] == 1


def test_sync_copies_the_leader_to_branches_far_behind():
    config = config_of(gen_length=8, block_sizes=(2, 4, 8), sync_threshold=3)
    rows = [[1, 1, 1, 1, 1, 9, 9, 9], [9] * 8, [2, 2, 9, 9, 9, 9, 9, 9]]
    state = make_state(config, rows, decoded=[5, 1, 2])
    policy.sync(state, config)
    first, second, third = state["branches"]
    assert second["tokens"] == first["tokens"] and second["decoded"] == 5
    assert second["window"] == (6, 10) and second["progress"] == 4
    assert third["decoded"] == 2, "three behind is not more than three"
    assert state["kv_copies"] == [(0, 1)] and [b["synced"] for b in state["branches"]] == [0, 1, 0]


def test_prefix_mode_decodes_up_to_the_eos_only():
    config = config_of(eos_exit="prefix")
    state = make_state(config, [[1, 9, 8, 9]])
    assert policy.window_of(state, config, state["branches"][0]) == (2, 4)
    policy.block_phase(state, config, {0: forward(2, [1, 3], [0.9, 0.2])})
    assert state["branches"][0]["tokens"][2:] == [1, 3, 8, 9]
    assert (state["winner"], state["stop_reason"]) == (0, "eos")


def test_prefix_mode_commits_behind_an_eos_of_the_same_forward():
    config = config_of(eos_exit="prefix")
    state = make_state(config, [[9, 9, 9, 9]])
    policy.block_phase(state, config, {0: forward(2, [1, 8, 3, 4], [0.2, 0.95, 0.95, 0.2])})
    assert state["branches"][0]["tokens"][2:] == [9, 8, 3, 9] and state["winner"] is None
    assert policy.window_of(state, config, state["branches"][0]) == (2, 3)


def test_prefix_mode_takes_the_surest_eos():
    config = config_of(block_sizes=(1, 2, 4), eos_exit="prefix")
    rows = [[1, 8, 9, 9], [1, 7, 9, 9], [1, 9, 9, 9]]
    state = make_state(config, rows, confidence=[{3: 0.5}, {3: 0.6}, {3: 0.9}])
    policy.finish_prefix(state, config)
    assert state["winner"] == 1
    state["winner"] = None
    state["branches"][0]["confidence"] = {3: 0.6}
    policy.finish_prefix(state, config)
    assert state["winner"] == 0, "the smallest index on a tie"


def test_prefix_mode_compares_tokens_up_to_the_first_eos():
    config = config_of(block_sizes=(2, 4), eos_exit="prefix", sync_threshold=99)
    state = make_state(config, [[1, 9, 9, 5], [9, 9, 8, 4]])
    state["branches"][1].update(top={2: 1}, confidence={2: 0.8})
    # Windows count up to 4 for both branches; the stable order makes the smaller one the destination.
    policy.merge(state, config)
    assert [b["merged"] for b in state["branches"]] == [0, 0]
    state["branches"][0].update(top={3: 2}, confidence={3: 0.8})
    state["branches"][1]["tokens"][3] = 2
    policy.merge(state, config)
    assert state["branches"][0]["tokens"][2:] == [1, 2, 9, 5], (
        "5 and 4 differ behind the EOS, which is allowed"
    )


def test_prefix_mode_finishes_by_a_merged_token():
    config = config_of(block_sizes=(2, 4), eos_exit="prefix", sync_threshold=99)
    state = make_state(config, [[1, 9, 9, 9], [9, 9, 9, 8]])
    state["branches"][1].update(top={2: 1}, confidence={2: 0.8})
    state["branches"][1]["tokens"][3:5] = [5, 6]
    policy.advance_merge_sync(state, config)
    assert (state["winner"], state["stop_reason"]) == (1, "eos")
    assert state["branches"][1]["tokens"][2:] == [1, 5, 6, 8]


def test_window_mode_compares_the_probability_of_the_eos_held():
    config = config_of(block_sizes=(2, 4), eos_exit="window")
    state = make_state(config, [[9, 8, 9, 9], [9, 7, 1, 1]])
    forwards = {
        0: forward(2, [1, 3], [1.0, 0.9], probes=[0.0, 0.05]),
        1: forward(2, [1, 3, 1, 1], [1.0, 0.5, 1.0, 1.0], probes=[0.0, 0.06, 1.0, 1.0]),
    }
    policy.block_phase(state, config, forwards)
    assert (state["winner"], state["stop_reason"]) == (1, "eos")


def test_window_mode_ignores_an_eos_outside_the_window():
    config = config_of(block_sizes=(2,), eos_exit="window")
    state = make_state(config, [[9, 1, 9, 8]])
    policy.block_phase(state, config, {0: forward(2, [1, 1], [1.0, 1.0])})
    assert state["winner"] is None and state["branches"][0]["window"] == (4, 6)
