"""Open queries and refreshes of the generation region: the oracle itself, and whole decodes against it."""

import json
import random
from pathlib import Path

import pytest
import torch

import blockbatch
from blockbatch.generation import build_result, generate, open_session
from oracle import OracleConfig, ScriptedModel, decode, policy
from oracle.decoders import block_queries
from plain_models import PlainModel
from scripted_engine import EngineScripted
from test_decoding import BLOCK_SIZE_SETS, assert_equal, scripted

DATA = Path(__file__).parent / "data" / "conformance"
RECORDS = json.loads((DATA / "open_queries.json").read_text())
METHODS = ("blockbatch", "dual_cache", "local_leap")


@pytest.fixture(scope="module")
def conformance_model():
    return PlainModel(DATA)


@pytest.mark.parametrize(
    "record", RECORDS, ids=[f"{i}-{r['options']['method']}" for i, r in enumerate(RECORDS)]
)
def test_conformance_of_the_oracle(conformance_model, record):
    settings = {**record["options"], **{name: record[name] for name in ("query_span", "refresh_scope")}}
    result = decode(conformance_model, record["prompt"], OracleConfig(**settings))
    assert query_lengths(result) == record["query_tokens"]
    assert result.canvas == record["canvas"]
    assert [result.nfe_init, result.nfe_block, result.nfe_refresh] == record["nfe"]
    assert result.winner_block_size == record["winner_block_size"]


def query_lengths(result):
    """[phase, queries of each row] of every phase of an oracle decode."""
    return [[phase["phase"], [len(queries) for queries in phase["queries"]]] for phase in result.log]


# The oracle, by hand: prompt of two tokens, MASK is 9, EOS 8


def make_state(config, rows, cached, offset=0):
    state = policy.new_state([0, 0], config, 9, [8], offset)
    for branch, tokens, kept in zip(state["branches"], rows, cached, strict=True):
        branch["tokens"] = [0, 0, *tokens]
        branch["cached"] = dict(enumerate([0, 0, *kept]))
        branch["decoded"] = 1
    return state


def config_of(**options):
    options = {"gen_length": 8, "block_sizes": (4,), "eos_exit": "none", "query_span": "open", **options}
    return OracleConfig(**options).resolve()


@pytest.mark.parametrize("offset, expected", [(0, [2, 5, 8]), (1, [2, 4, 8])])
def test_queries_are_the_masks_of_the_window_and_all_that_is_stale(offset, expected):
    """Stale: position 2 before the window and 8 behind it. Of the masks 5, 7 and 9 the window holds one."""
    config = config_of(block_sizes=(2,))
    state = make_state(config, [[1, 2, 3, 9, 4, 9, 6, 9]], [[9, 2, 3, 9, 4, 9, 5, 9]], offset)
    (branch,) = state["branches"]
    branch["window"] = (4, 6)
    assert block_queries(ScriptedModel(prediction_offset=offset), state, config, branch) == expected


def test_a_query_that_predicts_the_first_position_stands_in_the_prompt():
    config = config_of()
    state = make_state(config, [[9, 1, 9, 9] + [9] * 4], [[9] * 8], offset=1)
    (branch,) = state["branches"]
    assert policy.open_queries(state, config, branch) == [1, 3, 4]


def test_what_stands_behind_an_eos_is_computed_once_more_too():
    config = config_of(eos_exit="prefix")
    state = make_state(config, [[1, 9, 8, 9, 9, 5, 9, 9]], [[1] + [9] * 7])
    (branch,) = state["branches"]
    assert policy.open_queries(state, config, branch) == [3, 4, 7]


def test_cached_tokens_are_those_before_the_commit():
    config = config_of()
    state = make_state(config, [[1, 9, 9, 9] + [9] * 4], [[9] * 8])
    confidence = {2: 0.3, 3: 0.95, 4: 0.2, 5: 0.1}
    forward = {
        "top": {2: 1, 3: 2, 4: 3, 5: 4},
        "confidence": confidence,
        "probe": {},
        "queries": [2, 3, 4, 5],
    }
    policy.block_phase(state, config, {0: forward})
    (branch,) = state["branches"]
    assert branch["tokens"][2:] == [1, 2, 9, 9] + [9] * 4
    assert [branch["cached"][position] for position in range(2, 10)] == [1] + [9] * 7
    assert policy.open_queries(state, config, branch) == [3, 4, 5]


