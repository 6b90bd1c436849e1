"""The engine on a model that two GPUs hold: it decodes what one GPU decodes, through captured steps."""

import random

import pytest
import torch

import blockbatch
import engine_rank_cases as cases
import rank_processes
import test_block_ranks
from engine_mixes import random_config, random_prompt
from rank_processes import RankProcesses
from test_conformance import DATA
from test_dream_oracle import DATA as DREAM_DATA
from test_engine_ranks import LONG, alone
from test_ranks import DRAWN, OTHER, PROMPT, TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("ranks"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
WAIT = 240

ranks = rank_processes.fixture(2, "cuda")


def test_two_gpus_serve_what_one_decodes(ranks):
    """In fp32: methods and settings beside each other, some with confidences."""
    model = blockbatch.load_model("tiny", device="cuda", dtype="float32")
    requests = [
        # Not with another confidence than the probability: that is refused.
        (
            model.tokenizer.encode(prompt),
            options,
            {"confidences": number == 0 and "confidence" not in options},
        )
        for _, options in (*TINY, *DRAWN)
        for number, prompt in enumerate((PROMPT, OTHER))
    ]
    options = dict(max_requests=8, timeout=WAIT)
    found, _ = ranks.values(cases.mix, "tiny", requests, 0, **options)[0]
    assert [one[0] for one in found] == alone(model, requests)
    assert all((one[1] is None) != given["confidences"] for one, (*_, given) in zip(found, requests))


def test_two_gpus_serve_block_by_block_what_one_decodes(ranks):
    model = blockbatch.load_model("tiny-block", device="cuda", dtype="float32")
    requests = [(model.tokenizer.encode(PROMPT), options, {}) for _, options in test_block_ranks.TINY * 2]
    found, _ = ranks.values(cases.mix, "tiny-block", requests, 0, max_requests=8, timeout=WAIT)[0]
    assert [one[0] for one in found] == alone(model, requests)


@pytest.mark.parametrize("folder", [DATA, DREAM_DATA], ids=["llada", "dream"])
@pytest.mark.parametrize("budget", [100, None])
def test_random_mixes(ranks, folder, budget):
    """With random cancels; slots grow, and with them the captured steps are made anew."""
    model = blockbatch.load_model(folder, device="cuda", dtype="float32")
    rng, requests = random.Random(3), []
    for _ in range(16):
        config = random_config(rng, model.spec.vocab_size, folder == DREAM_DATA)
        requests.append((random_prompt(rng, model.spec.vocab_size), config, {}))
    options = dict(cancel=0.2, max_requests=12, max_tokens_per_step=budget, timeout=WAIT)
    found, _ = ranks.values(cases.mix, str(folder), requests, 5, **options)[0]
    for one, right, request in zip(found, alone(model, requests), requests, strict=True):
        assert one is None or one[0] == right, request


def test_steps_are_captured_on_every_rank(ranks):
    options = {"method": "blockbatch", "gen_length": 64, "block_sizes": (8, 16)}
    counts = ranks.same(cases.graphs_of, str(DATA), [5, 1, 2], options, 3, timeout=WAIT)
    assert sum(counts) > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_alike_on_all_ranks(ranks, dtype):
    """States that differ would end the engine; float16 goes by NCCL."""
    requests = [([5, 1, 2 + n], LONG, {}) for n in range(6)]
    found, steps = ranks.values(cases.mix, str(DATA), requests, 2, dtype=dtype, timeout=WAIT)[0]
    assert all(len(one[0][0]) == LONG["gen_length"] for one in found) and steps > 16


def test_an_idle_engine_waits_for_requests(ranks):
    options = {"method": "blockbatch", "gen_length": 16, "block_sizes": (4, 8)}
    (found, _), follower = ranks.values(cases.idle, str(DATA), [5, 1, 2], options, 8.0, timeout=WAIT)
    assert found[0] == found[1] and follower < 6


@pytest.mark.parametrize("how", ["follower dies", "leader dies"])
def test_a_rank_that_dies_ends_the_other(how):
    processes = RankProcesses(2, "cuda")
    try:
        dead = int(how == "follower dies")
        answers = processes.run(cases.break_off, str(DATA), [5, 1, 2], LONG, 3, how, timeout=WAIT)
        other = answers[1 - dead]
        assert answers[dead].type == "Ended"
        if getattr(other, "type", None) == "Ended":  # it waited on its GPU
            processes.processes[1 - dead].join(WAIT)
            assert processes.processes[1 - dead].exitcode == 70
        else:
            assert "rank 1 ended" in other[0] if dead else other.type == "RankError"
    finally:
        processes.close()
