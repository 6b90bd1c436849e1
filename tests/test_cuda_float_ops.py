"""rms_norm, rope_kv_write and lm_head_confidence of the compiled backend, on inputs of any layout.

Their errors against an fp64 truth are compared with torch's own in the same dtype. swiglu: test_extension.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import blockbatch_kernels as bbk
from blockbatch_kernels import cuda, tuning

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Added to a row's length, and elements before the first row: aligned vectors, and three ways to have none.
LAYOUTS = [(0, 0), (64, 0), (3, 0), (0, 1), (5, 3)]


def draw(*shape, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


def strided(values, padding, offset):
    """`values` as a view of a larger storage of NaN, and the mask of what lies beside it there."""
    rows, columns = values.shape
    storage = torch.full(
        (offset + rows * (columns + padding),),
        math.nan,
        dtype=values.dtype,
        device="cuda",
    )
    view = storage[offset:].view(rows, columns + padding)[:, :columns]
    view.copy_(values)
    beside = torch.ones_like(storage, dtype=torch.bool)
    beside[offset:].view(rows, columns + padding)[:, :columns] = False
    return view, storage, beside


def assert_no_worse_than_torch(got, torchs, truth):
    error = (got.double() - truth).abs().max().item()  # NaN, and so a failure, where an element was left out
    torch_error = (torchs.double() - truth).abs().max().item()
    rounding = torch.finfo(torchs.dtype).eps * truth.abs().max().item()  # torch may be exact on few elements
    assert error <= 2 * torch_error + rounding


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
def test_rope_kv_write_with_a_permuted_cache_and_what_lies_outside():
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


def head_of(logits):
    """Hidden states and weights whose product is exactly `logits`."""
    return torch.eye(logits.shape[0], dtype=logits.dtype, device="cuda"), logits.t().contiguous()


def check_lm_head(logits, probes, suppress, **got):
    """Results against the definition in fp64, and torch's own softmax in fp32."""
    wide = logits.double()
    if suppress is not None:
        wide[:, suppress] = -math.inf
    truth, torchs = wide.softmax(-1), wide.float().softmax(-1)
    assert torch.equal(got["top"].long(), wide.argmax(-1))
    index = got["top"].long().unsqueeze(1)
    assert_no_worse_than_torch(got["confidence"], torchs.gather(1, index)[:, 0], truth.gather(1, index)[:, 0])
    index = probes.long().unsqueeze(1)
    assert_no_worse_than_torch(got["probe"], torchs.gather(1, index)[:, 0], truth.gather(1, index)[:, 0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 7, 50, 4096, 4097, 12289, 126464])
@pytest.mark.parametrize("scale", [0.05, 4.0, 3000.0])
def test_lm_head_confidence(poisoned, dtype, vocab_size, scale):
    for rows in (1, 5, 256) if vocab_size < 50000 else (9,):
        # Few different values, so that ties are common; the last rows are below any starting value.
        logits = draw(rows, vocab_size, scale=scale, seed=rows).mul(4).round().div(4)
        logits[-1] -= 30000
        logits = logits.to(dtype)
        hidden, weight = head_of(logits)
        generator = torch.Generator().manual_seed(vocab_size)
        probes = torch.randint(0, vocab_size, (rows,), dtype=torch.int32, generator=generator).cuda()
        for suppress in (
            (None,) if vocab_size == 1 else (None, vocab_size - 1, int(logits[0].float().argmax()))
        ):
            top, confidence, probe = bbk.lm_head_confidence(
                hidden,
                weight,
                probe_tokens=probes,
                suppress_token=suppress,
                backend="cuda",
            )
            check_lm_head(logits, probes, suppress, top=top, confidence=confidence, probe=probe)
        top, confidence, probe = bbk.lm_head_confidence(hidden, weight, backend="cuda")
        assert probe is None and torch.equal(top.long(), logits.float().argmax(-1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 600, 1100])
def test_lm_head_of_random_hidden_states(poisoned, dtype, rows):
    hidden = draw(rows, 256, dtype=dtype)
    embedding = draw(9000, 256, dtype=dtype, scale=0.25, seed=1)
    weight = embedding[:8888]  # the tied embedding may have more rows than the vocabulary
    top, confidence, _ = bbk.lm_head_confidence(hidden, weight, suppress_token=11, backend="cuda")
    wide = hidden.double() @ weight.double().t()
    logits = F.linear(hidden, weight)
    wide[:, 11] = logits[:, 11] = -math.inf
    # Its logit is the highest, up to the rounding of logits.
    chosen = wide.gather(1, top.long().unsqueeze(1))[:, 0]
    assert (chosen >= wide.amax(-1) - 2 * torch.finfo(dtype).eps * wide.amax(-1).abs() - 1e-6).all()
    torchs = logits.float().softmax(-1).amax(-1)
    assert_no_worse_than_torch(confidence, torchs.to(dtype), wide.softmax(-1).amax(-1))


