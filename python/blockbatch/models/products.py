"""What a layer computes with its weights, by their kind: 16 and 32 bits, or e4m3.

Between a norm and a product, and between activation and product, lie rows that only the product reads. With
weights in e4m3 these rows are quantised where they are computed: a pair of values and scales takes the place
of a tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.models.quantized_weights import QuantizedWeight
from blockbatch.models.spec import ModelSpec
from blockbatch.models.weights import LayerWeights, TransformerWeights

# Values and scales of rows, see `bbk.quantize_rows`; where weights are not quantised, a tensor.
Rows = Any


def in_pieces(operator: Callable[..., Tensor], size: int | None) -> Callable[..., Tensor]:
    """An operator on tokens as calls of `size` tokens each; None: as it is.

    Lists of integers among the arguments (positions, slots) belong to the tokens; all else is the same for
    all.
    """
    if size is None:
        return operator

    def run(x: Tensor, *arguments: Tensor | None) -> Tensor:
        results = []
        for first in range(0, max(1, len(x)), size):
            piece = slice(first, first + size)
            own = (value[piece] if _is_of_tokens(value) else value for value in arguments)
            results.append(operator(x[piece], *own))
        return results[0] if len(results) == 1 else torch.cat(results)

    return run


def _is_of_tokens(value: Tensor | None) -> bool:
    return value is not None and value.dim() == 1 and not value.is_floating_point()


def write_heads(
    q: Tensor, k: Tensor, v: Tensor, where: tuple[Tensor, ...], scales: tuple[Tensor, ...], **options: Any
) -> None:
    """`bbk.rope_kv_write`, or with the scales of K and of V that into a cache in e4m3; q and caches
    *written*."""
    if scales:
        bbk.rope_kv_write_fp8(q, k, v, *where, *scales, **options)
    else:
        bbk.rope_kv_write(q, k, v, *where, **options)


class Products:
    """Weights in the model's dtype.

    Args:
        fixed_tokens: products are made of so many tokens at a time; None: of all.
        all_reduce_norm: see `transformer.forward`.
    """

    quantized = False

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        backend: str | None,
        fixed_tokens: int | None = None,
        all_reduce_norm: Callable[..., Any] | None = None,
    ) -> None:
        self._all_reduce_norm = all_reduce_norm
        self.spec, self.dtype, self.backend, self.fixed_tokens = spec, dtype, backend, fixed_tokens
        # Nothing writes the weights once they are loaded.
        options = dict(static_weight=True, backend=backend)
        self._linear = in_pieces(functools.partial(bbk.linear, **options), fixed_tokens)
        self._gated = in_pieces(functools.partial(bbk.linear_swiglu, **options), fixed_tokens)
        rotated = functools.partial(bbk.linear_rope_kv_write, num_heads=spec.num_heads, **options)
        self._rotated = in_pieces(rotated, fixed_tokens)

    def norm(self, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Rows:
        """The norm in front of a product; `residual` *written*."""
        eps = self.spec.rms_norm_eps
        return bbk.rms_norm(x, weight, eps=eps, residual=residual, backend=self.backend)

    def norm_of_sum(self, x: Tensor, weight: Tensor, residual: Tensor) -> Rows:
        """The norm behind a product of which each rank has a part of the sums; `residual` *written*."""
        if self._all_reduce_norm is None:
            return self.norm(x, weight, residual)
        options = dict(eps=self.spec.rms_norm_eps, backend=self.backend)
        return self._all_reduce_norm(x, weight, residual, quantized=self.quantized, **options)

    def final_norm(self, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        """The same behind the last product, in front of the LM head."""
        norm = bbk.rms_norm if self._all_reduce_norm is None else self._all_reduce_norm
        return norm(x, weight, residual=residual, eps=self.spec.rms_norm_eps, backend=self.backend)

    def rows(self, x: Tensor) -> Rows:
        """`x` as a product takes it."""
        return x

    def linear(self, x: Rows, weight: Any, bias: Tensor | None = None) -> Tensor:
        return self._linear(x, weight, bias)

    def rotated(
        self, x: Rows, layer: LayerWeights, where: tuple[Tensor, ...], scales: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """q, with k and v on their way into the cache.

        Args:
            where: what `bbk.rope_kv_write` takes behind v.
            scales: of a cache in e4m3, of K and of V; else empty.
        """
        return self._rotated(x, layer.qkv_weight, layer.qkv_bias, *where, *scales)

    def activated(self, x: Rows, layer: LayerWeights) -> Rows:
        """silu(gate) * up."""
        return self._gated(x, layer.gate_up_weight)


class Fp8Products(Products):
    """Weights in e4m3, activations quantised by token."""

    quantized = True

    def norm(self, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Rows:
        eps = self.spec.rms_norm_eps
        return bbk.rms_norm_fp8(x, weight, eps=eps, residual=residual, backend=self.backend)

    def rows(self, x: Tensor) -> Rows:
        return bbk.quantize_rows(x, backend=self.backend)

    def linear(self, x: Rows, weight: Any, bias: Tensor | None = None) -> Tensor:
        values, scale = x
        size = max(1, len(values)) if self.fixed_tokens is None else self.fixed_tokens
        options = dict(out_dtype=self.dtype, static_weight=True, backend=self.backend)
        results = []
        for first in range(0, max(1, len(values)), size):
            own = (part[first : first + size] for part in (values, scale))
            results.append(bbk.linear_fp8(*own, weight.values, weight.scale, bias, **options))
        return results[0] if len(results) == 1 else torch.cat(results)

    def rotated(
        self, x: Rows, layer: LayerWeights, where: tuple[Tensor, ...], scales: tuple[Tensor, ...] = ()
    ) -> Tensor:
        values, scale = x
        weight, bias = layer.qkv_weight, layer.qkv_bias
        positions, slots, *places = where
        size = max(1, len(values)) if self.fixed_tokens is None else self.fixed_tokens
        options = dict(num_heads=self.spec.num_heads, out_dtype=self.dtype, static_weight=True)
        results = []
        for first in range(0, max(1, len(values)), size):
            x, x_scale, *own = (part[first : first + size] for part in (values, scale, positions, slots))
            product = (x, x_scale, weight.values, weight.scale, bias)
            results.append(
                bbk.linear_rope_kv_write_fp8(
                    *product, *own, *places, *scales, **options, backend=self.backend
                )
            )
        return results[0] if len(results) == 1 else torch.cat(results)

    def activated(self, x: Rows, layer: LayerWeights) -> Rows:
        values, scale = x
        size = max(1, len(values)) if self.fixed_tokens is None else self.fixed_tokens
        weight, options = layer.gate_up_weight, dict(out_dtype=self.dtype, static_weight=True)
        results = []
        for first in range(0, max(1, len(values)), size):
            own = (part[first : first + size] for part in (values, scale))
            results.append(
                bbk.linear_swiglu_fp8(*own, weight.values, weight.scale, **options, backend=self.backend)
            )
        return results[0] if len(results) == 1 else tuple(map(torch.cat, zip(*results, strict=True)))


def products_of(
    spec: ModelSpec,
    weights: TransformerWeights,
    backend: str | None,
    fixed_tokens: int | None = None,
    all_reduce_norm: Callable[..., Any] | None = None,
) -> Products:
    """Those for the kind of these weights."""
    kind = Fp8Products if isinstance(weights.layers[0].qkv_weight, QuantizedWeight) else Products
    return kind(spec, weights.embedding.dtype, backend, fixed_tokens, all_reduce_norm)
