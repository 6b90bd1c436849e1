"""rms_norm and rope_kv_write of the compiled backend, on inputs of any layout; a chain of float operators.

Their errors against an fp64 truth are compared with torch's own in the same dtype. swiglu: test_extension.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import blockbatch_kernels as bbk
from blockbatch_kernels import cuda
from cuda_float_checks import draw, strided
from described_tensors import Described, change
from float_errors import DTYPES, assert_no_worse_than_torch

# Added to a row's length, and elements before the first row: aligned vectors, and three ways to have none.
LAYOUTS = [(0, 0), (64, 0), (3, 0), (0, 1), (5, 3)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 8, 96, 129, 1000, 3584, 4096, 4099, 8192, 16384, 33000])
def test_rms_norm(poisoned, dtype, dim):
    for tokens, (padding, offset) in [(t, layout) for t in (1, 3, 252) for layout in LAYOUTS]:
        x, x_storage, x_beside = strided(draw(tokens, dim, dtype=dtype, seed=dim), padding, offset)
        weight = draw(dim, dtype=dtype, seed=dim + 1)
        before = draw(tokens, dim, dtype=dtype, scale=3.0, seed=dim + 2)
        residual, storage, beside = strided(before, padding, offset)
        for given in (None, residual):
            got = bbk.rms_norm(x, weight, eps=1e-5, residual=given, backend="cuda")
            summed = x if given is None else before + x
            wide = summed.double()
            truth = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
            torchs = bbk.rms_norm(summed, weight, eps=1e-5, backend="reference")
            assert_no_worse_than_torch(got, torchs, truth)
        assert torch.equal(residual, before + x)
        assert storage[beside].isnan().all() and x_storage[x_beside].isnan().all()


@pytest.mark.gpu
def test_rms_norm_of_extremes_and_of_nothing():
    weight = draw(4096)
    rows = torch.stack([torch.zeros(4096), torch.full((4096,), 1e25), torch.full((4096,), 1e-30)]).cuda()
    got = bbk.rms_norm(rows, weight, eps=1e-6, backend="cuda")
    torch.testing.assert_close(got, bbk.rms_norm(rows, weight, eps=1e-6, backend="reference"))
    assert bbk.rms_norm(rows[:0], weight, eps=1e-6, backend="cuda").shape == (0, 4096)
    assert bbk.rms_norm(rows[:, :0], weight[:0], eps=1e-6, backend="cuda").shape == (
        3,
        0,
    )
    columns = draw(4096, 5).t()  # elements of a row are not neighbours
    torch.testing.assert_close(
        bbk.rms_norm(columns, weight, eps=1e-6, backend="cuda"),
        bbk.rms_norm(columns.contiguous(), weight, eps=1e-6, backend="cuda"),
        rtol=0,
        atol=0,
    )
    residual = draw(5, 4096, seed=1)
    strided_weight = torch.stack((weight, weight), 1)[:, 0]
    got = bbk.rms_norm(columns, strided_weight, eps=1e-6, residual=residual, backend="cuda")
    torch.testing.assert_close(got, bbk.rms_norm(residual, weight, eps=1e-6, backend="reference"))


def rope_inputs(
    dtype,
    heads,
    kv_heads,
    head_dim,
    *,
    tokens=37,
    padding=0,
    offset=0,
    pages=9,
    page_size=7,
):
    """Parts of one QKV product, and caches that are views of one tensor for all layers."""
    angle = torch.outer(torch.arange(64.0), 100.0 ** (-torch.arange(0, head_dim, 2) / head_dim)).cuda()
    sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    qkv, _, _ = strided(draw(tokens, sum(sizes), dtype=dtype, scale=2.0), padding, offset)
    q, k, v = (part.unflatten(1, (-1, head_dim)) for part in qkv.split(sizes, dim=1))
    kv = torch.full(
        (3, 2, pages, page_size, kv_heads, head_dim),
        math.nan,
        dtype=dtype,
        device="cuda",
    )
    generator = torch.Generator().manual_seed(tokens)
    slots = torch.randperm(pages * page_size, generator=generator)[:tokens]
    slots[::5] = -1
    return dict(
        q=q,
        k=k,
        v=v,
        positions=torch.randint(0, 64, (tokens,), dtype=torch.int32, generator=generator).cuda(),
        slot_mapping=slots.cuda(),
        cos=angle.cos(),
        sin=angle.sin(),
        k_cache=kv[1, 0],
        v_cache=kv[1, 1],
    ), kv


def rotated(x, inputs):
    """In fp64, as a product of complex numbers."""
    index = inputs["positions"].long()
    turn = torch.complex(inputs["cos"][index].double(), inputs["sin"][index].double()).unsqueeze(1)
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * turn
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads, kv_heads", [(32, 32), (28, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("head_dim", [2, 10, 64, 96, 128, 256])
def test_rope_kv_write(dtype, heads, kv_heads, head_dim):
    for padding, offset in LAYOUTS:
        compare_rope_kv_write(dtype, heads, kv_heads, head_dim, padding, offset)


def compare_rope_kv_write(dtype, heads, kv_heads, head_dim, padding, offset):
    inputs, kv = rope_inputs(dtype, heads, kv_heads, head_dim, padding=padding, offset=offset)
    before = {name: inputs[name].clone() for name in ("q", "k", "v")}
    torchs = {name: value.clone() for name, value in inputs.items()}
    bbk.rope_kv_write(**torchs, backend="reference")
    bbk.rope_kv_write(**inputs, backend="cuda")

    assert_no_worse_than_torch(inputs["q"], torchs["q"], rotated(before["q"], inputs))
    assert torch.equal(inputs["k"], before["k"]) and torch.equal(inputs["v"], before["v"])
    stored = inputs["slot_mapping"] >= 0
    slots = inputs["slot_mapping"][stored]
    k_truth = rotated(before["k"], inputs)[stored]
    k_stored, torchs_k = (t["k_cache"].flatten(0, 1)[slots] for t in (inputs, torchs))
    assert_no_worse_than_torch(k_stored, torchs_k, k_truth)
    # All layouts, and the product that rotates, round alike.
    assert torch.equal(inputs["q"], torchs["q"]) and torch.equal(k_stored, torchs_k)
    assert torch.equal(inputs["v_cache"].flatten(0, 1)[slots], before["v"][stored])
    kv[1].flatten(1, 2)[:, slots] = math.nan
    assert kv.isnan().all()  # nothing is written beside the slots


@pytest.mark.gpu
def test_rope_kv_write_with_a_permuted_cache_and_what_lies_outside(unchecked):
    inputs, _ = rope_inputs(torch.bfloat16, 8, 8, 128)
    kv = torch.full((9, 8, 7, 128), math.nan, dtype=torch.bfloat16, device="cuda")
    # Pages hold one head after the other; cosines and sines lie side by side.
    inputs |= dict(
        k_cache=kv.transpose(1, 2),
        v_cache=torch.full_like(kv, math.nan).transpose(1, 2),
    )
    inputs["cos"], inputs["sin"] = torch.stack((inputs["cos"], inputs["sin"]), -1).unbind(-1)
    # torch indexes a flat view, which a permuted cache has not.
    torchs = {name: value.contiguous().clone() for name, value in inputs.items()}
    bbk.rope_kv_write(**torchs, backend="reference")
    outside = {name: value.clone() for name, value in inputs.items()}
    bbk.rope_kv_write(**inputs, backend="cuda")
    for name in ("q", "k_cache", "v_cache"):
        torch.testing.assert_close(inputs[name], torchs[name], equal_nan=True)

    outside["positions"][:2] = torch.tensor([-1, 64])
    outside["slot_mapping"][:3] = torch.tensor([63, 1 << 40, -7])
    q = outside["q"].clone()
    bbk.rope_kv_write(**outside, backend="cuda")
    assert outside["q"][:2].isnan().all()
    torch.testing.assert_close(outside["q"][2:], torchs["q"][2:])
    assert not torch.equal(outside["q"], q)
    stored = outside["slot_mapping"][3:][outside["slot_mapping"][3:] >= 0]
    held = {(int(slot) // 7, int(slot) % 7) for slot in stored}
    written = (~outside["v_cache"].isnan()).all(-1).all(-1).nonzero().tolist()
    assert {tuple(place) for place in written} == held

    nothing = {name: value[:0] if name not in ("cos", "sin") else value for name, value in outside.items()}
    bbk.rope_kv_write(**nothing, backend="cuda")


@pytest.mark.gpu
def test_chain_in_a_graph_equals_the_same_with_waits():
    """Every kernel is captured on the current stream and reads what the one before it wrote."""
    dim, heads, tokens, layers = 1024, 8, 96, 12
    shapes = dict(qkv=(3 * dim, dim), out=(dim, dim), gate_up=(4 * dim, dim), down=(dim, 2 * dim))
    weights = {
        name: draw(layers, *shape, dtype=torch.bfloat16, scale=shape[1] ** -0.5, seed=index)
        for index, (name, shape) in enumerate(shapes.items())
    }
    norm = torch.ones(dim, dtype=torch.bfloat16, device="cuda")
    rope, _ = rope_inputs(torch.bfloat16, heads, heads, dim // heads, tokens=tokens, pages=8, page_size=16)
    tables = {name: rope[name] for name in ("positions", "slot_mapping", "cos", "sin", "k_cache", "v_cache")}
    x, vocabulary = (
        draw(tokens, dim, dtype=torch.bfloat16),
        draw(9000, dim, dtype=torch.bfloat16, seed=9),
    )

    def forward(wait=lambda: None):
        residual, results = x.clone(), []
        normed = bbk.rms_norm(residual, norm, eps=1e-5, backend="cuda")
        for layer in range(layers):
            wait()
            qkv = F.linear(normed, weights["qkv"][layer])
            q, k, v = (part.unflatten(1, (heads, -1)) for part in qkv.split(dim, dim=1))
            wait()
            bbk.rope_kv_write(q, k, v, **tables, backend="cuda")
            wait()
            # No product between the kernels here: k as stored joins q at once.
            mixed = bbk.rms_norm(
                q.flatten(1) + tables["k_cache"].flatten()[0].nan_to_num(),
                norm,
                eps=1e-5,
            )
            wait()
            out = F.linear(mixed, weights["out"][layer])
            normed = bbk.rms_norm(out, norm, eps=1e-5, residual=residual, backend="cuda")
            wait()
            activated = bbk.swiglu(F.linear(normed, weights["gate_up"][layer]), backend="cuda")
            wait()
            down = F.linear(activated, weights["down"][layer])
            normed = bbk.rms_norm(down, norm, eps=1e-5, residual=residual, backend="cuda")
            normed = bbk.rms_norm(normed, norm, eps=1e-5, backend="cuda")  # two in a row
        wait()
        results += bbk.lm_head_confidence(normed, vocabulary, backend="cuda")[:2]
        return [residual, normed, *results]

    expected = [result.clone() for result in forward(torch.cuda.synchronize)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = forward()
    for _ in range(30):
        graph.replay()
    for got, wanted in zip(results, expected, strict=True):
        assert torch.equal(got, wanted)
        assert not got.isnan().any()


@pytest.fixture
def rope_arguments():
    # Never launched: each test makes one of them wrong.
    heads, cache, angles = Described((3, 8, 8)), Described((2, 8, 8, 8)), Described((9, 4))
    return dict(
        q=heads,
        k=heads,
        v=heads,
        k_cache=cache,
        v_cache=cache,
        k_scale=None,
        v_scale=None,
        positions=Described((3,), torch.int32),
        slot_mapping=Described((3,), torch.int64),
        cos=angles,
        sin=angles,
        q_norm=None,
        k_norm=None,
        norm_eps=1e-6,
        programmatic=False,
        stream=0,
    )


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("q", dict(shape=(-1, 8, 8)), "num_tokens: expected at least 0, got -1"),
        ("k_cache", dict(shape=(2, 0, 8, 8)), "page_size: expected at least 1, got 0"),
        ("q", dict(shape=(3, 8, 7)), "head_dim: expected an even size, got 7"),
        (
            "k_cache",
            dict(shape=(2**29, 8, 8, 8)),
            "k_cache: expected fewer than 2\\^31 slots, got 536870912 pages of 8",
        ),
        ("q", dict(dtype=torch.int32), "q: expected float32, float16 or bfloat16, got int32"),
        ("v_cache", dict(dtype=torch.float16), "v_cache: expected float32 as q, got float16"),
        ("slot_mapping", dict(dtype=torch.int32), "slot_mapping: expected int64, got int32"),
    ],
)
def test_wrong_arguments_of_rope_raise(rope_arguments, name, fields, message):
    extension = pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    with pytest.raises(ValueError, match=f"rope_kv_write: {message}"):
        extension.rope_kv_write(**change(rope_arguments, name, **fields))


def test_written_tensors_that_a_kernel_cannot_write_raise():
    x, weight = torch.zeros(4, 8), torch.zeros(8)
    with pytest.raises(ValueError, match=r"residual: expected last stride 1, got strides \(1, 4\)"):
        cuda.rms_norm(x, weight, eps=1e-5, residual=torch.zeros(8, 4).t())
    with pytest.raises(ValueError, match="residual: expected rows that do not overlap"):
        cuda.rms_norm(x, weight, eps=1e-5, residual=torch.zeros(1, 8).expand(4, 8))
    heads, cache = torch.zeros(2, 1, 4), torch.zeros(3, 1, 1, 4)
    tokens, tables = torch.zeros(2, dtype=torch.int64), torch.zeros(9, 2)
    rest = (heads, heads, tokens.int(), tokens, tables, tables)
    with pytest.raises(ValueError, match="q: expected last stride 1, got strides"):
        cuda.rope_kv_write(torch.zeros(2, 4, 4).transpose(1, 2)[:, :1], *rest, cache, cache)
    with pytest.raises(ValueError, match="v_cache: expected last stride 1, got strides"):
        cuda.rope_kv_write(heads, *rest, cache, torch.zeros(3, 1, 4, 4).transpose(2, 3)[:, :, :1])
    with pytest.raises(ValueError, match="q: expected an even head_dim, got 3"):
        cuda.rope_kv_write(heads[..., :3], *rest, cache, cache)
