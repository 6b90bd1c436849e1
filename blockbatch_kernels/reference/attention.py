"""Rotary embedding with the cache write, and attention of packed queries over paged keys."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from blockbatch_kernels.reference.norm import rms_norm
from blockbatch_kernels.structs import AttentionPlan


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates halves in fp32: x [tokens, heads, head_dim], cos and sin [tokens, 1, head_dim / 2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _angles(table: Tensor, positions: Tensor) -> Tensor:
    """Rows of `table`: refused where one is not there, but on a GPU, where that would take a wait, NaN."""
    if table.is_cpu:
        try:
            return torch.index_select(table, 0, positions)
        except (IndexError, RuntimeError):
            low, high = (int(value) for value in positions.aminmax())
            raise ValueError(
                f"positions: expected values from 0 to {len(table) - 1}, got {low} to {high}"
            ) from None
    exists = (positions >= 0) & (positions < len(table))
    padded = F.pad(table, (0, 0, 0, 1), value=float("nan"))
    return padded[torch.where(exists, positions, len(table)).long()]


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
) -> None:
    write_heads(q, k, v, positions, slot_mapping, cos, sin, k_cache, v_cache, q_norm, k_norm, norm_eps)


def write_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    norm_eps: float,
    stored_as: Callable[[Tensor, int], Tensor] = lambda heads, _: heads,
) -> None:
    """`rope_kv_write`; `stored_as` turns heads of k (0) and of v (1) into elements of their cache."""
    cos, sin = (_angles(table, positions).unsqueeze(1) for table in (cos, sin))
    num_slots = k_cache.shape[0] * k_cache.shape[1]
    stored = (slot_mapping >= 0) & (slot_mapping < num_slots)
    all_stored = bool(stored.all())
    if not all_stored and slot_mapping.is_cpu and int(slot_mapping.max()) >= num_slots:
        raise ValueError(f"slot_mapping: expected values below {num_slots}, got {int(slot_mapping.max())}")
    normed_q = q if q_norm is None else rms_norm(q, q_norm, eps=norm_eps)
    q.copy_(_rotate(normed_q, cos, sin))
    k = _rotate(k if k_norm is None else rms_norm(k, k_norm, eps=norm_eps), cos, sin)
    if not all_stored:
        slot_mapping, k, v = slot_mapping[stored], k[stored], v[stored]
    # By page and offset: the cache may be a view that cannot be flattened without a copy.
    page_size = k_cache.shape[1]
    place = slot_mapping // page_size, slot_mapping % page_size
    k_cache[place] = stored_as(k, 0)
    v_cache[place] = stored_as(v, 1)


def varlen_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    softmax_scale: float,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """`plan` only says how compiled versions divide the work; it has no influence here."""
    return attend(q, k_cache, v_cache, page_table, cu_seqlens_q, seqlens_k, softmax_scale)


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    softmax_scale: float,
    value_of: Callable[[Tensor, int], Tensor] = lambda stored, _: stored,
) -> Tensor:
    """`varlen_attention`; `value_of` turns elements of the cache of k (0) and of v (1), [keys, num_kv_heads,
    head_dim], into numbers of the dtype of q."""
    num_kv_heads, head_dim = k_cache.shape[2:]
    out = torch.zeros_like(q)
    page_size = k_cache.shape[1]
    bounds, lengths = cu_seqlens_q.tolist(), seqlens_k.tolist()
    if softmax_scale < 0:  # torch's kernels for GPUs give NaN
        q, softmax_scale = -q, -softmax_scale
    # One row at a time: a row's result then has the same shape, and so the same bits, whatever else is in the
    # batch.
    for row, length in enumerate(lengths):
        start, end = bounds[row], bounds[row + 1]
        if start == end or length == 0:
            continue
        if not 0 < length <= page_table.shape[1] * page_size:
            raise ValueError(
                f"seqlens_k: expected at most {page_table.shape[1] * page_size} keys, {page_table.shape[1]} "
                f"pages of {page_size}, got {length} in row {row}"
            )
        pages = page_table[row, : -(-length // page_size)].long()
        keys, values = (
            value_of(cache[pages].flatten(0, 1)[:length], side).transpose(0, 1)
            for side, cache in enumerate((k_cache, v_cache))
        )  # [kv_heads, length, head_dim]
        # Nothing is causal, so the query heads of one kv head are simply more queries.
        queries = q[start:end].unflatten(1, (num_kv_heads, -1)).transpose(0, 1).flatten(1, 2)
        attended = F.scaled_dot_product_attention(
            queries[None], keys[None], values[None], scale=softmax_scale
        )[0]
        out[start:end] = (
            attended.unflatten(1, (end - start, -1)).transpose(0, 1).reshape(end - start, -1, head_dim)
        )
    # torch's kernels for CPUs take a query whose scores are all NaN or infinite for one that is to see no
    # key, and give zeros.
    if not out[..., 0].all():
        _restore_nan(out, q, k_cache, page_table, bounds, lengths, softmax_scale, value_of)
    return out


def _restore_nan(
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    page_table: Tensor,
    bounds: list[int],
    lengths: list[int],
    softmax_scale: float,
    value_of: Callable[[Tensor, int], Tensor],
) -> None:
    """Writes NaN to `out` where the scores of a query have no softmax."""
    page_size, num_kv_heads = k_cache.shape[1:3]
    for row, length in enumerate(lengths):
        start, end = bounds[row], bounds[row + 1]
        if start == end or length == 0:
            continue
        pages = page_table[row, : -(-length // page_size)].long()
        keys = value_of(k_cache[pages].flatten(0, 1)[:length], 0).float()  # [length, kv_heads, head_dim]
        queries = q[start:end].float().unflatten(1, (num_kv_heads, -1))
        scores = torch.einsum("thgd,lhd->thgl", queries, keys) * softmax_scale
        lost = scores.softmax(-1).isnan().any(-1).flatten(1)  # [tokens, num_heads]
        out[start:end].masked_fill_(lost.unsqueeze(-1), float("nan"))
