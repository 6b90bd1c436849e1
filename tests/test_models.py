"""Our transformer against an independent plain-torch forward, full and cached."""

import pytest
import torch

import blockbatch
import blockbatch_kernels as bbk
from blockbatch.models import transformer
from plain_models import PlainModel, write_dream, write_llada

CHECKPOINTS = {
    "llada": (write_llada, {}),
    "llada-gqa-padded-embedding": (write_llada, {"n_kv_heads": 2, "embedding_size": 48}),
    "llada-tied-sharded": (write_llada, {"weight_tying": True, "shards": 3}),
    "llada-no-kv-heads": (write_llada, {"n_kv_heads": "missing"}),
    "dream": (write_dream, {}),
    "dream-tied-sharded": (write_dream, {"tie_word_embeddings": True, "shards": 2}),
}


@pytest.fixture(params=CHECKPOINTS)
def folder(request, tmp_path):
    write, options = CHECKPOINTS[request.param]
    write(tmp_path, **options)
    return tmp_path


def random_ids(model, *shape):
    return torch.randint(0, model.spec.vocab_size, shape)


def test_logits(folder):
    model, plain = blockbatch.load_model(folder, device="cpu"), PlainModel(folder, dtype=torch.float64)
    ids = random_ids(model, 3, 21)
    expected = torch.stack(plain.logits(ids.tolist()))[..., : model.spec.vocab_size]
    got = model.logits(ids)
    assert got.shape == (3, 21, model.spec.vocab_size)
    fp32 = torch.stack(PlainModel(folder).logits(ids.tolist()))[..., : model.spec.vocab_size]
    allowed = 2 * (fp32.double() - expected).abs().max() + 1e-6 * expected.abs().max()
    assert (got.double() - expected).abs().max() <= allowed
    assert torch.equal(model.logits(ids[1].tolist()), model.logits(ids[1:2]))


def test_half_precision_logits_stay_close(folder):
    model = blockbatch.load_model(folder, device="cpu", dtype="bfloat16")
    ids = random_ids(model, 2, 12)
    exact = PlainModel(folder, dtype=torch.float64).logits(ids.tolist())
    exact = torch.stack(exact)[..., : model.spec.vocab_size]
    got = model.logits(ids)
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).norm() <= 0.05 * exact.norm()


def run(model, cache, state, plan, seqlens_k):
    packed = bbk.pack_windows(
        state,
        plan,
        cache.page_table,
        page_size=cache.page_size,
        capacity=int(plan.flags[2]),
        predict_capacity=int(plan.flags[3]),
        prediction_offset=model.spec.prediction_offset,
    )
    return model.predict(packed, cache, seqlens_k)


def first_forward(model, prompt_length, gen_length):
    """State, plan, lengths and prepared cache of two branches at the beginning."""
    prompt = random_ids(model, prompt_length).int()
    prompt[prompt == model.spec.mask_token_id] = 0
    sizes, lengths = (torch.tensor(values, dtype=torch.int32) for values in ([4, 16], [prompt_length]))
    state = bbk.BranchState.create(prompt.unsqueeze(0), lengths, sizes, gen_length, model.spec.mask_token_id)
    params = bbk.PolicyParams(model.spec.mask_token_id, (0,), prediction_offset=model.spec.prediction_offset)
    canvas = prompt_length + gen_length
    cache, plan = model.new_cache(1, 2, canvas), bbk.initial_plan(state, params)
    cache.prepare(plan)
    return state, plan, torch.full((2,), canvas, dtype=torch.int32), cache


def test_few_predictions_of_a_long_pack(folder, monkeypatch):
    """The last layer computes the tokens that predict alone: the same comes out, keys and values too."""
    model = blockbatch.load_model(folder, device="cpu")
    state, plan, seqlens_k, cache = first_forward(model, 40, 16)
    forward, seen = transformer.forward, []

    def whole(*arguments, wanted, **options):
        seen.append(wanted)
        return forward(*arguments, **options)[wanted]

    few = run(model, cache, state, plan, seqlens_k)
    kv = cache.kv.clone()
    monkeypatch.setattr(transformer, "forward", whole)
    all_tokens = run(model, cache, state, plan, seqlens_k)
    assert len(seen[0]) == 16
    assert torch.equal(few.top_token, all_tokens.top_token)
    torch.testing.assert_close(few.confidence, all_tokens.confidence, rtol=1e-5, atol=0)
    assert torch.equal(kv, cache.kv)


def test_block_forward_right_after_a_full_forward_agrees_with_it(folder):
    """With nothing changed since the full forward, a window's predictions must be the full forward's."""
    model = blockbatch.load_model(folder, device="cpu")
    offset, gen_length = model.spec.prediction_offset, 32
    state, plan, seqlens_k, cache = first_forward(model, 9, gen_length)
    full = run(model, cache, state, plan, seqlens_k)
    cache.share(plan.source_row)

    starts = torch.tensor([4, 16], dtype=torch.int32) + 9 - offset
    ends = torch.tensor([8, 32], dtype=torch.int32) + 9 - offset
    predict = torch.zeros_like(plan.predict)
    predict[0, 4:8], predict[1, 16:32] = True, True
    flags = torch.tensor([1, 1, 20, 20, 0], dtype=torch.int32)
    sources = torch.tensor([0, 1], dtype=torch.int32)
    block_plan = bbk.StepPlan(starts, ends, sources, predict, flags, plan.query_position)
    cache.prepare(block_plan)
    block = run(model, cache, state, block_plan, seqlens_k)
    by_position = dict(zip(full.target.tolist(), zip(full.top_token.tolist(), full.confidence.tolist())))
    assert len(block.target) == 20
    for target, top, confidence in zip(
        block.target.tolist(), block.top_token.tolist(), block.confidence.tolist()
    ):
        same_top, same_confidence = by_position[target % gen_length]
        assert top == same_top
        assert confidence == pytest.approx(same_confidence, rel=1e-4)


def test_bad_input_ids(folder):
    model = blockbatch.load_model(folder, device="cpu")
    vocabulary = model.spec.vocab_size
    with pytest.raises(ValueError, match=f"input_ids: expected ids from 0 to {vocabulary - 1}, got"):
        model.logits([[vocabulary]])
    with pytest.raises(ValueError, match=r"input_ids: expected integers \[rows, length\], got torch.float32"):
        model.logits(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"input_ids: expected integers \[rows, length\]"):
        model.logits([])
    with pytest.raises(ValueError, match=f"input_ids: expected at most {model.spec.max_length} positions"):
        model.logits(torch.zeros(1, model.spec.max_length + 1, dtype=torch.int64))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"dtype": "int8"}, ValueError, "dtype: expected one of float32, bfloat16, float16, got 'int8'"),
        ({"dtype": torch.float64}, ValueError, "dtype: expected one of .*, got torch.float64"),
        (
            {"backend": "best"},
            ValueError,
            "backend: expected None, 'reference', 'triton' or 'cuda', got 'best'",
        ),
        ({"cache_bytes": 0}, ValueError, "cache_bytes: expected a positive number of bytes, got 0"),
    ],
)
def test_bad_load_options(tmp_path, options, error, message):
    write_llada(tmp_path)
    with pytest.raises(error, match=message):
        blockbatch.load_model(tmp_path, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_no_gpu(tmp_path):
    write_llada(tmp_path)
    with pytest.raises(RuntimeError, match="device: expected a usable GPU for 'cuda', got none"):
        blockbatch.load_model(tmp_path, device="cuda")
