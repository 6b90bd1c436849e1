"""Models that several processes hold together, over gloo: what they decode is what one process decodes."""

import functools
import math

import pytest
import torch

import blockbatch
import blockbatch_kernels as bbk
import rank_cases
import rank_processes
import test_conformance
import test_dream_conformance
from blockbatch.parallel.head import ShardedHead
from lora_files import targets_of, write_adapter, write_model
from plain_models import write_dream
from test_conformance import DATA
from test_dream_oracle import DATA as DREAM_DATA

# The processes are started once.
pytestmark = pytest.mark.xdist_group("ranks")

PROMPT = "Divide with remainder until zero: 51 and 16."
OTHER = "Reverse: 3 1 4 1 5"
SHORT = {"gen_length": 32, "block_sizes": (4, 8, 16), "refresh_interval": 8}
BASELINE = {"gen_length": 32, "block_size": 16}
TINY = [
    (PROMPT, {"method": "blockbatch", **SHORT}),
    (PROMPT, {"method": "blockbatch", **SHORT, "eos_exit": "window"}),  # asks the LM head for a token
    (PROMPT, {"method": "blockbatch", **SHORT, "query_span": "open", "refresh_scope": "generation"}),
    ([PROMPT, OTHER, "Sort: 5 2 9"], {"method": "blockbatch", **SHORT}),
    (PROMPT, {"method": "blockbatch", **SHORT, "stop": ("=15",)}),
    (PROMPT, {"method": "vanilla", "steps": 8, **BASELINE}),
    (PROMPT, {"method": "prefix_cache", **BASELINE}),
    (PROMPT, {"method": "dual_cache", **BASELINE, "drafts": (1, 2)}),
    (PROMPT, {"method": "local_leap", **BASELINE}),
]
# Tokens are drawn, or logits changed.
DRAWN = [
    (PROMPT, {"method": "blockbatch", **SHORT, "temperature": 0.7, "seed": 5}),
    ([PROMPT, OTHER], {"method": "blockbatch", **SHORT, "temperature": 1.0, "top_p": 0.9, "top_k": 40}),
    (
        PROMPT,
        {"method": "blockbatch", **SHORT, "bad_token_ids": (3, 900), "min_tokens": 20, "eos_bias": -2.0},
    ),
    (PROMPT, {"method": "blockbatch", **SHORT, "temperature": 0.5, "eos_exit": "window"}),
    (PROMPT, {"method": "dual_cache", **BASELINE, "temperature": 0.5, "confidence": "entropy"}),
    (PROMPT, {"method": "dual_cache", **BASELINE, "drafts": (1, 2), "bad_token_ids": (7,)}),
    (PROMPT, {"method": "local_leap", **BASELINE, "confidence": "margin"}),
]


two = rank_processes.fixture(2)
three = rank_processes.fixture(3)
four = rank_processes.fixture(4)


@pytest.fixture(scope="module")
def tiny():
    return blockbatch.load_model("tiny", device="cpu")


def test_every_method_is_among_the_cases():
    assert {options["method"] for _, options in TINY} == set(blockbatch.METHODS)


def test_two_ranks_decode_what_one_process_decodes(two, tiny):
    expected = [
        rank_cases.outcomes(blockbatch.generate(tiny, prompt, blockbatch.DecodeConfig(**options)))
        for prompt, options in TINY
    ]
    assert two.same(rank_cases.decode_all, "tiny", TINY) == expected


@pytest.mark.parametrize("tied", [False, True])
def test_three_ranks_decode_what_one_process_decodes(three, tmp_path, tied):
    """A vocabulary that three does not divide, with bias and fewer heads of keys than of queries."""
    sizes = dict(hidden_size=36, num_attention_heads=6, num_key_value_heads=3, intermediate_size=48)
    write_dream(tmp_path, **sizes, tie_word_embeddings=tied, sharpness=3.0)
    options = {"method": "blockbatch", **SHORT, "eos_exit": "window"}
    model = blockbatch.load_model(tmp_path, device="cpu")
    expected = blockbatch.generate(model, [5, 1, 2], blockbatch.DecodeConfig(**options))
    found = three.same(rank_cases.decode, str(tmp_path), [5, 1, 2], options)
    assert found == rank_cases.outcomes(expected)


def test_two_ranks_stream_what_one_process_streams(two, tiny):
    options = TINY[0][1]
    expected = list(blockbatch.stream(tiny, PROMPT, blockbatch.DecodeConfig(**options)))
    assert two.same(rank_cases.stream, "tiny", PROMPT, options) == expected


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_an_adapter_in_parts(two, tmp_path, family):
    base = write_model(tmp_path / "base", family)
    write_adapter(tmp_path / "adapter", base, targets_of(family))
    ids, adapter = [[5, 1, 2, 30]], str(tmp_path / "adapter")
    first, second = two.values(rank_cases.logits_of, str(base), ids, adapter=adapter)
    assert torch.equal(first, second)
    expected = blockbatch.load_model(base, device="cpu", adapter=adapter).logits(ids)
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, blockbatch.load_model(base, device="cpu").logits(ids), atol=0.1)


def test_weights_in_e4m3(two, tiny):
    """Each rank quantises its part of a row by a scale of its own: as far from fp32 as one process."""
    ids = torch.randint(0, 1414, (8, 40), generator=torch.Generator().manual_seed(0))
    ids[:, 20:] = 1415  # MASK
    first, second = two.values(rank_cases.logits_of, "tiny", ids, quantization="fp8")
    assert torch.equal(first, second)
    exact = tiny.logits(ids)
    whole = blockbatch.load_model("tiny", device="cpu", quantization="fp8").logits(ids)
    error, usual = ((logits - exact).norm() / exact.norm() for logits in (first, whole))
    assert 0 < usual and error < 1.25 * usual


