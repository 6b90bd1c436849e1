"""The reference operators against plain formulas in fp64 or naive loops, and the checks at the front door."""

import math

import pytest
import torch
import torch.nn.functional as F

import blockbatch_kernels as bbk
from float_errors import DTYPES, assert_no_worse_than_torch


def rand(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, dim", [(1, 64), (7, 96), (33, 129)])
def test_rms_norm(dtype, tokens, dim):
    x, weight, residual = (
        rand(tokens, dim, dtype=dtype),
        rand(dim, dtype=dtype),
        rand(tokens, dim, dtype=dtype),
    )

    def formula(x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    got = bbk.rms_norm(x, weight, eps=1e-5)
    assert_no_worse_than_torch(got, formula(x) * weight, formula(x.double()) * weight.double())

    summed = residual + x
    kept = residual.clone()
    fused = bbk.rms_norm(x, weight, eps=1e-5, residual=kept)
    assert torch.equal(kept, summed)
    assert torch.equal(fused, bbk.rms_norm(summed, weight, eps=1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype):
    gate_up = rand(9, 2 * 37, dtype=dtype, scale=3.0)
    gate, up = gate_up.chunk(2, dim=-1)
    assert_no_worse_than_torch(bbk.swiglu(gate_up), F.silu(gate) * up, F.silu(gate.double()) * up.double())


def rope_inputs(dtype, tokens=11, heads=4, kv_heads=2, head_dim=16, pages=5, page_size=4):
    angle = torch.outer(torch.arange(64.0), 100.0 ** (-torch.arange(0, head_dim, 2) / head_dim))
    return dict(
        q=rand(tokens, heads, head_dim, dtype=dtype),
        k=rand(tokens, kv_heads, head_dim, dtype=dtype),
        v=rand(tokens, kv_heads, head_dim, dtype=dtype),
        positions=torch.randint(0, 64, (tokens,), dtype=torch.int32),
        slot_mapping=torch.randperm(pages * page_size)[:tokens],
        cos=angle.cos(),
        sin=angle.sin(),
        k_cache=torch.full((pages, page_size, kv_heads, head_dim), float("nan"), dtype=dtype),
        v_cache=torch.full((pages, page_size, kv_heads, head_dim), float("nan"), dtype=dtype),
    )


def rotated(x, positions):
    """The rotation as a complex product, one token at a time, in fp64."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x, dtype=torch.float64)
    for token, position in enumerate(positions.tolist()):
        pairs = torch.complex(x[token, :, :half].double(), x[token, :, half:].double())
        angle = position * 100.0 ** (-torch.arange(0, 2 * half, 2, dtype=torch.float64) / (2 * half))
        turned = pairs * torch.polar(torch.ones_like(angle), angle)
        out[token] = torch.cat((turned.real, turned.imag), -1)
    return out


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
def test_rope_kv_write(dtype, tolerance):
    inputs = rope_inputs(dtype)
    inputs["slot_mapping"][3] = -1
    q, k, v, positions, slots = (inputs[n].clone() for n in ("q", "k", "v", "positions", "slot_mapping"))
    bbk.rope_kv_write(**inputs)
    # One rounding of values whose size is at most |x| * sqrt(2).
    bound = tolerance * 1.5 * max(q.abs().max().item(), k.abs().max().item())
    assert (inputs["q"].double() - rotated(q, positions)).abs().max() <= bound
    stored_k, stored_v = inputs["k_cache"].flatten(0, 1), inputs["v_cache"].flatten(0, 1)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected = rotated(k[token : token + 1], positions[token : token + 1])[0]
            assert (stored_k[slot].double() - expected).abs().max() <= bound
            assert torch.equal(stored_v[slot], v[token])
    untouched = [slot for slot in range(stored_k.shape[0]) if slot not in slots.tolist()]
    assert stored_k[untouched].isnan().all() and stored_v[untouched].isnan().all()


def linear_rope_inputs(dtype, bias, tokens=11, heads=4, kv_heads=2, head_dim=16, numbers=rand):
    """The arguments of a pack whose last two tokens are padding; weights and activations by `numbers`."""
    cache = rope_inputs(dtype, tokens, heads, kv_heads, head_dim)
    for name in "qkv":
        del cache[name]
    cache["slot_mapping"][3:4] = -1
    cache["slot_mapping"][-2:], cache["positions"][-2:] = -1, 0
    rows = (heads + 2 * kv_heads) * head_dim
    return dict(
        x=numbers(tokens, 24, dtype=dtype),
        weight=numbers(rows, 24, dtype=dtype),
        bias=numbers(rows, dtype=dtype) if bias else None,
        **cache,
    )


def whole_numbers(*shape, dtype):
    """So small that products of them are exact in every dtype."""
    return torch.randint(-2, 3, shape).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
def test_linear_rope_kv_write(dtype, tolerance, heads, kv_heads, bias):
    inputs = linear_rope_inputs(dtype, bias, heads=heads, kv_heads=kv_heads, numbers=whole_numbers)
    x, weight, slots = inputs["x"].double(), inputs["weight"].double(), inputs["slot_mapping"].tolist()
    q = bbk.linear_rope_kv_write(**inputs, num_heads=heads)

    def product(head):
        """[tokens, 1, head_dim]"""
        rows = slice(head * 16, (head + 1) * 16)
        added = inputs["bias"][rows].double() if bias else 0.0
        return (x @ weight[rows].T + added).unsqueeze(1)

    # One rounding of values whose size is at most |x| * sqrt(2).
    bound = tolerance * 1.5 * max(product(head).abs().max().item() for head in range(heads + kv_heads))
    assert q.shape == (11, heads, 16) and q.dtype == dtype
    for head in range(heads):
        expected = rotated(product(head), inputs["positions"])[:, 0]
        assert (q[:, head].double() - expected).abs().max() <= bound
    stored_k, stored_v = inputs["k_cache"].flatten(0, 1), inputs["v_cache"].flatten(0, 1)
    for head in range(kv_heads):
        k = rotated(product(heads + head), inputs["positions"])[:, 0]
        v = product(heads + kv_heads + head)[:, 0]
        for token, slot in enumerate(slots):
            if slot >= 0:
                assert (stored_k[slot, head].double() - k[token]).abs().max() <= bound
                assert torch.equal(stored_v[slot, head].double(), v[token])
    untouched = [slot for slot in range(stored_k.shape[0]) if slot not in slots]
    assert stored_k[untouched].isnan().all() and stored_v[untouched].isnan().all()


@pytest.mark.parametrize("tokens", [0, 2, 11])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_rope_kv_write_is_linear_then_rope_kv_write(dtype, bias, tokens):
    inputs = linear_rope_inputs(dtype, bias, tokens)
    x, weight, bias, *where, k_cache, v_cache = inputs.values()
    caches = k_cache.clone(), v_cache.clone()
    q, k, v = bbk.linear(x, weight, bias).unflatten(1, (8, 16)).split((4, 2, 2), dim=1)
    bbk.rope_kv_write(q, k, v, *where, *caches)
    assert torch.equal(bbk.linear_rope_kv_write(**inputs, num_heads=4), q)
    for cache, expected in zip((k_cache, v_cache), caches):
        torch.testing.assert_close(cache, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (4, 1)])
def test_varlen_attention(dtype, heads, kv_heads):
    head_dim, page_size, lengths = 32, 8, [5, 0, 1, 19]
    seqlens_k = torch.tensor([40, 17, 8, 33], dtype=torch.int32)
    columns = 5
    k_cache, v_cache = (rand(30, page_size, kv_heads, head_dim, dtype=dtype) for _ in range(2))
    page_table = torch.randperm(30)[: 4 * columns].view(4, columns).int()
    page_table[2] = page_table[0]  # rows may share pages
    page_table[1] = -1  # a row without queries may have none
    cu_seqlens_q = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    padding = 3
    q = rand(sum(lengths) + padding, heads, head_dim, dtype=dtype)
    got = bbk.varlen_attention(q, k_cache, v_cache, page_table, cu_seqlens_q, seqlens_k)

    def formula(kind):
        out = torch.zeros(q.shape, dtype=kind)
        for row, length in enumerate(lengths):
            for token in range(int(cu_seqlens_q[row]), int(cu_seqlens_q[row]) + length):
                for head in range(heads):
                    slots = [
                        (int(page_table[row, p // page_size]), p % page_size)
                        for p in range(int(seqlens_k[row]))
                    ]
                    group = head // (heads // kv_heads)
                    keys = torch.stack([k_cache[page, offset, group] for page, offset in slots]).to(kind)
                    values = torch.stack([v_cache[page, offset, group] for page, offset in slots]).to(kind)
                    weights = (keys @ q[token, head].to(kind) / math.sqrt(head_dim)).softmax(0)
                    out[token, head] = weights @ values
        return out

    assert_no_worse_than_torch(got, formula(dtype), formula(torch.float64))
    assert (got[sum(lengths) :] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 300])
def test_lm_head_confidence(dtype, rows):
    hidden, weight = rand(rows, 24, dtype=dtype), rand(50, 24, dtype=dtype)
    probes = torch.randint(0, 50, (rows,), dtype=torch.int32)
    top, confidence, probe = bbk.lm_head_confidence(hidden, weight, probe_tokens=probes, suppress_token=7)
    logits = F.linear(hidden, weight).double()  # the product itself is torch's, in that dtype
    logits[:, 7] = -math.inf
    probabilities = logits.softmax(-1)
    assert torch.equal(top.long(), probabilities.argmax(-1))
    assert torch.allclose(confidence.double(), probabilities.amax(-1), rtol=1e-5, atol=0)
    expected = probabilities.gather(1, probes.long().unsqueeze(1)).squeeze(1)
    assert torch.allclose(probe.double(), expected, rtol=1e-5, atol=1e-30)
    assert (probe[probes == 7] == 0).all()
    assert bbk.lm_head_confidence(hidden, weight)[2] is None


def test_lm_head_takes_the_lowest_id_on_a_tie():
    weight = torch.zeros(9, 4)
    weight[[3, 6, 8], 0] = 1.0
    hidden = torch.tensor([[2.0, 0, 0, 0], [0.0, 0, 0, 0], [-1.0, 0, 0, 0]])
    top, confidence, _ = bbk.lm_head_confidence(hidden, weight)
    assert top.tolist() == [3, 0, 0]
    assert confidence[1].item() == pytest.approx(1 / 9)


def test_lm_head_of_nothing():
    top, confidence, _ = bbk.lm_head_confidence(torch.zeros(0, 4), torch.zeros(9, 4))
    assert top.shape == confidence.shape == (0,)


GOOD_ATTENTION = dict(
    q=torch.zeros(3, 4, 8),
    k_cache=torch.zeros(2, 4, 2, 8),
    v_cache=torch.zeros(2, 4, 2, 8),
    page_table=torch.zeros(1, 2, dtype=torch.int32),
    cu_seqlens_q=torch.tensor([0, 3], dtype=torch.int32),
    seqlens_k=torch.tensor([8], dtype=torch.int32),
)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": torch.zeros(3, 32)}, ValueError, r"q: expected shape \[\*, \*, \*\], got \[3, 32\]"),
        ({"q": torch.zeros(3, 4, 8, dtype=torch.int32)}, TypeError, "q: expected torch.float32 or"),
        (
            {"q": torch.zeros(3, 3, 8)},
            ValueError,
            "k_cache: expected a number of kv heads that divides 3, got 2",
        ),
        (
            {"q": torch.zeros(3, 4, 16)},
            ValueError,
            r"k_cache: expected shape \[\*, \*, \*, 16\], got \[2, 4, 2, 8\]",
        ),
        (
            {"k_cache": torch.zeros(2, 4, 2, 8).half()},
            TypeError,
            "k_cache: expected torch.float32, got torch.float16",
        ),
        (
            {"backend": "fastest"},
            ValueError,
            "backend: expected None or one of reference, triton, cuda, got 'fastest'",
        ),
        ({"backend": "triton"}, RuntimeError, "backend: triton cannot run varlen_attention: "),
        (
            {"backend": "cuda"},
            RuntimeError,
            "backend: cuda cannot run varlen_attention: the tensors are not on a GPU",
        ),
    ],
)
def test_bad_arguments(change, error, message):
    assert bbk.varlen_attention(**GOOD_ATTENTION).shape == (3, 4, 8)
    with pytest.raises(error, match=message):
        bbk.varlen_attention(**{**GOOD_ATTENTION, **change})


def test_cuda_backend_refuses_cpu_tensors():
    with pytest.raises(RuntimeError, match="backend: cuda cannot run swiglu: the tensors are not on a GPU"):
        bbk.swiglu(torch.zeros(2, 4), backend="cuda")


def test_rope_kv_write_into_a_cache_that_is_a_view():
    """Heads may lie before positions in memory: the writes must reach the storage, not a copy of it."""
    memory = torch.full((3, 2, 4, 8), float("nan"))  # [pages, kv_heads, page_size, head_dim]
    cache = memory.transpose(1, 2)
    values = torch.randn(2, 2, 8)
    bbk.rope_kv_write(
        torch.zeros(2, 2, 8),
        values.clone(),
        values,
        torch.zeros(2, dtype=torch.int32),
        torch.tensor([5, 10]),
        torch.ones(1, 4),
        torch.zeros(1, 4),
        cache,
        other := torch.full((3, 2, 4, 8), float("nan")).transpose(1, 2),
    )
    for view in (cache, other):
        assert view[1, 1].equal(values[0]) and view[2, 2].equal(values[1])
        assert int(view.isnan().sum()) == view.numel() - values.numel()
