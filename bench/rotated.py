"""The product of q, k and v with rotation and cache write in one launch, beside the same in two launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from timing import as_graph, clean, in_turns, rounded
from torch import Tensor
from verify import Wrong

import blockbatch_kernels as bbk
from blockbatch.models import Model, transformer
from blockbatch_kernels.shapes import E4M3, split_heads

PAGE_SIZE = 16
# Of the cache in e4m3; what is stored says nothing about the time.
SCALE = 2.0**-4


def _write(product: Tensor, where: tuple[Tensor | None, ...], num_heads: int, options: dict) -> Tensor:
    *plain, k_scale, v_scale = where
    q, k, v = split_heads(product, num_heads, plain[-1])
    if k_scale is None:
        bbk.rope_kv_write(q, k, v, *plain, **options)
    else:
        bbk.rope_kv_write_fp8(q, k, v, *plain, k_scale, v_scale, **options)
    return q


def _with_scales(where: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return where if len(where) == 8 else (*where, None, None)


def linear_then_rope(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *where: Tensor,
    num_heads: int,
    static_weight: bool = False,
    backend: str | None = None,
) -> Tensor:
    product = bbk.linear(x, weight, bias, static_weight=static_weight, backend=backend)
    return _write(product, _with_scales(where), num_heads, dict(backend=backend))


def linear_fp8_then_rope(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *where: Tensor,
    num_heads: int,
    out_dtype: torch.dtype,
    static_weight: bool = False,
    backend: str | None = None,
) -> Tensor:
    options = dict(out_dtype=out_dtype, static_weight=static_weight, backend=backend)
    product = bbk.linear_fp8(x, x_scale, weight, weight_scale, bias, **options)
    return _write(product, _with_scales(where), num_heads, dict(backend=backend))


@contextmanager
def apart() -> Iterator[None]:
    """Meanwhile models compute q, k and v by the two operators."""
    operators = dict(linear_rope_kv_write=linear_then_rope, linear_rope_kv_write_fp8=linear_fp8_then_rope)
    with mock.patch.multiple(bbk, **operators):
        yield


def measure_rotated(models: dict[str, Model], tokens: int, repeats: int) -> dict:
    """ms for all layers, in one launch and `apart`, by the kinds of weights and of caches.

    Args:
        models: "bf16" and "fp8".

    Raises:
        Wrong: the two differ in a bit of q or of a cache.
    """
    runs: dict[str, Callable[[], Any]] = {}
    for kind, model in models.items():
        for cache in ("16 bits", "e4m3"):
            runs |= _ways(model, kind, cache, tokens)
    device = models["fp8"].device
    taken = in_turns([(run, None) for run in runs.values()], device, repeats)
    found = rounded({"tokens": tokens, "ms": {name: ms for name, (ms, _) in zip(runs, taken, strict=True)}})
    print(f"rotated, {found}", flush=True)
    del runs
    clean(device)
    return found


def _ways(model: Model, kind: str, cache: str, tokens: int) -> dict[str, Callable[[], Any]]:
    spec, device, dtype = model.spec, model.device, model.dtype
    num_slots = -(-tokens // PAGE_SIZE) * PAGE_SIZE
    shape = (2, num_slots // PAGE_SIZE, PAGE_SIZE, spec.num_kv_heads, spec.head_dim)
    cos, sin = transformer.rope_table(spec, device)
    slots = torch.arange(tokens, device=device)
    scales = (torch.full((spec.num_kv_heads,), SCALE, device=device),) * 2 if cache == "e4m3" else ()
    activations = torch.randn(tokens, spec.hidden_size, device=device).to(dtype)
    options = dict(num_heads=spec.num_heads, static_weight=True, backend=model.backend)
    if kind == "fp8":
        options |= dict(out_dtype=dtype)
        rows = bbk.quantize_rows(activations)
        products = [
            (*rows, layer.qkv_weight.values, layer.qkv_weight.scale, layer.qkv_bias)
            for layer in model.weights.layers
        ]
        ways = {"together": bbk.linear_rope_kv_write_fp8, "apart": linear_fp8_then_rope}
    else:
        products = [(activations, layer.qkv_weight, layer.qkv_bias) for layer in model.weights.layers]
        ways = {"together": bbk.linear_rope_kv_write, "apart": linear_then_rope}
    results, runs = {}, {}
    for name, operator in ways.items():
        caches = torch.zeros(shape, device=device).to(E4M3 if scales else dtype)
        where = (slots.int(), slots, cos, sin, *caches, *scales)
        q = operator(*products[0], *where, **options)
        results[name] = q.clone(), caches.view(torch.uint8).clone()

        def run(operator: Callable = operator, where: tuple = where) -> list[Tensor]:
            return [operator(*product, *where, **options) for product in products]

        runs[f"{kind}, cache in {cache}, {name}"] = as_graph(run, device)
    if not all(map(torch.equal, *results.values())):
        raise Wrong(f"q, k and v of {tokens} tokens, {kind}, cache in {cache}: not the bits of two launches")
    return runs
