"""The oracle and the plain models themselves: against published decodes, and against cases worked out by
hand."""

import json
import math
from pathlib import Path

import pytest
import torch

from oracle import OracleConfig, ScriptedModel, decode, policy
from oracle.decoders import block_queries
from oracle.states import random_case
from plain_models import PlainModel, rotate, write_dream, write_llada

DATA = Path(__file__).parent / "data" / "conformance"
RECORDS = json.loads((DATA / "trajectories.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small only lose by threads, which on a busy machine mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def conformance_model():
    return PlainModel(DATA)


@pytest.mark.parametrize("record", RECORDS, ids=[f"{i}-{r['method']}" for i, r in enumerate(RECORDS)])
def test_conformance(conformance_model, record):
    settings = {name: record[name] for name in OracleConfig.__dataclass_fields__ if name in record}
    result = decode(conformance_model, record["prompt"], OracleConfig(**settings))
    assert result.canvas == record["canvas"]
    if record["method"] != "blockbatch":
        assert result.nfe == record["nfe"]
        return
    assert (result.nfe_init, result.nfe_block, result.nfe_refresh) == (
        record["nfe_init"], record["nfe_block"], record["nfe_refresh"],
    )  # fmt: skip
    assert result.winner_block_size == record["winner_block_size"]
    assert {str(b["block_size"]): b["merged"] for b in result.branches} == record["merged"]


# Plain models

WRITERS = [
    (write_llada, {}),
    (write_llada, {"n_kv_heads": 2, "embedding_size": 48}),
    (write_llada, {"weight_tying": True, "shards": 3}),
    (write_dream, {}),
    (write_dream, {"num_key_value_heads": "missing", "tie_word_embeddings": True, "shards": 2}),
]


@pytest.mark.parametrize("write, options", WRITERS)
def test_cached_forward_after_full_forward_agrees(tmp_path, write, options):
    write(tmp_path, **options)
    model = PlainModel(tmp_path, dtype=torch.float64)
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    (full,) = model.logits([tokens])
    assert full.shape == (11, options.get("embedding_size", 40)) and full.isfinite().all()
    row = model.new_row(11)
    model.forward(tokens, list(range(11)), row)
    torch.testing.assert_close(model.forward(tokens[4:7], [4, 5, 6], row), full[4:7])
    changed = tokens[:4] + [7, 7, 7] + tokens[7:]
    stale = model.forward(changed[4:7], [4, 5, 6], row)
    (fresh,) = model.logits([changed])
    assert (stale - fresh[4:7]).abs().max() > 1e-3, "the cache must keep what the other positions saw"


def test_rotation_is_a_complex_product_of_the_halves():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 8, dtype=torch.float64, generator=generator)
    positions = [0, 7, 250]
    rotated = rotate(x, positions, 10000.0)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    for n, position in enumerate(positions):
        for i, frequency in enumerate((1.0, 0.1, 0.01, 0.001)):
            turn = complex(math.cos(position * frequency), math.sin(position * frequency))
            expected = pairs[n, :, i] * turn
            torch.testing.assert_close(torch.complex(rotated[n, :, i], rotated[n, :, i + 4]), expected)


def test_forward_of_a_layer_by_hand(tmp_path):
    """One Dream layer, grouped heads and QKV bias, against torch's own attention."""
    write_dream(tmp_path, num_hidden_layers=1)
    model = PlainModel(tmp_path, dtype=torch.float64)
    tokens, places = [3, 1, 4, 1, 5], list(range(5))
    w = {name.removeprefix("model.layers.0."): tensor for name, tensor in model.weights.items()}
    functional = torch.nn.functional
    x = w["model.embed_tokens.weight"][tokens]
    h = functional.rms_norm(x, (32,), w["input_layernorm.weight"], 1e-6)
    q, k, v = (
        functional.linear(h, w[f"self_attn.{c}_proj.weight"], w[f"self_attn.{c}_proj.bias"]).view(5, -1, 8)
        for c in "qkv"
    )
    q, k = rotate(q, places, 1e6), rotate(k, places, 1e6)
    q, k, v = (t.transpose(0, 1) for t in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
    mixed = functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(5, 32)
    x = x + mixed @ w["self_attn.o_proj.weight"].T
    h = functional.rms_norm(x, (32,), w["post_attention_layernorm.weight"], 1e-6)
    gate = functional.silu(h @ w["mlp.gate_proj.weight"].T) * (h @ w["mlp.up_proj.weight"].T)
    x = x + gate @ w["mlp.down_proj.weight"].T
    expected = functional.rms_norm(x, (32,), w["model.norm.weight"], 1e-6) @ w["lm_head.weight"].T
    torch.testing.assert_close(model.logits([tokens])[0], expected)


def test_checkpoint_layouts_hold_the_same_model(tmp_path):
    tokens = [5, 2, 8, 1]
    write_llada(tmp_path / "one", n_kv_heads=None)
    write_llada(tmp_path / "sharded", n_kv_heads="missing", shards=4)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) == 4
    one, sharded = (PlainModel(tmp_path / name).logits([tokens])[0] for name in ("one", "sharded"))
    assert torch.equal(one, sharded)
    write_llada(tmp_path / "half", n_kv_heads=None, dtype=torch.bfloat16)
    half = PlainModel(tmp_path / "half").logits([tokens])[0]
    assert 0 < (half - one).abs().max() < 0.2


# Policy, by hand: prompt of two tokens, MASK is 9, EOS 8


def make_state(config, rows, **fields):
    """A state whose branches hold `rows`; each field is a list with one entry per branch."""
    state = policy.new_state([0, 0], config, 9, [7, 8])
    for i, (branch, row) in enumerate(zip(state["branches"], rows, strict=True)):
        branch["tokens"] = [0, 0, *row]
        branch["decoded"] = 1
        branch.update({name: values[i] for name, values in fields.items()})
    return state


def forward(start, tops, confidences, probes=None):
    places = range(start, start + len(tops))
    probes = probes or [0.0] * len(tops)
    names = {"top": tops, "confidence": confidences, "probe": probes}
    return {name: dict(zip(places, values, strict=True)) for name, values in names.items()}


def config_of(**options):
    options = {"gen_length": 4, "block_sizes": (4,), "eos_exit": "none", **options}
    return OracleConfig(**options).resolve()


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


# Scripted models


def scripted_decodes(eos_exit, seeds=range(12), **options):
    for seed in seeds:
        model = ScriptedModel(seed, peak=(0.0, 7.0), agreement=0.9, eos_rate=0.01, **options)
        config = OracleConfig(
            gen_length=64, block_sizes=(4, 16, 64), eos_exit=eos_exit, sync_threshold=4, refresh_interval=16
        )
        yield model, decode(model, [1, 2, 3, 4, 5], config)


@pytest.mark.parametrize("eos_exit", ["prefix", "window", "none"])
@pytest.mark.parametrize("offset", [0, 1])
def test_scripted_decodes_meet_every_event(eos_exit, offset):
    merged = synced = refreshes = 0
    reasons = set()
    for model, result in scripted_decodes(eos_exit, prediction_offset=offset, suppress_mask=offset == 1):
        assert model.mask_token_id not in result.tokens
        if eos_exit == "none":
            assert model.mask_token_id not in result.canvas
        assert not model.eos_token_ids.intersection(result.tokens)
        merged += sum(b["merged"] for b in result.branches)
        synced += sum(b["synced"] for b in result.branches)
        refreshes += result.nfe_refresh
        reasons.add(result.stop_reason)
    assert merged > 50 and synced > 20 and refreshes > 10
    assert reasons == ({"length"} if eos_exit == "none" else {"length", "eos"})


def test_scripted_logits_depend_on_the_whole_cache():
    model = ScriptedModel(3, agreement=0.0)
    row = model.new_row(6)
    before = model.forward([1, 2, 3, 4, 5, 6], range(6), row)
    assert torch.equal(model.forward([2, 3], [1, 2], row), before[1:3])
    after = model.forward([7], [5], row)
    assert not torch.equal(after, before[5:])
    assert not torch.equal(model.forward([2, 3], [1, 2], row), before[1:3])


def test_queries_of_a_block_denoise():
    def queries(method, offset):
        config = config_of(method=method, gen_length=8, block_sizes=(4,), block_size=4)
        state = make_state(config, [[1, 2, 3, 4] + [9] * 4], window=[(6, 10)])
        model = ScriptedModel(prediction_offset=offset)
        return list(block_queries(model, state, config, state["branches"][0]))

    assert queries("blockbatch", 0) == queries("dual_cache", 0) == [6, 7, 8, 9]
    assert queries("blockbatch", 1) == queries("local_leap", 1) == [5, 6, 7, 8]
    assert queries("prefix_cache", 0) == [6, 7, 8, 9] and queries("prefix_cache", 1) == [5, 6, 7, 8, 9]
    assert queries("vanilla", 1) == list(range(10))


@pytest.mark.parametrize("method", ["vanilla", "prefix_cache", "dual_cache"])
def test_baselines_without_threshold_need_steps_forwards(method):
    config = OracleConfig(method=method, gen_length=64, block_size=16, steps=32, threshold=None)
    result = decode(ScriptedModel(1, eos_rate=0.0), [1, 2, 3], config)
    assert result.nfe == 32
    if method != "vanilla":
        assert (result.nfe_init, result.nfe_block, result.nfe_refresh) == (1, 28, 3)


def test_local_leap_needs_fewer_forwards_than_dual_cache():
    def nfe(method):
        config = OracleConfig(method=method, gen_length=64)
        return sum(decode(ScriptedModel(s, agreement=1.0), [1, 2, 3], config).nfe for s in range(8))

    assert nfe("local_leap") < nfe("dual_cache")


def test_a_model_that_only_predicts_mask_is_reported():
    with pytest.raises(RuntimeError, match="MASK"):
        decode(ScriptedModel(mask_rate=1.0), [1], OracleConfig(gen_length=8, block_sizes=(4, 8)))


def test_random_states_meet_every_event():
    events = dict.fromkeys(
        ("merged", "synced", "refresh_due", "eos", "length", "init", "block", "refresh"), 0
    )
    for seed in range(600):
        phase, config, state, forwards = random_case(seed)
        getattr(policy, f"{phase}_phase")(state, config, forwards)
        events[phase] += 1
        events["merged"] += sum(b["merged"] for b in state["branches"])
        events["synced"] += sum(b["synced"] for b in state["branches"])
        events["refresh_due"] += state["refresh_due"]
        if state["stop_reason"]:
            events[state["stop_reason"]] += 1
            continue
        for branch in state["branches"]:
            assert not (branch["done"] and policy.masks_that_count(state, config, branch)), seed
            stuck = not branch["done"] and not policy.window_masks(state, config, branch)
            assert phase == "refresh" or not stuck, seed
    assert min(events.values()) > 5, events
