"""rope_kv_write with an RMSNorm over each head in front: every backend against the two operators in a row."""

import pytest
import torch

import blockbatch_kernels as bbk
from blockbatch_kernels import reference
from float_errors import assert_no_worse_than_torch
from interpreter import DEVICE, in_interpreter, run_in_the_interpreter
from operator_arguments import rope

EPS = 1e-5
SHAPES = [(4, 2, 64), (3, 3, 6), (5, 1, 128), (2, 1, 2), (6, 2, 96), (1, 1, 256), (32, 8, 128)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs_of(device, dtype, heads, kv_heads, head_dim, strided):
    """Parts of one product, at an odd address where `strided`; caches full of NaN."""
    inputs = rope(device, dtype, heads, kv_heads, head_dim)
    whole = torch.cat([inputs[name].flatten(1) * 3 for name in "qkv"], 1)
    if strided:
        whole = torch.nn.functional.pad(whole, (1, 2))[:, 1:-2]
    sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    for name, part in zip("qkv", whole.split(sizes, dim=1), strict=True):
        inputs[name] = part.unflatten(1, (-1, head_dim))
    for name in ("k_cache", "v_cache"):
        inputs[name] = torch.full_like(inputs[name], float("nan"))
    inputs["slot_mapping"][4] = -1
    norms = (torch.randn(2, head_dim) + 1).to(device, dtype)
    return inputs | dict(q_norm=norms[0], k_norm=norms[1], norm_eps=EPS)


def truth_of(heads, weight, inputs):
    """In fp64."""
    exact = heads.double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    cos, sin = (inputs[name][inputs["positions"].long()].double().unsqueeze(1) for name in ("cos", "sin"))
    first, second = exact.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def compare(backend, device, dtype, heads, kv_heads, head_dim, strided):
    inputs = inputs_of(device, dtype, heads, kv_heads, head_dim, strided)
    given = {name: inputs[name].clone() for name in "qkv"}
    plain = {name: value.clone() for name, value in inputs.items() if "norm" not in name}
    for name in "qk":
        plain[name] = reference.rms_norm(plain[name], inputs[f"{name}_norm"], eps=EPS)
    reference.rope_kv_write(**plain)
    bbk.rope_kv_write(**inputs, backend=backend)
    stored = inputs["slot_mapping"] >= 0
    slots = inputs["slot_mapping"][stored]
    caches = {name: [side[f"{name}_cache"].flatten(0, 1) for side in (inputs, plain)] for name in ("k", "v")}
    pairs = [(inputs["q"], plain["q"], truth_of(given["q"], inputs["q_norm"], inputs))]
    k, theirs = caches["k"]
    pairs.append((k[slots], theirs[slots], truth_of(given["k"], inputs["k_norm"], inputs)[stored]))
    for ours, theirs, truth in pairs:
        if backend == "reference":
            assert torch.equal(ours, theirs)
        assert_no_worse_than_torch(ours, theirs, truth)
    assert torch.equal(caches["v"][0][slots], given["v"][stored])
    assert torch.equal(inputs["k"], given["k"]) and torch.equal(inputs["v"], given["v"])
    for ours, theirs in caches.values():
        assert torch.equal(ours.isnan(), theirs.isnan())  # nothing is written anywhere else


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference(dtype):
    for heads, kv_heads, head_dim in SHAPES:
        compare("reference", "cpu", dtype, heads, kv_heads, head_dim, strided=head_dim % 4 == 0)


def test_in_the_interpreter():
    run_in_the_interpreter(__file__, "-k", "interpreted")


@in_interpreter
def test_triton_interpreted():
    for heads, kv_heads, head_dim in SHAPES[:6]:
        for strided in (False, True):
            compare("triton", DEVICE, torch.float32, heads, kv_heads, head_dim, strided)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(backend, dtype):
    for heads, kv_heads, head_dim in SHAPES:
        for strided in (False, True):
            compare(backend, "cuda", dtype, heads, kv_heads, head_dim, strided)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(k_norm=None), "k_norm: expected a tensor beside q_norm, got None"),
        (dict(q_norm=None), "q_norm: expected a tensor beside k_norm, got None"),
        (dict(q_norm=torch.ones(63)), r"q_norm: expected shape \[64\], got \[63\]"),
        (dict(k_norm=torch.ones(64).half()), "k_norm: expected torch.float32, got torch.float16"),
        (dict(norm_eps="small"), "norm_eps: expected a number, got 'small'"),
    ],
)
def test_wrong_norms_raise(change, message):
    inputs = inputs_of("cpu", torch.float32, 4, 2, 64, False)
    before = inputs["q"].clone()
    with pytest.raises((TypeError, ValueError), match=message):
        bbk.rope_kv_write(**inputs | change)
    assert torch.equal(inputs["q"], before)
