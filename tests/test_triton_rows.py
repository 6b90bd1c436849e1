"""Triton's rms_norm, swiglu, rope_kv_write and linear_rope_kv_write against the reference.

In the interpreter on the CPU, and on a GPU.
"""

import pytest
import torch
import torch.nn.functional as F

from blockbatch_kernels import reference, triton
from float_errors import DTYPES, assert_no_worse_than_torch
from interpreter import DEVICE, in_interpreter, run_in_the_interpreter
from triton_floats import nan, poisoned, rand

pytest.importorskip("triton", reason="the package triton is not installed")


def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


def compare_rms_norm(tokens, dim, dtype, strided):
    x, residual = rand(tokens, 2 * dim, dtype=dtype), rand(tokens, dim, dtype=dtype)
    weight = rand(dim, dtype=dtype)
    x = x[:, dim:] if strided else x[:, :dim].contiguous()
    expected_residual = residual.clone()
    expected = reference.rms_norm(x, weight, eps=1e-5, residual=expected_residual)
    with poisoned():
        got = triton.rms_norm(x, weight, eps=1e-5, residual=residual)
        alone = triton.rms_norm(residual, weight, eps=1e-5)
    assert torch.equal(residual, expected_residual)
    exact = residual.double()
    truth = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert_no_worse_than_torch(got, expected, truth)
    assert torch.equal(alone, got)


def compare_swiglu(tokens, intermediate, dtype, strided):
    gate_up = rand(tokens, 2 * intermediate + 3, dtype=dtype, scale=4.0)
    gate_up = gate_up[:, 3:] if strided else gate_up[:, 3:].contiguous()
    with poisoned():
        got = triton.swiglu(gate_up)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_no_worse_than_torch(got, reference.swiglu(gate_up), F.silu(gate) * up)


def compare_rope(tokens, heads, kv_heads, head_dim, dtype):
    pages, page_size, half = 7 + tokens // 2, 4, head_dim // 2
    angle = torch.outer(torch.arange(64.0), 100.0 ** (-torch.arange(half) / half)).to(DEVICE)
    qkv = rand(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    parts = qkv.split((heads * head_dim, kv_heads * head_dim, kv_heads * head_dim), dim=1)
    q, k, v = (part.unflatten(1, (-1, head_dim)) for part in parts)
    positions = torch.randint(0, 64, (tokens,), dtype=torch.int32, device=DEVICE)
    slots = torch.randperm(pages * page_size, device=DEVICE)[:tokens]
    slots[tokens // 2] = -1
    caches = nan(2, 2, pages, page_size, kv_heads, head_dim, dtype=dtype)
    inputs = (positions, slots, angle.cos(), angle.sin())
    expected = q.clone()
    reference.rope_kv_write(expected, k, v, *inputs, *caches[1])
    kept = k.clone(), v.clone()

    def turned(x):
        first, second = x.double().chunk(2, dim=-1)
        cos, sin = (table[positions.long()].double().unsqueeze(1) for table in (angle.cos(), angle.sin()))
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    truth, k_truth = turned(q), turned(k)
    triton.rope_kv_write(q, k, v, *inputs, *caches[0])
    assert_no_worse_than_torch(q, expected, truth)
    assert torch.equal(k, kept[0]) and torch.equal(v, kept[1])
    stored = slots >= 0
    (k_cache, v_cache), (k_expected, v_expected) = (cache.flatten(1, 2) for cache in caches)
    assert_no_worse_than_torch(k_cache[slots[stored]], k_expected[slots[stored]], k_truth[stored])
    assert torch.equal(v_cache[slots[stored]], v[stored])
    for cache, other in ((k_cache, k_expected), (v_cache, v_expected)):
        assert torch.equal(cache.isnan(), other.isnan())  # nothing is written anywhere else


def compare_linear_rope(tokens, heads, kv_heads, head_dim, dtype, bias):
    """Against the two operators, whose own tests say what they compute."""
    rows, in_features, pages, page_size = (heads + 2 * kv_heads) * head_dim, 24, 3 + tokens // 2, 4
    angle = torch.rand(64, head_dim // 2, device=DEVICE)
    x, weight = rand(tokens, in_features, dtype=dtype), rand(rows, in_features, dtype=dtype)
    bias = rand(rows, dtype=dtype) if bias else None
    positions = torch.randint(0, 64, (tokens,), dtype=torch.int32, device=DEVICE)
    slots = torch.randperm(pages * page_size, device=DEVICE)[:tokens]
    slots[tokens // 2 :] = -1
    inputs = (positions, slots, angle.cos(), angle.sin())
    caches = nan(2, 2, pages, page_size, kv_heads, head_dim, dtype=dtype)
    product = triton.linear(x, weight, bias).unflatten(1, (-1, head_dim))
    expected, k, v = product.split((heads, kv_heads, kv_heads), dim=1)
    triton.rope_kv_write(expected, k, v, *inputs, *caches[1])
    with poisoned():
        got = triton.linear_rope_kv_write(x, weight, bias, *inputs, *caches[0], num_heads=heads)
    assert got.shape == (tokens, heads, head_dim) and torch.equal(got, expected)
    torch.testing.assert_close(caches[0], caches[1], rtol=0, atol=0, equal_nan=True)


@in_interpreter
@pytest.mark.parametrize("tokens, dim", [(1, 1), (3, 96), (2, 129)])
def test_row_operators(tokens, dim):
    for strided in (False, True):
        compare_rms_norm(tokens, dim, torch.float32, strided)
        compare_swiglu(tokens, dim, torch.float32, strided)
    assert triton.rms_norm(torch.zeros(0, 4), torch.zeros(4), eps=1e-5).shape == (0, 4)
    assert triton.swiglu(torch.zeros(0, 4)).shape == (0, 2)


@in_interpreter
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 16), (3, 3, 6), (1, 1, 128)])
def test_rope(heads, kv_heads, head_dim):
    compare_rope(5, heads, kv_heads, head_dim, torch.float32)
    for bias in (False, True):
        compare_linear_rope(5, heads, kv_heads, head_dim, torch.float32, bias)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_operators_on_a_gpu(dtype):
    for tokens, dim in ((1, 8), (3, 129), (257, 4096), (5, 12288)):
        for strided in (False, True):
            compare_rms_norm(tokens, dim, dtype, strided)
            compare_swiglu(tokens, dim, dtype, strided)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_on_a_gpu(dtype):
    for tokens, heads, kv_heads, head_dim in (
        (2, 4, 2, 16),
        (33, 32, 32, 128),
        (252, 28, 4, 128),
        (9, 3, 1, 6),
    ):
        compare_rope(tokens, heads, kv_heads, head_dim, dtype)
        compare_linear_rope(tokens, heads, kv_heads, head_dim, dtype, bias=True)
