"""One transformer for LLaDA and Dream on the operators of `blockbatch_kernels`: packed queries, paged K/V."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.models.spec import ModelSpec
from blockbatch.models.weights import TransformerWeights


def rope_table(spec: ModelSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, each [max_length, head_dim / 2] fp32."""
    exponent = torch.arange(0, spec.head_dim, 2, dtype=torch.float32, device=device) / spec.head_dim
    angle = torch.outer(
        torch.arange(spec.max_length, dtype=torch.float32, device=device), spec.rope_theta**-exponent
    )
    return angle.cos(), angle.sin()


def activation_bytes(spec: ModelSpec, dtype: torch.dtype, num_tokens: int) -> int:
    """Bytes that `forward` needs at most for its intermediate tensors, beside weights and cache."""
    # Residual, norm and two products of the hidden size; gate, up and their activation.
    return num_tokens * (4 * spec.hidden_size + 3 * spec.intermediate_size) * dtype.itemsize


def forward(
    spec: ModelSpec,
    weights: TransformerWeights,
    rope: tuple[Tensor, Tensor],
    packed: bbk.PackedQueries,
    kv: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Runs the packed queries through all layers.

    Args:
        packed: the query tokens.
        kv: [layers, 2, pages, page_size, num_kv_heads, head_dim]; *written* at the queries' slots.
        page_table: [rows, pages_per_row] int32.
        seqlens_k: [rows] int32.

    Returns:
        [capacity, hidden_size], after the final norm.
    """
    query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    cos, sin = rope
    residual = F.embedding(packed.input_ids, weights.embedding)
    normed = bbk.rms_norm(residual, weights.layers[0].input_norm, eps=spec.rms_norm_eps, backend=backend)
    for index, layer in enumerate(weights.layers):
        k_cache, v_cache = kv[index]
        qkv = F.linear(normed, layer.qkv_weight, layer.qkv_bias)
        q, k, v = (
            part.unflatten(1, (-1, spec.head_dim))
            for part in qkv.split((query_size, kv_size, kv_size), dim=1)
        )
        bbk.rope_kv_write(
            q, k, v, packed.positions, packed.slot_mapping, cos, sin, k_cache, v_cache, backend=backend
        )
        attended = bbk.varlen_attention(
            q, k_cache, v_cache, page_table, packed.cu_seqlens_q, seqlens_k, backend=backend
        )
        projected = F.linear(attended.flatten(1), layer.out_weight)
        normed = bbk.rms_norm(
            projected, layer.post_norm, eps=spec.rms_norm_eps, residual=residual, backend=backend
        )
        activated = bbk.swiglu(F.linear(normed, layer.gate_up_weight), backend=backend)
        down = F.linear(activated, layer.down_weight)
        last = index + 1 == len(weights.layers)
        next_norm = weights.final_norm if last else weights.layers[index + 1].input_norm
        normed = bbk.rms_norm(down, next_norm, eps=spec.rms_norm_eps, residual=residual, backend=backend)
    return normed