@pytest.mark.gpu
def test_lm_head_of_a_row_does_not_depend_on_rows_and_chunks(monkeypatch):
    logits = draw(300, 20000, scale=5.0).bfloat16()
    hidden, weight = head_of(logits)
    together = bbk.lm_head_confidence(hidden, weight, backend="cuda")
    few = bbk.lm_head_confidence(hidden[7:9], weight, backend="cuda")
    monkeypatch.setattr(tuning, "LM_HEAD_LOGITS_BYTES", 1)
    chunked = bbk.lm_head_confidence(hidden, weight, backend="cuda")
    for one, two, three in zip(together[:2], few[:2], chunked[:2], strict=True):
        assert torch.equal(one[7:9], two) and torch.equal(one, three)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_lm_head_takes_special_values_as_torch_does(dtype, special):
    hidden = torch.ones(1, 1, dtype=dtype, device="cuda")
    for places in ([0], [9001], [4095, 4096], [77, 78, 9001], range(10000)):
        weight = draw(10000, 1, dtype=dtype)
        weight[list(places)] = special
        expected = bbk.lm_head_confidence(hidden, weight, backend="reference")
        got = bbk.lm_head_confidence(hidden, weight, backend="cuda")
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.gpu
def test_lm_head_of_nothing_and_probes_outside():
    hidden, weight = draw(4, 16), draw(5000, 16, seed=1)
    probes = torch.tensor([-1, 5000, 4999, 2**31 - 1], dtype=torch.int32, device="cuda")
    probe = bbk.lm_head_confidence(hidden, weight, probe_tokens=probes, backend="cuda")[2]
    assert probe.isnan().tolist() == [True, True, False, True]
    top, confidence, _ = bbk.lm_head_confidence(hidden[:0], weight, backend="cuda")
    assert top.shape == confidence.shape == (0,)
    # Neither side has to be contiguous, and a weight may be a parameter.
    weight.requires_grad_()
    expected = bbk.lm_head_confidence(hidden, weight, backend="cuda")
    turned = bbk.lm_head_confidence(hidden.t().contiguous().t(), weight.t().contiguous().t(), backend="cuda")
    assert torch.equal(turned[0], expected[0])


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


def rope_arguments():
    heads, cache = (0, 64, 8), (0, 512, 64, 8)
    return dict(
        q=heads,
        k=heads,
        v=heads,
        k_cache=cache,
        v_cache=cache,
        positions=0,
        slots=0,
        cos=0,
        sin=0,
        cos_row_stride=4,
        sin_row_stride=4,
        num_tokens=3,
        num_positions=9,
        num_pages=2,
        page_size=8,
        num_heads=8,
        num_kv_heads=8,
        head_dim=8,
        dtype=0,
        programmatic=False,
        device=0,
        stream=0,
    )


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("num_tokens", -1, "rope_kv_write: num_tokens: expected at least 0, got -1"),
        ("page_size", 0, "rope_kv_write: page_size: expected at least 1, got 0"),
        ("head_dim", 7, "rope_kv_write: head_dim: expected an even size, got 7"),
        (
            "num_pages",
            2**29,
            "k_cache: expected fewer than 2\\^31 slots, got 536870912 pages of 8",
        ),
        ("dtype", 3, "rope_kv_write: dtype: expected code 0, 1 or 2, got 3"),
    ],
)
def test_wrong_sizes_of_rope_raise(argument, value, message):
    extension = pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    with pytest.raises(ValueError, match=message):
        extension.rope_kv_write(**{**rope_arguments(), argument: value})


def test_wrong_chunks_of_the_vocabulary_raise():
    extension = pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")
    sizes = dict(num_rows=2, num_tokens=8, row_stride=8, num_pieces=2, dtype=0)
    others = dict(logits=0, probe_tokens=0, partials=0, suppress_token=-1)
    launch = dict(device=0, stream=0)
    with pytest.raises(ValueError, match="first_token: expected a multiple of 4096, got 8"):
        extension.lm_head_reduce(**sizes, **others, **launch, first_token=8)
    with pytest.raises(ValueError, match="num_pieces: expected at least 3, got 2"):
        extension.lm_head_reduce(**sizes, **others, **launch, first_token=8192)


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
