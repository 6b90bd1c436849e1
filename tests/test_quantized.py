"""The operators in e4m3 against plain arithmetic, and their compiled versions against them."""

import math

import pytest
import torch

import blockbatch_kernels as bbk
from interpreter import DEVICE, in_interpreter, run_in_the_interpreter

E4M3 = torch.float8_e4m3fn
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Sizes of rows that kernels cut in other ways: odd, within a vector, within a block, beyond one.
DIMS = (1, 7, 64, 136, 1000, 4096, 12288)


def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


def rows(tokens, dim, dtype, device="cpu", seed=0):
    """Rows of magnitudes from 1e-6 to 1e3, each with some outliers."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (torch.rand(tokens, 1, generator=generator) * 9 - 6)
    x = torch.randn(tokens, dim, generator=generator) * size
    x *= torch.where(torch.rand(tokens, dim, generator=generator) < 0.01, 30.0, 1.0)
    return x.clamp(-6e4, 6e4).to(device, dtype)


def quantised(rows, columns, device="cpu", seed=0):
    """Values that use the whole range of e4m3, subnormal numbers too, and their scales."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-12, 4, (rows, columns), generator=generator)
    values = (torch.randn(rows, columns, generator=generator) * 2.0**exponent).clamp(-448, 448).to(E4M3)
    return values.to(device), (torch.rand(rows, generator=generator) + 0.5).to(device)


def back(values, scale):
    return values.double() * scale.double()[:, None]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_no_value_moves_further_than_half_a_step(dim, dtype):
    x = rows(9, dim, dtype)
    values, scale = bbk.quantize_rows(x)
    assert values.dtype == E4M3 and scale.dtype == torch.float32
    exact = x.double()
    amax = exact.abs().amax(-1)
    torch.testing.assert_close(scale.double(), amax / 448, rtol=1e-6, atol=0)
    # Half a step is 2^-4 of a normal number, and 2^-10 of the scale below those.
    bound = torch.maximum(exact.abs() * 2**-4, scale.double()[:, None] * 2**-10) * (1 + 1e-6)
    assert ((back(values, scale) - exact).abs() <= bound).all()
    assert (values.float().abs().amax(-1) == 448).all()


def test_rows_without_a_scale():
    x = torch.zeros(6, 40)
    x[1, 3], x[2, 5], x[3, 7], x[4, 1] = math.nan, math.inf, -math.inf, 1e-38
    values, scale = bbk.quantize_rows(x)
    assert (back(values, scale)[[0, 4, 5]] == 0).all() and (scale[[0, 4, 5]] > 0).all()
    weight, weight_scale = quantised(16, 40)
    product = bbk.linear_fp8(values, scale, weight, weight_scale, out_dtype=torch.float32)
    assert product[1:4].isnan().all() and product[[0, 4, 5]].isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tokens, out, inner", [(1, 8, 16), (5, 24, 100), (33, 130, 257), (7, 4100, 48)])
def test_linear_in_double(tokens, out, inner, dtype):
    x, x_scale = quantised(tokens, inner, seed=1)
    weight, weight_scale = quantised(out, inner, seed=2)
    bias = torch.randn(out, generator=torch.Generator().manual_seed(3)).to(dtype)
    got = bbk.linear_fp8(x, x_scale, weight, weight_scale, bias, out_dtype=dtype)
    exact = back(x, x_scale) @ back(weight, weight_scale).T + bias.double()
    size = back(x, x_scale).abs() @ back(weight, weight_scale).abs().T + bias.double().abs()
    assert got.dtype == dtype
    bound = size * inner * 2**-23 + exact.abs() * torch.finfo(dtype).eps
    assert ((got.double() - exact).abs() <= bound).all()


def test_a_token_does_not_depend_on_its_neighbours():
    """Neither do other rows change what a row is quantised to."""
    x, others = rows(6, 200, torch.float32, seed=4), rows(6, 200, torch.float32, seed=5) * 1e3
    weight, weight_scale = quantised(48, 200, seed=6)
    mixed = others.clone()
    mixed[2] = x[2]
    results = []
    for pack in (x, mixed):
        values, scale = bbk.quantize_rows(pack)
        product = bbk.linear_fp8(values, scale, weight, weight_scale, out_dtype=torch.float32)
        results.append((values.float()[2], scale[2], product[2]))
    assert all(torch.equal(one, other) for one, other in zip(*results))


def test_the_activation_behind_a_product():
    """Gates and ups are rounded first, and silu(gate) * up before it is quantised."""
    x, x_scale = quantised(7, 96, seed=1)
    weight, weight_scale = quantised(2 * 40, 96, seed=2)
    scales = x_scale * 2**-6, weight_scale
    for dtype in FLOATS:
        got = bbk.linear_swiglu_fp8(x, scales[0], weight, scales[1], out_dtype=dtype)
        gate, up = bbk.linear_fp8(x, scales[0], weight, scales[1], out_dtype=dtype).double().chunk(2, -1)
        exact = gate * torch.sigmoid(gate) * up
        # Half a step of e4m3 is 2^-4 of a normal number, and 2^-10 of the scale below those.
        step = torch.maximum(exact.abs() * 2**-4, got[1].double()[:, None] * 2**-10)
        bound = step * (1 + 1e-5) + exact.abs() * torch.finfo(dtype).eps
        assert ((back(*got) - exact).abs() <= bound).all()


