"""What a layer computes with its weights, by their kind: 16 and 32 bits, or e4m3.

Between a norm and a product, and between activation and product, lie rows that only the product reads. With
weights in e4m3 these rows are quantised where they are computed: a pair of values and scales takes the place
of a tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.models.quantized_weights import QuantizedWeight
from blockbatch.models.spec import ModelSpec
from blockbatch.models.weights import LayerWeights, TransformerWeights
from blockbatch_kernels.shapes import split_heads

# Values and scales of rows, see `bbk.quantize_rows`; where weights are not quantised, a tensor.
Rows = Any


class Products:
    """Weights in the model's dtype."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, backend: str | None) -> None:
        self.spec, self.dtype, self.backend = spec, dtype, backend

    def norm(self, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Rows:
        """The norm in front of a product; `residual` *written*."""
        eps = self.spec.rms_norm_eps
        return bbk.rms_norm(x, weight, eps=eps, residual=residual, backend=self.backend)

    def rows(self, x: Tensor) -> Rows:
        """`x` as a product takes it."""
        return x

    def linear(self, x: Rows, weight: Any, bias: Tensor | None = None) -> Tensor:
        # Nothing writes the weights once they are loaded.
        return bbk.linear(x, weight, bias, static_weight=True, backend=self.backend)

    def rotated(self, x: Rows, layer: LayerWeights, where: tuple[Tensor, ...]) -> Tensor:
        """q, with k and v on their way into the cache; `where` is what `bbk.rope_kv_write` takes behind v."""
        return bbk.linear_rope_kv_write(
            x,
            layer.qkv_weight,
            layer.qkv_bias,
            *where,
            num_heads=self.spec.num_heads,
            static_weight=True,
            backend=self.backend,
        )

    def activated(self, x: Rows, layer: LayerWeights) -> Rows:
        """silu(gate) * up."""
        return bbk.linear_swiglu(x, layer.gate_up_weight, static_weight=True, backend=self.backend)


class Fp8Products(Products):
    """Weights in e4m3, activations quantised by token."""

    def norm(self, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Rows:
        eps = self.spec.rms_norm_eps
        return bbk.rms_norm_fp8(x, weight, eps=eps, residual=residual, backend=self.backend)

    def rows(self, x: Tensor) -> Rows:
        return bbk.quantize_rows(x, backend=self.backend)

    def linear(self, x: Rows, weight: Any, bias: Tensor | None = None) -> Tensor:
        return bbk.linear_fp8(
            *x,
            weight.values,
            weight.scale,
            bias,
            out_dtype=self.dtype,
            static_weight=True,
            backend=self.backend,
        )

    def rotated(self, x: Rows, layer: LayerWeights, where: tuple[Tensor, ...]) -> Tensor:
        product = self.linear(x, layer.qkv_weight, layer.qkv_bias)
        q, k, v = split_heads(product, self.spec.num_heads, where[-1])
        bbk.rope_kv_write(q, k, v, *where, backend=self.backend)
        return q

    def activated(self, x: Rows, layer: LayerWeights) -> Rows:
        return bbk.swiglu_fp8(self.linear(x, layer.gate_up_weight), backend=self.backend)


def products_of(spec: ModelSpec, weights: TransformerWeights, backend: str | None) -> Products:
    """Those for the kind of these weights."""
    kind = Fp8Products if isinstance(weights.layers[0].qkv_weight, QuantizedWeight) else Products
    return kind(spec, weights.embedding.dtype, backend)
