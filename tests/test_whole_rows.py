"""Whole rows dealt out to processes that hold a model together, over gloo: what one process decodes."""

import pytest
import torch

import blockbatch
import rank_cases
import rank_processes
import test_conformance
import test_dream_conformance
import whole_row_cases
from blockbatch.decoding.dealt_rows import _rounds
from plain_models import write_dream
from test_conformance import DATA
from test_dream_oracle import DATA as DREAM_DATA
from test_ranks import OTHER, PROMPT

pytestmark = pytest.mark.xdist_group("ranks")

OPTIONS = {
    "method": "blockbatch",
    "gen_length": 32,
    "block_sizes": (2, 4, 8, 16),
    "refresh_interval": 2,
}
# None of them is near a tie: relative noise of 1e-5 in the weights changes no decode. For "Sort: 5 2 9" noise
# of 1e-7 is enough, so that its canvas is up to the order of sums.
PROMPTS = [PROMPT, OTHER, "Sort: 5 2 9 1", "Divide with remainder until zero: 63 and 18.", "Reverse: 9 8 7"]
CASES = [
    (PROMPT, OPTIONS),
    (PROMPTS, OPTIONS),
    (PROMPTS, {**OPTIONS, "eos_exit": "window"}),  # asks the LM head for a token
    (PROMPTS, {**OPTIONS, "query_span": "open", "refresh_scope": "generation"}),
    (PROMPTS[:3], {**OPTIONS, "temperature": 0.7, "seed": 3}),
    (PROMPTS[:3], {"method": "dual_cache", "gen_length": 32, "block_size": 16, "drafts": (1, 2)}),
    (PROMPTS[:2], {"method": "vanilla", "gen_length": 16, "block_size": 16, "steps": 8}),
]


two = rank_processes.fixture(2)
three = rank_processes.fixture(3)
four = rank_processes.fixture(4)


@pytest.fixture(scope="module")
def expected():
    model = blockbatch.load_model("tiny", device="cpu")
    return [
        rank_cases.outcomes(blockbatch.generate(model, prompt, blockbatch.DecodeConfig(**options)))
        for prompt, options in CASES
    ]


@pytest.mark.parametrize("row_tokens", [None, 40])
def test_two_ranks_decode_what_one_process_decodes(two, expected, row_tokens):
    """Several rows of a rank at once, and one at a time."""
    found = two.same(whole_row_cases.decode_all, "tiny", CASES, row_tokens=row_tokens)
    assert [outcome for outcome, _ in found] == expected
    of_one, of_five, _, of_regions, *_ = [rounds for _, rounds in found]
    assert {phase for phase, _ in of_one} == {2}  # its init is one row, which both compute
    assert {phase for phase, _ in of_five} == {0, 2}
    assert {phase for phase, _ in of_regions} == {0}  # a region needs the heads of the text in front of it
    sizes = {len(rows) for _, each in of_five for rows in each}
    assert sizes == {1} if row_tokens else max(sizes) > 2
    for _, each in of_five:
        assert len(each) == 2 and len(each[0]) == len(each[1])


def test_odd_rows_are_left_to_all_ranks(two):
    """The first forward of three requests: two rows are dealt, the third is computed in parts."""
    ((_, rounds),) = two.same(whole_row_cases.decode_all, "tiny", [(PROMPTS[:3], OPTIONS)])
    assert rounds[0] == (0, [[0], [4]])


def test_keys_and_values_are_those_of_rows_in_parts(two):
    for dealt, in_parts in two.values(whole_row_cases.first_forward, "tiny", PROMPTS[:3], OPTIONS):
        lengths = dealt[0].abs().sum((0, 1, 3, 4, 5, 6))
        assert (lengths > 0).all()
        for one, other in zip(dealt, in_parts, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_three_ranks_decode_what_one_process_decodes(three, tmp_path, tied):
    """A vocabulary that three does not divide, with bias and fewer heads of keys than of queries."""
    sizes = dict(hidden_size=36, num_attention_heads=6, num_key_value_heads=3, intermediate_size=48)
    write_dream(tmp_path, **sizes, tie_word_embeddings=tied, sharpness=3.0)
    prompts = [[5, 1, 2], [7, 7], [9], [4, 4, 4, 4], [3, 8]]
    model = blockbatch.load_model(tmp_path, device="cpu")
    right = blockbatch.generate(model, prompts, blockbatch.DecodeConfig(**OPTIONS))
    ((found, rounds),) = three.same(whole_row_cases.decode_all, str(tmp_path), [(prompts, OPTIONS)])
    assert found == rank_cases.outcomes(right)
    assert {phase for phase, _ in rounds} == {0, 2}


@pytest.mark.parametrize("ranks, step", [("two", 10), ("four", 25)])
def test_published_decodes_of_dream(ranks, step, request):
    """Likely tokens travel, too; four ranks share two heads of keys and values."""
    records = range(0, len(test_dream_conformance.RECORDS), step)
    arguments = ("test_dream_conformance", "test_record", "RECORDS", str(DREAM_DATA), records)
    request.getfixturevalue(ranks).values(rank_cases.check_records, *arguments, whole_rows=True)


def test_published_decodes_of_llada(two):
    records = range(0, len(test_conformance.RECORDS), 6)
    arguments = ("test_conformance", "test_record", "RECORDS", str(DATA), records)
    two.values(rank_cases.check_records, *arguments, whole_rows=True)


def test_weights_in_e4m3_decode_alike_on_all_ranks(two):
    options = dict(quantization="fp8")
    ((outcome, rounds),) = two.same(
        whole_row_cases.decode_all, "tiny", [(PROMPTS[:2], OPTIONS)], "float32", **options
    )
    assert len(outcome[0][0]) == 32 and rounds


def test_parts_reach_whom_they_are_for(four):
    assert four.same(whole_row_cases.exchanged, (5, 16, 2, 8), 4, str(DATA)) == [True] * 4


def test_rounds():
    lengths = [10, 0, 10, 10, 0, 10, 10, 10, 30, 10]
    rows = [row for row, length in enumerate(lengths) if length]
    assert _rounds(rows, lengths, 2, 20) == [[[0, 2], [3, 5]], [[6], [7]], [[8], [9]]]
    assert _rounds(rows, lengths, 2, 60) == [[[0, 2, 3, 5], [6, 7, 8, 9]]]
    assert _rounds(rows, lengths, 3, 5) == [[[0], [2], [3]], [[5], [6], [7]]]
    assert _rounds(rows[:1], lengths, 2, 60) == []


def test_one_process_has_no_rows_to_deal():
    with pytest.raises(ValueError, match="^whole_rows: expected False for a model of one process, got True$"):
        blockbatch.load_model("tiny", device="cpu", whole_rows=True)