@pytest.mark.parametrize("backend", [None, "reference", "triton", "cuda"])
@pytest.mark.parametrize(
    "operator, change, error, message",
    [
        ("quantize_rows", dict(x=torch.ones(2, 0)), ValueError, "x: expected at least one column, got none"),
        ("rms_norm_fp8", dict(x=torch.ones(2, 0), weight=torch.ones(0), eps=0.1), ValueError, "x: expected"),
        ("swiglu_fp8", dict(gate_up=torch.ones(2, 5)), ValueError, "gate_up: expected an even last"),
        ("swiglu_fp8", dict(gate_up=torch.ones(2, 0)), ValueError, "gate_up: expected at least one column"),
    ],
)
def test_bad_rows(operator, change, error, message, backend):
    with pytest.raises(error, match=message):
        getattr(bbk, operator)(**change, backend=backend)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(out_dtype=torch.float64), "out_dtype: expected torch.float32 or .*, got torch.float64"),
        (dict(out_dtype="bfloat16"), "out_dtype: expected a torch dtype, got 'bfloat16'"),
        (dict(bias=torch.ones(8).half()), "bias: expected torch.float32, the dtype of the result, got"),
        (dict(x=torch.ones(3, 16).to(torch.float8_e5m2)), "x: expected torch.float8_e4m3fn, got"),
    ],
)
def test_bad_products(change, message):
    (x, x_scale), (weight, weight_scale) = quantised(3, 16), quantised(8, 16)
    given = dict(x=x, x_scale=x_scale, weight=weight, weight_scale=weight_scale, out_dtype=torch.float32)
    with pytest.raises(TypeError, match=message):
        bbk.linear_fp8(**{**given, **change})
    if "bias" not in change:
        with pytest.raises(TypeError, match=message):
            bbk.linear_swiglu_fp8(**{**given, **change})


def test_a_gate_without_an_up():
    given = (*quantised(3, 16), *quantised(9, 16))
    with pytest.raises(ValueError, match=r"weight: expected"):
        bbk.linear_swiglu_fp8(*given, out_dtype=torch.float32)


# Compiled versions.


def check_rows(backend, device, dtype, tokens, dim, exact):
    """The three quantising operators; `exact`: norm and activation round as the reference's do."""
    x, residual = rows(tokens, dim, dtype, device, 1), rows(tokens, dim, dtype, device, 2)
    weight = rows(1, dim, torch.float32, device, 3)[0].to(dtype)
    gate_up = rows(tokens, 2 * dim, torch.float32, device, 4).clamp(-30, 30).to(dtype)
    got = bbk.quantize_rows(x, backend=backend)
    want = bbk.quantize_rows(x, backend="reference")
    assert torch.equal(got[0].float(), want[0].float()) and torch.equal(got[1], want[1])
    calls = [("swiglu", dict(gate_up=gate_up)), ("rms_norm", dict(x=x, weight=weight, eps=1e-5))]
    calls.append(("rms_norm", dict(x=x, weight=weight, eps=1e-5, residual=residual)))
    for name, arguments in calls:
        summed = dict(residual=residual.clone()) if "residual" in arguments else {}
        plain = getattr(bbk, name)(**{**arguments, **summed}, backend=backend)
        want, kept = bbk.quantize_rows(plain, backend="reference"), summed.get("residual")
        summed = dict(residual=residual.clone()) if summed else {}
        got = getattr(bbk, f"{name}_fp8")(**{**arguments, **summed}, backend=backend)
        assert kept is None or torch.equal(summed["residual"], kept)
        if exact:  # bit for bit what the two operators of this backend give
            assert torch.equal(got[0].float(), want[0].float()) and torch.equal(got[1], want[1]), name
        else:
            torch.testing.assert_close(got[0].float(), want[0].float(), rtol=2**-3, atol=2**-9)
            torch.testing.assert_close(got[1], want[1], rtol=4 * torch.finfo(dtype).eps, atol=0)


def check_product(backend, device, dtype, tokens, out, inner, with_bias):
    x, x_scale = quantised(tokens, inner, device, 5)
    weight, weight_scale = quantised(out, inner, device, 6)
    bias = rows(1, out, dtype, device, 7)[0] if with_bias else None
    given = (x, x_scale, weight, weight_scale, bias)
    got = bbk.linear_fp8(*given, out_dtype=dtype, backend=backend)
    exact = back(x, x_scale) @ back(weight, weight_scale).T
    size = back(x, x_scale).abs() @ back(weight, weight_scale).abs().T
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    # Tensor cores keep 13 bits behind the point of the largest product of a step, or more, for 256 columns at
    # a time.
    bound = size * 2**-11 + exact.abs() * torch.finfo(dtype).eps
    assert ((got.double() - exact).abs() <= bound).all()


