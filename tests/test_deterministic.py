"""Bits that do not depend on the batch: products in pieces of one size, attention in one cut."""

import pytest
import torch

import blockbatch
import blockbatch_kernels as bbk
from blockbatch.decoding.engine import Engine
from blockbatch.models.products import in_pieces
from blockbatch_kernels import tuning
from engine_mixes import outcome, random_mix
from plain_models import write_llada


def confidences(model, company, **options):
    """Of one request behind every forward, alone or with others that join and are cancelled."""
    prompts = [model.tokenizer.encode(f"Q: {3 + n}+4*{n}=?\nA:") for n in range(6)]
    config = blockbatch.DecodeConfig(
        gen_length=64, block_sizes=(4, 8, 32), eos_exit="none", refresh_interval=8
    )
    other = blockbatch.DecodeConfig(gen_length=128, block_sizes=(16, 64), eos_exit="none")
    engine = Engine(model, cache_tokens=1 << 15, **options)
    request, seen, turn = engine.submit(prompts[0], config), [], 0
    while not request.ended:
        if company and turn in (0, 2, 3, 5, 9):
            engine.submit(prompts[turn % 5 + 1], other)
        forwards = request.nfe.total
        engine.step()
        turn += 1
        if request.nfe.total > forwards and not request.ended:
            (seat,) = (seat for seat in engine._lane._seats if seat.request is request)
            slots = seat.place.forward.slots
            seen.append(slots.state.confidence[slots.rows_of(seat.place.slot)][:3, :64].cpu().clone())
    engine.close()
    return seen


def same(some, others):
    return len(some) == len(others) and all(one.equal(other) for one, other in zip(some, others))


def test_a_mix_with_fixed_bits_decodes_as_alone(tmp_path):
    write_llada(tmp_path, sharpness=3.0, seed=1)
    model = blockbatch.load_model(tmp_path, device="cpu")
    random_mix(model, 3, 10, deterministic=True, max_requests=4, max_tokens_per_step=100)


def test_products_in_pieces():
    calls = []

    def operator(x, weight, bias, places):
        calls.append((len(x), places.tolist()))
        return x @ weight + bias + places.unsqueeze(1)

    x, weight, bias = torch.randn(8, 4), torch.randn(4, 8), torch.randn(8)
    places = torch.arange(8)
    result = in_pieces(operator, 4)(x, weight, bias, places)
    assert calls == [(4, [0, 1, 2, 3]), (4, [4, 5, 6, 7])]
    assert torch.allclose(result, operator(x, weight, bias, places))
    assert in_pieces(operator, None) is operator


@pytest.mark.parametrize("num_tokens", [1, 32, 252, 1024, 1025, 4096])
def test_a_fixed_cut_is_one_for_all_packs(num_tokens):
    shape = tuning.attention_shape(num_tokens, 32, 8, 16, 100, 132, fixed_cut=True)
    assert (shape.max_pieces, shape.tile_tokens, shape.block_tokens) == (1, 16, 0)
    assert tuning.attention_shape(num_tokens, 32, 8, 16, 100, 132).max_tiles >= 1


def test_the_plan_of_a_fixed_cut_has_whole_rows():
    table = torch.arange(3 * 40, dtype=torch.int32).view(3, 40)
    bounds = torch.tensor([0, 4, 12, 44], dtype=torch.int32)
    lengths = torch.tensor([640, 100, 333], dtype=torch.int32)
    options = dict(page_size=16, num_tokens=48, num_heads=4, num_kv_heads=4)
    plan = bbk.attention_plan(table, bounds, lengths, **options, fixed_cut=True)
    assert plan.pieces.shape[0] == 1 and plan.counts.tolist() == [3, 1]
    assert plan.pieces[0, 0] == 0 and plan.pieces[0, 1] >= 640


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("backend", [None, "triton"])
def test_bits_do_not_depend_on_company(dtype, backend):
    model = blockbatch.load_model("tiny", device="cuda", dtype=dtype, backend=backend)
    alone = confidences(model, company=False, deterministic=True)
    assert len(alone) > 10
    assert same(alone, confidences(model, company=True, deterministic=True))
    assert same(alone, confidences(model, company=True, deterministic=True, max_tokens_per_step=1))


@pytest.mark.gpu
def test_fixed_bits_give_the_same_text_in_fp32():
    model = blockbatch.load_model("tiny", device="cuda", dtype="float32")
    config = blockbatch.DecodeConfig(gen_length=128)
    engine = Engine(model, deterministic=True, cache_tokens=1 << 15)
    prompts = [model.tokenizer.encode(f"Q: {3 + n}+4*{n}=?\nA:") for n in range(8)]
    requests = [engine.submit(prompt, config) for prompt in prompts]
    engine.run_until_idle()
    for request, prompt in zip(requests, prompts, strict=True):
        assert outcome(request.result) == outcome(blockbatch.generate(model, prompt, config))
