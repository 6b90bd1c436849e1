"""The engine on a model that several processes hold: what they decode is what one process decodes alone."""

import random

import pytest

import blockbatch
import engine_rank_cases as cases
import rank_cases
import rank_processes
from engine_mixes import random_config, random_prompt
from plain_models import write_dream, write_llada
from rank_processes import RankProcesses
from test_conformance import DATA
from test_ranks import OTHER, PROMPT, SHORT

pytestmark = pytest.mark.xdist_group("engine_ranks")

LONG = {"method": "blockbatch", "gen_length": 64, "block_sizes": (4, 8), "refresh_interval": None}
WAIT = 60

two = rank_processes.fixture(2)
# Ranks that a test may kill.
mortal = rank_processes.fixture(2, scope="function")


@pytest.fixture(scope="module")
def tiny():
    return blockbatch.load_model("tiny", device="cpu")


def alone(model, requests):
    return [
        rank_cases.outcomes(blockbatch.generate(model, prompt, cases.config_of(settings)))
        for prompt, settings, _ in requests
    ]


def test_requests_that_join_at_random_moments(two, tiny):
    """Of several methods and settings, some with stop texts, some with confidences."""
    texts = [PROMPT, OTHER, "Sort: 5 2 9", "Divide with remainder until zero: 17 and 3."]
    settings = [
        {"method": "blockbatch", **SHORT},
        {"method": "blockbatch", **SHORT, "query_span": "open", "refresh_scope": "generation"},
        {"method": "dual_cache", "gen_length": 64, "block_size": 16, "drafts": (1, 2)},
        {"method": "blockbatch", **SHORT, "stop": ("=15",)},
        {"method": "local_leap", "gen_length": 32, "block_size": 16},
        {"method": "blockbatch", **SHORT, "eos_exit": "window"},
        {"method": "blockbatch", **SHORT, "temperature": 0.7, "top_p": 0.9, "seed": 4},
        {"method": "blockbatch", **SHORT, "temperature": 1.0, "top_p": 0.8, "seed": 9},
        {"method": "dual_cache", "gen_length": 64, "block_size": 16, "bad_token_ids": (7, 900)},
    ]
    requests = [
        (tiny.tokenizer.encode(texts[index % 4]), options, {"confidences": index % 2 == 0})
        for index, options in enumerate(settings)
    ]
    found, _ = two.values(cases.mix, "tiny", requests, 0, max_requests=4, max_tokens_per_step=200)[0]
    assert [one[0] for one in found] == alone(tiny, requests)
    assert {one[0][3] for one in found} >= {"stop"}
    for (_, confidences), (_, _, given) in zip(found, requests, strict=True):
        assert (confidences is None) != given["confidences"]
        assert confidences is None or all(0 < one <= 1 for one in confidences)
    assert sum(len(confidences or ()) for _, confidences in found) > 20


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("budget", [60, None])
def test_random_mixes(two, tmp_path, family, budget):
    """With random cancels; more slots, rows and positions come to be needed on the way."""
    {"llada": write_llada, "dream": write_dream}[family](tmp_path, sharpness=3.0, seed=1)
    model = blockbatch.load_model(tmp_path, device="cpu")
    rng, requests = random.Random(f"{family} {budget}"), []
    for _ in range(16):
        config = random_config(rng, model.spec.vocab_size, family == "dream")
        requests.append((random_prompt(rng, model.spec.vocab_size), config, {}))
    options = dict(cancel=0.3, max_requests=12, max_tokens_per_step=budget)
    found, steps = two.values(cases.mix, str(tmp_path), requests, 7, **options)[0]
    expected = alone(model, requests)
    assert 0 < sum(one is None for one in found) < 12 and steps > 32
    for one, right, request in zip(found, expected, requests, strict=True):
        assert one is None or one[0] == right, request


def test_several_ranks_follow(tmp_path):
    """A vocabulary that three does not divide."""
    sizes = dict(hidden_size=36, num_attention_heads=6, num_key_value_heads=3, intermediate_size=48)
    write_dream(tmp_path, **sizes, sharpness=3.0)
    model = blockbatch.load_model(tmp_path, device="cpu")
    config = {"method": "blockbatch", **SHORT, "eos_exit": "window"}
    requests = [([5, 1, 2 + number], config, {}) for number in range(6)]
    three = RankProcesses(3)
    try:
        found, _ = three.values(cases.mix, str(tmp_path), requests, 3, cancel=0.2, timeout=WAIT)[0]
    finally:
        three.close()
    for one, right in zip(found, alone(model, requests), strict=True):
        assert one is None or one[0] == right


def test_branches_by_load_and_fixed_pieces(two, tiny):
    """Rank 0 alone knows the load; the pieces of a deterministic engine."""
    options = {"method": "blockbatch", "gen_length": 64, "block_sizes": (8, 16, 32, 64)}
    requests = [(tiny.tokenizer.encode(f"Sort: {n} 2 9"), options, {}) for n in range(6)]
    given = dict(branches="load", deterministic=True, max_requests=6)
    found, _ = two.values(cases.mix, "tiny", requests, 1, **given)[0]
    counts = {len(outcome[4]) for outcome, _ in found}
    assert len(counts) > 1
    fewer = [
        (prompt, {**options, "block_sizes": tuple(size for size, *_ in outcome[4])}, {})
        for (prompt, _, _), (outcome, _) in zip(requests, found, strict=True)
    ]
    assert [outcome for outcome, _ in found] == alone(tiny, fewer)