@in_interpreter
@pytest.mark.parametrize("dim", [1, 7, 136, 1000])
def test_rows_by_triton(dim, poisoned):
    check_rows("triton", "cpu", torch.float32, 5, dim, exact=False)


def check_activated(backend, device, dtype, tokens, intermediate, inner):
    """Up to a step of e4m3 what the reference's activation of the backend's own product gives."""
    x, x_scale = quantised(tokens, inner, device, 5)
    weight, weight_scale = quantised(2 * intermediate, inner, device, 6)
    given = (x, x_scale * 2**-9, weight, weight_scale)
    got = bbk.linear_swiglu_fp8(*given, out_dtype=dtype, backend=backend)
    product = bbk.linear_fp8(*given, out_dtype=dtype, backend=backend)
    want = bbk.swiglu_fp8(product, backend="reference")
    assert got[0].shape == (tokens, intermediate) and got[1].shape == (tokens,)
    # Another cut of the sums moves a gate or an up by a rounding, and the largest of a row with it.
    largest = want[1].double()[:, None] * 448
    bound = back(*want).abs() * 2**-3 + largest * (2**-17 + 4 * torch.finfo(dtype).eps)
    assert ((back(*got) - back(*want)).abs() <= bound).all()


@in_interpreter
@pytest.mark.parametrize("tokens, intermediate, inner", [(1, 8, 16), (5, 104, 100), (33, 40, 256)])
def test_activated_products_by_triton(tokens, intermediate, inner, poisoned):
    check_activated("triton", "cpu", torch.float32, tokens, intermediate, inner)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_activated_products_on_a_gpu(dtype, backend, poisoned):
    for tokens, inner in ((1, 2048), (100, 2048), (252, 2048), (300, 2048), (9, 1040), (0, 64)):
        check_activated(backend, DEVICE, dtype, tokens, 1032, inner)


@in_interpreter
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tokens, out, inner", [(1, 8, 16), (5, 200, 100), (33, 72, 256), (130, 80, 128)])
def test_products_by_triton(tokens, out, inner, with_bias, poisoned):
    check_product("triton", "cpu", torch.float32, tokens, out, inner, with_bias)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_rows_on_a_gpu(backend, dim, dtype, poisoned):
    check_rows(backend, DEVICE, dtype, 37, dim, exact=backend == "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products_on_a_gpu(dtype, with_bias, backend, poisoned):
    sizes = [(1, 8, 16), (5, 200, 100), (33, 72, 256), (130, 2048, 4096), (16, 4096, 2048), (64, 4104, 4112)]
    sizes += [(128, 12288, 4096), (252, 4096, 12288), (300, 4096, 4096), (77, 1536, 8960), (0, 64, 64)]
    for tokens, out, inner in sizes:
        check_product(backend, DEVICE, dtype, tokens, out, inner, with_bias)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_neighbours_on_a_gpu(backend, poisoned):
    """The bits of a token are the same whatever stands beside it in a pack of the same size."""
    weight, weight_scale = quantised(4096, 4096, DEVICE, 8)
    for tokens in (8, 100, 200, 300):
        x = rows(tokens, 4096, torch.bfloat16, DEVICE, 9)
        mixed = rows(tokens, 4096, torch.bfloat16, DEVICE, 10)
        mixed[tokens // 2] = x[tokens // 2]
        results = []
        for pack in (x, mixed):
            values, scale = bbk.quantize_rows(pack, backend=backend)
            given = (values, scale, weight, weight_scale)
            results.append(bbk.linear_fp8(*given, out_dtype=torch.bfloat16, backend=backend)[tokens // 2])
        assert torch.equal(*results)
        assert torch.equal(results[0], results[1]) and results[0].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_rows_without_a_scale_on_a_gpu(backend):
    x = torch.zeros(6, 4096, device=DEVICE, dtype=torch.bfloat16)
    x[1, 3], x[2, 5], x[3, 7] = math.nan, math.inf, -math.inf
    values, scale = bbk.quantize_rows(x, backend=backend)
    weight, weight_scale = quantised(2048, 4096, DEVICE)
    product = bbk.linear_fp8(values, scale, weight, weight_scale, out_dtype=torch.bfloat16, backend=backend)
    assert product[1:4].isnan().all() and (product[[0, 4, 5]] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_graph_replays(backend):
    """A captured chain of norm, product, activation and product gives what plain calls give."""
    x, weight = rows(40, 2048, torch.bfloat16, DEVICE), torch.ones(2048, dtype=torch.bfloat16, device=DEVICE)
    up, down = quantised(2 * 3072, 2048, DEVICE, 1), quantised(2048, 3072, DEVICE, 2)

    def chain():
        normed = bbk.rms_norm_fp8(x, weight, eps=1e-5, backend=backend)
        options = dict(out_dtype=torch.bfloat16, static_weight=True, backend=backend)
        gate_up = bbk.linear_fp8(*normed, *up, **options) * 1e-4
        return bbk.linear_fp8(*bbk.swiglu_fp8(gate_up, backend=backend), *down, **options)

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain()
    for seed in (3, 4):
        x.copy_(rows(40, 2048, torch.bfloat16, DEVICE, seed))
        graph.replay()
        assert torch.equal(captured, chain())