def test_keys_and_values_in_e4m3(two):
    """Each rank finds the scales of its heads: those of one process."""
    ids = torch.randint(0, 1414, (4, 40), generator=torch.Generator().manual_seed(0))
    first, second = two.values(rank_cases.logits_of, "tiny", ids, kv_dtype="fp8")
    assert torch.equal(first, second)
    whole = blockbatch.load_model("tiny", device="cpu", kv_dtype="fp8")
    expected = whole.logits(ids)
    assert (first - expected).norm() < 0.005 * expected.norm()
    scales = two.values(rank_cases.scales_of, "tiny")
    for place, name in enumerate("kv"):
        assert torch.equal(torch.cat([found[place] for found in scales], 1), getattr(whole.kv_scales, name))


def test_gaps_are_filled_as_by_one_process(two, tiny):
    text = "Divide with remainder until zero: 51 and 16.\n3*16={3}, 51-48={2}\n"
    expected = blockbatch.fill(tiny, text, blockbatch.DecodeConfig(method="blockbatch"))
    assert two.same(rank_cases.fill, "tiny", text) == expected.tokens


def test_every_operator_of_the_lm_head_has_its_counterpart():
    """An operator that is given a part of the vocabulary alone would be wrong without an error."""
    operators = {name for name in bbk.__all__ if name.startswith("lm_head")}
    assert operators == {name for name in vars(ShardedHead) if name.startswith("lm_head")}


def test_two_ranks_draw_what_one_process_draws(two, tiny):
    expected = [
        rank_cases.outcomes(blockbatch.generate(tiny, prompt, blockbatch.DecodeConfig(**options)))
        for prompt, options in DRAWN
    ]
    greedy = blockbatch.generate(tiny, PROMPT, blockbatch.DecodeConfig(method="blockbatch", **SHORT))
    assert expected[0][0] != greedy.canvas
    assert two.same(rank_cases.decode_all, "tiny", DRAWN) == expected


def test_published_decodes_of_llada(two):
    records = range(0, len(test_conformance.RECORDS), 3)
    two.values(rank_cases.check_records, "test_conformance", "test_record", "RECORDS", str(DATA), records)


def test_decodes_of_cheaper_forwards(two):
    records = range(0, len(test_conformance.OPEN_RECORDS), 6)
    two.values(
        rank_cases.check_records,
        "test_conformance",
        "test_record_of_cheaper_forwards",
        "OPEN_RECORDS",
        str(DATA),
        records,
    )


@pytest.mark.parametrize("ranks, step", [("two", 5), ("four", 20)])
def test_published_decodes_of_dream(ranks, step, request):
    """Four ranks share two heads of keys and values."""
    records = range(0, len(test_dream_conformance.RECORDS), step)
    request.getfixturevalue(ranks).values(
        rank_cases.check_records,
        "test_dream_conformance",
        "test_record",
        "RECORDS",
        str(DREAM_DATA),
        records,
    )


def test_published_decodes_of_llada_by_four_ranks(four):
    records = range(0, len(test_conformance.RECORDS), 24)
    four.values(rank_cases.check_records, "test_conformance", "test_record", "RECORDS", str(DATA), records)


def test_logits_and_likelihoods(two, tiny):
    ids = [[5, 7, 900, 3, 1415, 1415], [8, 8, 1, 1415, 2, 1000]]
    first, second = two.values(rank_cases.logits, "tiny", ids)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, tiny.logits(ids), rtol=1e-4, atol=1e-4)
    found = two.same(rank_cases.log_likelihood, "tiny", PROMPT, " 3*16=48")
    expected = tiny.log_likelihood(PROMPT, " 3*16=48", samples=8)
    assert math.isclose(found.value, expected.value, rel_tol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_added_in_the_order_of_the_ranks(four, dtype):
    answers = four.values(rank_cases.sums, dtype)
    total = answers[0][0]
    for part, _ in answers[1:]:
        total = total + part
    assert all(torch.equal(found, total) for _, found in answers)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_sum_is_that_of_the_two_steps(four, dtype, quantized):
    answers = four.values(rank_cases.norms, dtype, quantized)
    total = functools.reduce(torch.add, [part for part, _, _ in answers])
    weight, residual = rank_cases.norm_inputs(dtype)
    norm = bbk.rms_norm_fp8 if quantized else bbk.rms_norm
    expected = norm(total, weight, eps=1e-5, residual=residual)
    for _, rows, held in answers:
        assert torch.equal(held, residual)
        pairs = zip(rows, expected, strict=True) if quantized else [(rows, expected)]
        assert all(torch.equal(found.float(), right.float()) for found, right in pairs)


@pytest.mark.parametrize("folder", [DATA, "tiny"])
def test_each_rank_reads_its_part_alone(two, four, folder):
    path = str(blockbatch.models.model.BUILT_IN.get(folder, folder))
    for ranks in (two, four) if folder == DATA else (two,):
        for read, part in ranks.values(rank_cases.bytes_read, path):
            headers = 200_000  # and an index
            assert part <= read <= part + headers
    whole = sum(file.stat().st_size for file in blockbatch.models.model.Path(path).glob("*.safetensors"))
    assert folder == DATA or part < 0.55 * whole