def test_what_rank_0_refuses_nobody_else_hears_of(two):
    errors, status = two.values(cases.refused, str(DATA), [5, 1, 2])[0]
    assert status == "finished"
    starts = [
        "ValueError: prompt: expected ids from 0 to ",
        "ValueError: branches: expected a number from 1 to ",
        "RuntimeError: model: expected no open engine on its 2 ranks, got one",
        "RuntimeError: model: expected no open engine on its 2 ranks, got one",
        "RuntimeError: model: expected no open engine on its 2 ranks, got one",
        "RuntimeError: engine: expected another rank than the first to follow it",
    ]
    assert [error[: len(start)] for error, start in zip(errors, starts, strict=True)] == starts


def test_an_engine_is_used_on_rank_0(two):
    assert two.values(cases.used_elsewhere, str(DATA))[0] == []
    errors = two.values(cases.used_elsewhere, str(DATA))[1]
    assert [error.startswith("engine: expected to be used on rank 0") for error in errors] == [True] * 2


def test_bad_engines_are_refused(two):
    for answer in two.run(cases.with_whole_rows, str(DATA), timeout=WAIT):
        assert answer.type == "ValueError"
        assert answer.text.startswith("model: expected one that was loaded without whole_rows")
    for answer in two.run(cases.differ, str(DATA), timeout=WAIT):
        assert answer.type == "RankError"
        assert answer.text.startswith("the start of an engine (its options): expected the same on all ranks")


def test_a_model_of_one_process_has_nobody_to_follow(tiny):
    from blockbatch.decoding.engine import Engine

    with pytest.raises(RuntimeError, match="^engine: expected a model of several ranks"):
        Engine(tiny).follow()


def test_an_idle_engine_waits_for_requests(two):
    """Longer than a forward may take, and without work for the processor."""
    prompt, options = [5, 1, 2], {"method": "blockbatch", "gen_length": 16, "block_sizes": (4, 8)}
    (found, used), follower = two.values(cases.idle, str(DATA), prompt, options, 4.0, timeout=WAIT)
    expected = rank_cases.outcomes(
        blockbatch.generate(
            blockbatch.load_model(str(DATA), device="cpu"), prompt, blockbatch.DecodeConfig(**options)
        )
    )
    assert found == [expected] * 2
    assert used < 1 and follower < 2.5  # with the requests


def test_a_callback_that_fails_ends_its_request_on_all_ranks(two):
    model = blockbatch.load_model(str(DATA), device="cpu")
    status, error, other = two.values(cases.bad_callback, str(DATA), [5, 1, 2], LONG)[0]
    assert (status, error) == ("failed", "this test")
    assert [other] == alone(model, [([5, 1, 2], LONG, {})])


def test_closing_ends_all_ranks(two):
    assert two.values(cases.closed_at_work, str(DATA), [5, 1, 2], LONG)[0] == "failed"


@pytest.mark.parametrize("how", ["follower dies", "leader dies", "follower fails"])
def test_a_rank_that_ends_in_a_forward_ends_the_others(mortal, how):
    first, second = mortal.run(cases.break_off, str(DATA), [5, 1, 2], LONG, 3, how, timeout=WAIT)
    if how == "leader dies":
        assert first.type == "Ended" and second.type == "RankError"
        assert second.text in ("rank 0 ended", "rank 0 ended before it closed its engine")
        return
    dies = how == "follower dies"
    message = "rank 1 ended" if dies else "rank 1: expected room for this test, got none"
    assert first == (message, message, [message], ["failed"] * 2)
    assert second.type == ("Ended" if dies else "MemoryError")


def test_a_rank_that_ends_while_all_wait_is_noticed(mortal):
    first, second = mortal.run(
        cases.break_off, str(DATA), [5, 1, 2], LONG, 0, "idle follower dies", timeout=30
    )
    assert (first.type, first.text, second.type) == ("RankError", "rank 1 ended", "Ended")


@pytest.mark.parametrize("at_step", [1, 17, None])
def test_a_state_that_differs_is_found(two, at_step):
    """At the end of all requests at the latest."""
    if at_step is None:
        answers = two.values(cases.diverge, str(DATA), [5, 1, 2], LONG, 10**6, timeout=WAIT)
        steps = answers[0][0]
        assert answers == [(steps, None)] * 2 and steps > 17
        at_step = steps
    answers = two.values(cases.diverge, str(DATA), [5, 1, 2], LONG, at_step, timeout=WAIT)
    assert answers[0] == answers[1]
    steps, message = answers[0]
    assert at_step <= steps < at_step + 17
    assert message.startswith("the state of the engine after forward ")
    assert message.endswith("expected the same on all ranks, rank 1 differs from rank 0")
