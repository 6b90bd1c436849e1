"""One transformer for all families on the operators of `blockbatch_kernels`: packed queries, paged K/V."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.models.kv_scales import KVScales
from blockbatch.models.products import Products, Rows, products_of, write_heads
from blockbatch.models.spec import ModelSpec
from blockbatch.models.weights import LayerWeights, TransformerWeights
from blockbatch_kernels import tuning

# Predictions whose logits exist at the same time, at most, and vocabulary of a reduced piece of them.
_HEAD_ROWS, _PIECE_TOKENS, _PARTIAL_BYTES = 512, 4096, 16
# A pack for which attention is that of long ones.
_MANY_TOKENS = 1 << 20
# Ids, positions, slots, rows and targets of a packed token.
_INDEX_BYTES = 128


def rope_table(spec: ModelSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, each [max_length, head_dim / 2] fp32."""
    exponent = torch.arange(0, spec.head_dim, 2, dtype=torch.float32, device=device) / spec.head_dim
    angle = torch.outer(
        torch.arange(spec.max_length, dtype=torch.float32, device=device), spec.rope_theta**-exponent
    )
    return angle.cos(), angle.sin()


def activation_bytes(
    spec: ModelSpec,
    dtype: torch.dtype,
    num_tokens: int,
    *,
    compiled: bool = False,
    quantization: str | None = None,
) -> int:
    """Bytes that `forward` and the LM head need at most for their intermediate tensors, beside weights and
    cache.

    Args:
        num_tokens: packed tokens; at most as many predictions.
        compiled: whether compiled operators run, which compute in fp32 without tensors of it.
        quantization: of the weights, as `load_model` takes it.
    """
    size, d, inner = dtype.itemsize, spec.hidden_size, spec.intermediate_size
    query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    # Residual, norm, queries, attended and projected, which stay while the MLP runs.
    kept = 3 * d + 2 * query_size
    # What an operator of the reference makes in fp32: of every number where that is another dtype.
    upcast = 0 if compiled else 4 * (2 if size == 4 else 4)
    mlp = (kept + 3 * inner + d) * size + upcast * inner
    # The last layer's tensors give way one by one while the next one's queries, keys and values are made.
    attention = (kept + 2 * d + 2 * query_size + 2 * kv_size + inner) * size
    attention += upcast * (query_size + kv_size)
    token = max(mlp, attention) + _INDEX_BYTES
    copies = 0
    if quantization is not None:
        token += inner + query_size  # rows in 8 bits beside those that they are made of
        if not compiled:  # fp32 copies of activations and of a part of the weight
            token += 4 * (inner + 3 * 2 * inner)
            copies = 2 * 4 * min(2 * inner * d, tuning.FP8_PIECE)
    pieces = -(-spec.vocab_size // _PIECE_TOKENS)
    token += d * size + _PARTIAL_BYTES * pieces  # of a prediction: its hidden state, and its reduced logits
    rows = min(num_tokens, _HEAD_ROWS // 2)
    if quantization == "fp8-all":
        token += d + 4  # of a prediction, too
        if not compiled:  # fp32 copies of a chunk's rows, of a part of the weight, and sums of that part
            piece = min(spec.vocab_size, max(1, tuning.FP8_PIECE // d))
            copies = max(copies, 4 * (piece * d + 3 * rows * (d + piece)))
    # Logits of some hundred predictions (the reference still has those of the chunk before), and attention's
    # partial results.
    if compiled:
        head = max(tuning.LM_HEAD_LOGITS_BYTES, _HEAD_ROWS * _PIECE_TOKENS * size)
    else:
        head = 2 * rows * spec.vocab_size * (size + (4 if size == 4 else 8))
    partials = tuning.MAX_PARTIALS * (query_size + spec.num_heads) * 4
    return num_tokens * token + max(head, partials) + copies


def forward(
    spec: ModelSpec,
    weights: TransformerWeights,
    rope: tuple[Tensor, Tensor],
    packed: bbk.PackedQueries,
    kv: Tensor,
    page_table: Tensor,
    seqlens_k: Tensor,
    *,
    wanted: Tensor | None = None,
    distinct_rows: int | None = None,
    num_branches: int | None = None,
    fixed_tokens: int | None = None,
    backend: str | None = None,
    all_reduce_norm: Callable[..., Any] | None = None,
    after_attention: Callable[[int], None] | None = None,
    kv_scales: KVScales | None = None,
) -> Tensor:
    """Runs the packed queries through all layers.

    Args:
        packed: the query tokens.
        kv: [layers, 2, pages, page_size, num_kv_heads, head_dim]; *written* at the queries' slots.
        page_table: [rows, pages_per_row] int32.
        seqlens_k: [rows] int32.
        wanted: [tokens] int64, packed tokens; the last layer goes on with these alone behind its attention.
            None: all of them.
        distinct_rows, num_branches: see `blockbatch_kernels.attention_plan`.
        fixed_tokens: products are made of so many tokens at a time, a divisor of the capacity, and attention
            is cut and computed in one way, so that a token's bits do not depend on the others; None: in
            whatever way is the fastest.
        all_reduce_norm: see `RankGroup.all_reduce_norm`: adds up the partial products of the ranks that share
            the layers, whose part `spec` and `weights` then are. None: nobody shares them.
        after_attention: called with the number of each layer once all that reads its keys and values is on
            its way.
        kv_scales: of a cache in e4m3; None: it has the dtype of the weights.

    Returns:
        [capacity, hidden_size], or one row for each of `wanted`, after the final norm.
    """
    cos, sin = rope
    attention_name = "varlen_attention" if kv_scales is None else "varlen_attention_fp8"
    plan = None  # the reference has no use for one
    attention_backend = backend
    if fixed_tokens is not None:  # the one for long packs computes all of them
        element_size = weights.embedding.element_size()
        sizes = dict(head_dim=spec.head_dim, element_size=element_size, num_tokens=_MANY_TOKENS)
        attention_backend = bbk.backend_of(attention_name, kv.device, backend, **sizes)
    if bbk.backend_of(attention_name, kv.device, backend, head_dim=spec.head_dim) != "reference":
        plan = bbk.attention_plan(
            page_table,
            packed.cu_seqlens_q,
            seqlens_k,
            page_size=kv.shape[3],
            num_tokens=packed.input_ids.shape[0],
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            distinct_rows=distinct_rows,
            fixed_cut=fixed_tokens is not None,
            num_branches=num_branches,
            backend=backend,
        )
    products = products_of(spec, weights, backend, fixed_tokens, all_reduce_norm)
    residual = F.embedding(packed.input_ids, weights.embedding)
    normed = products.norm(residual, weights.layers[0].input_norm)
    for index, layer in enumerate(weights.layers):
        k_cache, v_cache = kv[index]
        where = (packed.positions, packed.slot_mapping, cos, sin, k_cache, v_cache)
        scales = () if kv_scales is None else (kv_scales.k[index], kv_scales.v[index])
        if spec.qk_norm:
            q = _normed_heads(spec, layer, normed, where, scales, products, backend)
        else:
            q = products.rotated(normed, layer, where, scales)
        attend = bbk.varlen_attention if kv_scales is None else bbk.varlen_attention_fp8
        attended = attend(
            q,
            k_cache,
            v_cache,
            *scales,
            page_table,
            packed.cu_seqlens_q,
            seqlens_k,
            plan=plan,
            backend=attention_backend,
        )
        if after_attention is not None:
            after_attention(index)
        last = index + 1 == len(weights.layers)
        if last and wanted is not None:
            attended, residual = attended[wanted], residual[wanted]
        projected = products.linear(products.rows(attended.flatten(1)), layer.out_weight)
        normed = products.norm_of_sum(projected, layer.post_norm, residual)
        down = products.linear(products.activated(normed, layer), layer.down_weight)
        if not last:
            normed = products.norm_of_sum(down, weights.layers[index + 1].input_norm, residual)
    return products.final_norm(down, weights.final_norm, residual)


def _normed_heads(
    spec: ModelSpec,
    layer: LayerWeights,
    x: Rows,
    where: tuple[Tensor, ...],
    scales: tuple[Tensor, ...],
    products: Products,
    backend: str | None,
) -> Tensor:
    """`linear_rope_kv_write` with an RMSNorm over each head of q and k in front of the rotation (Qwen3)."""
    heads = products.linear(x, layer.qkv_weight, layer.qkv_bias).unflatten(1, (-1, spec.head_dim))
    q, k, v = heads.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
    norms = dict(q_norm=layer.q_norm, k_norm=layer.k_norm, norm_eps=spec.rms_norm_eps)
    write_heads(q, k, v, where, scales, **norms, backend=backend)
    return q
