"""Every way to compute a product or the LM head, forced in turn: what gemm.py times for the tuning tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from timing import as_graph, medians_in_turns
from torch import Tensor
from verify import Wrong, relative_error

import blockbatch_kernels as bbk
from blockbatch.kv_cache import PAGE_SIZE
from blockbatch.models import Model, transformer
from blockbatch_kernels import tuning
from blockbatch_kernels.cuda import gemm

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}
_TURNS = 5
_HEAD_CALLS = 4

Outputs = tuple[Tensor, ...]


@contextmanager
def forced(name: str, value: Any, device: torch.device) -> Iterator[None]:
    """`tuning.name` answers `value`; raises RuntimeError where nothing on a GPU asked for it."""
    asked = []

    def answer(*sizes, **more):
        asked.append(sizes)
        return value

    with patch.object(tuning, name, answer):
        yield
    if device.type == "cuda" and not asked:
        raise RuntimeError(f"tuning.{name}: expected the launch to ask for it, nothing did")


@dataclass
class Product:
    """A product of every layer in the operator that computes it, with all that the operator adds.

    Attributes:
        out_features: of a product with gates those behind the activation.
        run: layer, dtype of weights and arithmetic, backend -> results.
    """

    name: str
    out_features: int
    in_features: int
    layers: int
    run: Callable[[int, torch.dtype, str | None], Outputs]

    @property
    def gated(self) -> bool:
        return self.name == "gate_up"


def layer_products(model: Model, tokens: int, dtype: torch.dtype) -> dict[str, Product]:
    """qkv with rotation and cache write, out, gate_up with the activation, and down, on random tokens."""
    spec, layers, device = model.spec, model.weights.layers, model.device
    query = spec.num_heads * spec.head_dim
    qkv_features = query + 2 * spec.num_kv_heads * spec.head_dim
    pages = -(-tokens // PAGE_SIZE) + 4
    positions = torch.randint(spec.max_length, (tokens,), dtype=torch.int32, device=device)
    slots = torch.randperm(pages * PAGE_SIZE, device=device)[:tokens]
    where = (positions, slots, *transformer.rope_table(spec, device))
    caches = {
        kind: torch.zeros(2, pages, PAGE_SIZE, spec.num_kv_heads, spec.head_dim, dtype=kind, device=device)
        for kind in {dtype, torch.float32}
    }

    def qkv(x: Tensor, layer: int, backend: str | None) -> Outputs:
        bias, cache = layers[layer].qkv_bias, caches[x.dtype]
        weight = layers[layer].qkv_weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        options = dict(num_heads=spec.num_heads, static_weight=True, backend=backend)
        return bbk.linear_rope_kv_write(x, weight, bias, *where, *cache, **options), cache

    def linear(name: str) -> Callable[[Tensor, int, str | None], Outputs]:
        operator = bbk.linear_swiglu if name == "gate_up" else bbk.linear

        def run(x: Tensor, layer: int, backend: str | None) -> Outputs:
            weight = getattr(layers[layer], f"{name}_weight").to(x.dtype)
            return (operator(x, weight, static_weight=True, backend=backend),)

        return run

    def product(name: str, out_features: int, in_features: int, run: Callable) -> Product:
        x = torch.randn(tokens, in_features, device=device).to(dtype)
        inputs = {kind: x.to(kind) for kind in caches}
        return Product(
            name,
            out_features,
            in_features,
            len(layers),
            lambda layer, kind, backend: run(inputs[kind], layer, backend),
        )

    hidden, inner = spec.hidden_size, spec.intermediate_size
    return {
        "qkv": product("qkv", qkv_features, hidden, qkv),
        "out": product("out", hidden, query, linear("out")),
        "gate_up": product("gate_up", inner, hidden, linear("gate_up")),
        "down": product("down", hidden, inner, linear("down")),
    }


def time_product(
    product: Product, tokens: int, device: torch.device, dtype: torch.dtype, repeats: int
) -> dict[str, float]:
    """Microseconds a layer of every way; each is compared with fp32 first."""
    on_gpu = device.type == "cuda"
    kind = tuning.device_kind(device) if on_gpu else tuning.H100
    ways = tuning.candidates(
        tokens,
        product.out_features,
        product.in_features,
        gated=product.gated,
        device_kind=kind,
    )
    if on_gpu and not gemm.kernel_exists(device.index):
        ways = {"cublas": ways["cublas"]}
    backend = "cuda" if on_gpu else "reference"  # which stands in for every way

    def results(kind: torch.dtype, backend: str) -> Outputs:
        return tuple(tensor.clone() for tensor in product.run(0, kind, backend))

    def all_layers() -> None:
        for layer in range(product.layers):
            product.run(layer, dtype, backend)

    truth, plain = results(torch.float32, "reference"), results(dtype, "reference")
    allowed = [
        2 * relative_error(value, true) + ROUNDING[dtype] for value, true in zip(plain, truth, strict=True)
    ]
    runs = {}
    for name, parts in ways.items():
        with forced("linear_parts", parts, device):
            for value, true, most in zip(results(dtype, backend), truth, allowed, strict=True):
                error = relative_error(value, true)
                if not error <= most:
                    what = f"{product.name}, {tokens} tokens, {name}"
                    raise Wrong(f"{what}: expected an error of at most {most:.2e}, got {error:.2e}")
            runs[name] = as_graph(all_layers, device)
    taken = medians_in_turns([(run, None) for run in runs.values()], device, _TURNS * repeats)
    return {name: 1e3 * value / product.layers for name, value in zip(runs, taken, strict=True)}


def time_lm_head(
    model: Model, rows: int, device: torch.device, dtype: torch.dtype, repeats: int
) -> dict[str, float]:
    """Microseconds of the LM head by its product without logits, by tile, and by cuBLAS and a reduction."""
    on_gpu = device.type == "cuda"
    backend = "cuda" if on_gpu else "reference"
    hidden = torch.randn(rows, model.spec.hidden_size, device=device).to(dtype)
    weight = model.weights.lm_head

    def run(kind: torch.dtype, backend: str) -> Outputs:
        return bbk.lm_head_confidence(hidden.to(kind), weight.to(kind), backend=backend)[:2]

    def calls() -> None:
        for _ in range(_HEAD_CALLS):
            run(dtype, backend)

    truth, plain = run(torch.float32, "reference"), run(dtype, "reference")

    def errors(found: Outputs) -> tuple[int, float]:
        return int((found[0] != truth[0]).sum()), relative_error(found[1], truth[1])

    wrong, distance = errors(plain)
    allowed = 2 * wrong + 2, 2 * distance + ROUNDING[dtype]
    tiles = [tile for tile in tuning.LM_HEAD_TILES if tile >= rows]
    if on_gpu and not gemm.kernel_exists(device.index):
        tiles = []
    runs = {}
    for tile in (0, *tiles):
        name = str(tile) if tile else "cublas"
        with forced("lm_head_tile", tile, device):
            found = errors(run(dtype, backend))
            if not all(value <= most for value, most in zip(found, allowed, strict=True)):
                raise Wrong(
                    f"lm_head, {rows} rows, {name}: expected errors of at most {allowed}, got {found}"
                )
            runs[name] = as_graph(calls, device)
    taken = medians_in_turns([(once, None) for once in runs.values()], device, _TURNS * repeats)
    return {name: 1e3 * value / _HEAD_CALLS for name, value in zip(runs, taken, strict=True)}
