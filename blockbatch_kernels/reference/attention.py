"""Rotary embedding with the cache write, and attention of packed queries over paged keys."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

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
) -> None:
    cos, sin = (_angles(table, positions).unsqueeze(1) for table in (cos, sin))
    num_slots = k_cache.shape[0] * k_cache.shape[1]
    stored = (slot_mapping >= 0) & (slot_mapping < num_slots)
    all_stored = bool(stored.all())
    if not all_stored and slot_mapping.is_cpu and int(slot_mapping.max()) >= num_slots:
        raise ValueError(f"slot_mapping: expected values below {num_slots}, got {int(slot_mapping.max())}")
    q.copy_(_rotate(q, cos, sin))
    k = _rotate(k, cos, sin)
    if not all_stored:
        slot_mapping, k, v = slot_mapping[stored], k[stored], v[stored]
    # By page and offset: the cache may be a view that cannot be flattened without a copy.
    page_size = k_cache.shape[1]
    place = slot_mapping // page_size, slot_mapping % page_size
    k_cache[place] = k
    v_cache[place] = v


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
    num_kv_heads, head_dim = k_cache.shape[2:]
    out = torch.zeros_like(q)
    spans = list(_spans(cu_seqlens_q, seqlens_k))
    if softmax_scale < 0:  # torch's kernels for GPUs give NaN
        q, softmax_scale = -q, -softmax_scale
    # One row at a time: a row's result then has the same shape, and so the same bits, whatever else is in the
    # batch.
    most = page_table.shape[1] * k_cache.shape[1]
    for row, start, end, length in spans:
        if not 0 < length <= most:
            raise ValueError(
                f"seqlens_k: expected at most {most} keys, {page_table.shape[1]} pages of "
                f"{k_cache.shape[1]}, got {length} in row {row}"
            )
        keys, values = (_of_row(cache, page_table[row], length) for cache in (k_cache, v_cache))
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
        for row, start, end, length in spans:
            keys = _of_row(k_cache, page_table[row], length).float().unsqueeze(2)
            queries = q[start:end].float().unflatten(1, (num_kv_heads, -1))
            scores = torch.einsum("thgd,hlgd->thgl", queries, keys.expand(-1, -1, queries.shape[2], -1))
            has_no_softmax = (scores * softmax_scale).softmax(-1).isnan().any(-1).flatten(1)
            out[start:end].masked_fill_(has_no_softmax.unsqueeze(-1), float("nan"))
    return out


def _spans(cu_seqlens_q: Tensor, seqlens_k: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Row, its first query and the one behind its last, and its keys, of the rows that have both."""
    bounds = cu_seqlens_q.tolist()
    for row, length in enumerate(seqlens_k.tolist()):
        if bounds[row] < bounds[row + 1] and length != 0:
            yield row, bounds[row], bounds[row + 1], length


def _of_row(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    """[kv_heads, length, head_dim]: the keys or values on a row's pages."""
    used = pages[: -(-length // cache.shape[1])].long()
    return cache[used].flatten(0, 1)[:length].transpose(0, 1)