def test_sync_takes_over_what_the_leaders_cache_holds():
    config = config_of(block_sizes=(2, 4), sync_threshold=3)
    rows = [[1, 2, 3, 4, 9, 9, 9, 9], [1, 9, 9, 9] + [9] * 4]
    state = make_state(config, rows, [[1, 2, 3, 9, 9, 9, 9, 9], [9] * 8])
    leader, other = state["branches"]
    leader["decoded"], leader["window"] = 5, (6, 8)
    policy.sync(state, config)
    assert other["cached"] == leader["cached"] and other["cached"] is not leader["cached"]
    assert policy.open_queries(state, config, other) == [5, 6, 7, 8, 9]
    assert policy.open_queries(state, config, leader) == [5, 6, 7]


@pytest.mark.parametrize("method", ["vanilla", "prefix_cache"])
@pytest.mark.parametrize("option", [{"query_span": "open"}, {"refresh_scope": "generation"}])
def test_methods_without_the_options_refuse_them(method, option):
    with pytest.raises(ValueError, match=f"not options of {method}"):
        OracleConfig(method=method, **option).resolve()


# What the options promise of a whole decode


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("block_size", [8, 64])
def test_a_decoded_token_is_computed_once_more_and_never_again(offset, block_size):
    for seed in range(6):
        model = ScriptedModel(seed, eos_rate=0.0, prediction_offset=offset)
        config = config_of(gen_length=64, block_sizes=(block_size,), refresh_interval=None)
        log = decode(model, [1, 2, 3], config).log
        mask, times = model.mask_token_id, dict.fromkeys(range(3, 67), 0)
        before = log[0]["state"]["branches"][0]["tokens"]
        for phase in log[1:]:
            for position in phase["queries"][0]:
                # With an offset a decoded token may also predict the MASK behind it.
                predicts = offset and before[position + 1 : position + 2] == [mask]
                if position > 2 and before[position] != mask and not predicts:
                    times[position] += 1
            last, before = before, phase["state"]["branches"][0]["tokens"]
        assert set(times.values()) <= {0, 1} and sum(times.values()) > 15
        just_decoded = [position for position in times if last[position] == mask]
        state = log[-1]["state"]
        assert policy.stale_positions(state, state["branches"][0]) == just_decoded


def test_a_refresh_of_the_generation_region_leaves_the_prompt():
    """A model that forgets who computed what: the K/V of the prompt are those of the init for good."""
    for offset in (0, 1):
        model = Counting(ScriptedModel(2, prediction_offset=offset, eos_rate=0.0))
        config = config_of(
            gen_length=64, block_sizes=(4, 16), refresh_interval=16, refresh_scope="generation"
        )
        result = decode(model, list(range(1, 8)), config)
        assert result.nfe_refresh >= 3
        assert all(model.computed[position] == 1 for position in range(7 - offset))
        for phase in result.log:
            if phase["phase"] == "refresh":
                assert all(queries in ([], list(range(7 - offset, 71))) for queries in phase["queries"])


class Counting:
    """A scripted model that counts how often each position is computed."""

    def __init__(self, model):
        self._model, self.computed = model, {}

    def __getattr__(self, name):
        return getattr(self._model, name)

    def forward(self, token_ids, positions, row):
        for position in positions:
            self.computed[position] = self.computed.get(position, 0) + 1
        return self._model.forward(token_ids, positions, row)


def test_the_options_change_what_a_scripted_model_is_asked():
    """What a window leaves behind is computed once more; the scope of a refresh changes its size alone."""

    def run(method, span, scope):
        config = OracleConfig(method=method, gen_length=64, query_span=span, refresh_scope=scope)
        result = decode(ScriptedModel(4, agreement=0.3), [1, 2, 3], config)
        return result.canvas, sum(sum(lengths) for _, lengths in query_lengths(result))

    options = [(span, scope) for span in ("window", "open") for scope in ("canvas", "generation")]
    for method in METHODS:
        (canvas, most), (same, fewer), (other, open_most), (same_other, open_fewer) = (
            run(method, *option) for option in options
        )
        assert canvas == same and other == same_other
        assert fewer < most and open_fewer < open_most
        # Within one window a token whose K/V are its own already gets no others, and each block is refreshed.
        assert (canvas == other) == (method != "blockbatch")
        assert open_most < most or method == "blockbatch"


