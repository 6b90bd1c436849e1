"""Models that two GPUs hold together: the sums' bits, whole decodes, and the end of a rank."""

import pytest
import torch

import blockbatch
import rank_cases
import rank_processes
import test_block_ranks
import whole_row_cases
from rank_processes import RankProcesses
from test_conformance import DATA
from test_dream_oracle import DATA as DREAM_DATA
from test_ranks import DRAWN, SHORT, TINY
from test_whole_rows import CASES, PROMPTS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("ranks"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
WAIT = 240

ranks = rank_processes.fixture(2, "cuda")


@pytest.mark.parametrize("transport", ["symmetric", "nccl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_have_the_same_bits_everywhere(ranks, transport, dtype):
    """Small, large and larger than the buffer; as they are, and captured."""
    if (transport, dtype) == ("symmetric", torch.float16):
        pytest.skip("float16 takes NCCL")
    counts = (8, 3 * 4096, 128 * 4096, 1280 * 4096, 33 << 19)
    ranks.same(rank_cases.sums_on_gpus, transport, dtype, counts, timeout=WAIT)


@pytest.mark.parametrize("transport", ["symmetric", "nccl"])
def test_numbers_are_collected_from_every_rank(ranks, transport):
    ranks.values(rank_cases.collect_on_gpus, transport, timeout=WAIT)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_sums_have_the_bits_of_two_steps_everywhere(ranks, dtype, quantized):
    """One row, steps, a whole row, and more rows than an inbox holds."""
    sizes = ((1, 4096), (32, 3584), (128, 4096), (252, 4096), (1280, 4096), (5000, 4096))
    ranks.same(rank_cases.norms_on_gpus, dtype, quantized, sizes, timeout=WAIT)


def test_two_gpus_decode_what_one_process_decodes(ranks):
    """In fp32, through captured steps."""
    model = blockbatch.load_model("tiny", device="cuda", dtype="float32")
    expected = [
        rank_cases.outcomes(blockbatch.generate(model, prompt, blockbatch.DecodeConfig(**options)))
        for prompt, options in (*TINY, *DRAWN)
    ]
    assert ranks.same(rank_cases.decode_all, "tiny", [*TINY, *DRAWN], timeout=WAIT) == expected
    assert ranks.same(rank_cases.transport_of, "tiny") == "symmetric"


def test_two_gpus_decode_block_by_block_what_one_process_decodes(ranks):
    """A block-causal model, in fp32, through captured forwards."""
    model = blockbatch.load_model("tiny-block", device="cuda", dtype="float32")
    expected = [
        rank_cases.outcomes(blockbatch.generate(model, prompt, blockbatch.DecodeConfig(**options)))
        for prompt, options in test_block_ranks.TINY
    ]
    found = ranks.same(rank_cases.decode_all, "tiny-block", test_block_ranks.TINY, timeout=WAIT)
    assert found == expected


def test_rows_in_two_lanes_are_those_of_one(ranks):
    """The first rows of three prompts are more than go at once, and so go into both lanes."""
    for prompt, options in TINY[:4]:
        _, entered = ranks.same(rank_cases.decode_by_lanes, "tiny", prompt, options, timeout=WAIT)
        assert entered or not isinstance(prompt, list)


@pytest.mark.parametrize("row_tokens", [None, 40])
def test_two_gpus_decode_by_dealt_rows_what_one_process_decodes(ranks, row_tokens):
    model = blockbatch.load_model("tiny", device="cuda", dtype="float32")
    expected = [
        rank_cases.outcomes(blockbatch.generate(model, prompt, blockbatch.DecodeConfig(**options)))
        for prompt, options in CASES
    ]
    options = dict(row_tokens=row_tokens, timeout=WAIT)
    found = ranks.same(whole_row_cases.decode_all, "tiny", CASES, **options)
    for (outcome, _), wanted, (prompt, settings) in zip(found, expected, CASES, strict=True):
        assert outcome == wanted, (prompt, settings)
    assert {phase for phase, _ in found[1][1]} == {0, 2}


def test_keys_and_values_of_dealt_rows(ranks):
    for dealt, in_parts in ranks.values(whole_row_cases.first_forward, "tiny", PROMPTS[:4], CASES[0][1]):
        for one, other in zip(dealt, in_parts, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_parts_reach_whom_they_are_for(ranks):
    """Some megabytes, and more than the buffer has room for."""
    for pages, sends in ((3, 9), (600, 3)):
        shape = (pages, 16, 16, 128)
        assert ranks.same(whole_row_cases.exchanged, shape, sends, timeout=WAIT) == [True] * sends


def test_half_precision_decodes_alike_on_all_ranks(ranks):
    for dtype in ("bfloat16", "float16"):
        canvas, _, nfe, *_ = ranks.same(rank_cases.decode, "tiny", *TINY[0], dtype, timeout=WAIT)
        assert len(canvas) == SHORT["gen_length"] and sum(nfe) > 3


@pytest.mark.parametrize(
    "module, folder, step", [("test_conformance", DATA, 6), ("test_dream_conformance", DREAM_DATA, 6)]
)
def test_published_decodes(ranks, module, folder, step):
    records = range(0, 53, step)
    ranks.values(
        rank_cases.check_records, module, "test_record", "RECORDS", str(folder), records, timeout=WAIT
    )


def test_a_rank_that_dies_ends_the_others():
    processes = RankProcesses(2, "cuda")
    try:
        options = {"method": "blockbatch", "gen_length": 64, "block_sizes": (4, 8)}
        first, second = processes.run(
            rank_cases.break_off, str(DATA), 3, [5, 1, 2], options, "dies", timeout=WAIT
        )
        assert second.type == "Ended"
        if first.type == "Ended":  # it waited on its GPU
            processes.processes[0].join(WAIT)
            assert processes.processes[0].exitcode == 70
        else:
            assert (first.type, first.text) == ("RankError", "rank 1 ended")
    finally:
        processes.close()