# The package against the oracle


def configs(rng, method, eos_exit, query_span, refresh_scope):
    """The same settings for the oracle and for the package."""
    options = {"method": method, "gen_length": 64, "eos_exit": eos_exit}
    options |= {"query_span": query_span, "refresh_scope": refresh_scope}
    options |= {"threshold": rng.choice((0.7, 0.9, 0.95))}
    if method == "blockbatch":
        options |= {
            "block_sizes": rng.choice(BLOCK_SIZE_SETS),
            "merge_threshold": rng.choice((0.5, 0.6)),
            "sync_threshold": rng.choice((1, 4, 8)),
            "refresh_interval": rng.choice((8, 32, None)),
            "commit": rng.choice(("threshold", "local_leap")),
            "tail_threshold": rng.choice((None, None, 0.97)),
        }
    else:
        options |= {"block_size": rng.choice((4, 16, 32))}
        if method == "dual_cache" and rng.random() < 0.3:
            options |= {"threshold": None, "steps": rng.choice((16, 32, 64))}
    return OracleConfig(**options), blockbatch.DecodeConfig(**options)


def cached_tokens(session, row):
    """What the scripted engine's cache holds of a row's generation region."""
    cache, length = session.cache, int(session.state.prompt_length[row // session.state.num_branches])
    pages = cache.page_table[row].long()
    return cache.kv[0, 0, pages, :, 0, 0].flatten()[length : length + session.state.gen_length] - 1


@pytest.mark.parametrize("eos_exit", ["prefix", "window", "none"])
@pytest.mark.parametrize(
    "query_span, refresh_scope", [("open", "canvas"), ("open", "generation"), ("window", "generation")]
)
@pytest.mark.parametrize("method", METHODS)
def test_scripted_decodes_equal_the_oracle(method, query_span, refresh_scope, eos_exit):
    rng = random.Random(f"{method} {query_span} {refresh_scope} {eos_exit}")
    refreshes = synced = 0
    for _ in range(12 if method == "blockbatch" else 6):
        model = scripted(rng)
        oracle_config, config = configs(rng, method, eos_exit, query_span, refresh_scope)
        prompt = [rng.randrange(20) for _ in range(rng.randint(1, 40))]
        expected = decode(model, prompt, oracle_config)
        engine = EngineScripted(model, page_size=rng.choice((1, 4, 16, 64)))
        session = open_session(engine, prompt, config)
        steps = []
        while (step := session.step()) is not None:
            steps.append([step.phase, step.plan.query_lengths])
            if query_span == "open":
                for row in range(session.state.num_rows):
                    assert torch.equal(session.state.cached_token[row], cached_tokens(session, row).int())
        assert_equal(build_result(engine, session, 0), expected, oracle_config)
        assert steps == query_lengths(expected), oracle_config
        refreshes += expected.nfe_refresh
        synced += sum(branch["synced"] for branch in expected.branches)
    assert refreshes >= 3 and (synced >= 3 or method != "blockbatch")


@pytest.mark.parametrize("eos_exit", ["prefix", "window", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_requests_of_a_batch_equal_the_oracle(method, eos_exit):
    """Requests end, refresh and stand still at different times."""
    rng = random.Random(f"batch {method} {eos_exit}")
    for _ in range(4):
        model = scripted(rng)
        scope = rng.choice(("canvas", "generation"))
        oracle_config, config = configs(rng, method, eos_exit, "open", scope)
        prompts = [[rng.randrange(20) for _ in range(length)] for length in (3, 40, 1, 17, 17)]
        together = generate(EngineScripted(model, page_size=rng.choice((4, 16))), prompts, config)
        for prompt, result in zip(prompts, together, strict=True):
            assert_equal(result, decode(model, prompt, oracle_config), oracle_config)
