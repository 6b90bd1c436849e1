"""Whole rows as a pack of queries, a page for each row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.models.spec import ModelSpec


def pages_of_rows(num_layers: int, ids: Tensor, spec: ModelSpec, dtype: torch.dtype) -> Tensor:
    """[num_layers, 2, rows, length, num_kv_heads, head_dim]: a page for each of the rows [rows, length]."""
    shape = (num_layers, 2, *ids.shape, spec.num_kv_heads, spec.head_dim)
    return torch.zeros(shape, dtype=dtype, device=ids.device)


def packed_rows(ids: Tensor, block_size: int | None) -> tuple[bbk.PackedQueries, Tensor, Tensor]:
    """All positions of the rows.

    Args:
        ids: [rows, length] integers.
        block_size: of a block-causal mask; None: attention is bidirectional.

    Returns:
        the queries, a page table of one column, and the keys that each of its rows sees. A block of a row is
        a row of its own for the attention, which sees the page as far as the block reaches.
    """
    (rows, length), device = ids.shape, ids.device
    size = length if block_size is None else block_size
    ends = torch.tensor([min(start + size, length) for start in range(0, length, size)], device="cpu")
    blocks = len(ends)
    lengths = torch.diff(ends, prepend=ends.new_zeros(1)).repeat(rows)
    index = torch.arange(rows * length, device=device)
    packed = bbk.PackedQueries(
        input_ids=ids.flatten().int(),
        positions=(index % length).int(),
        row_index=torch.arange(rows * blocks, device="cpu")
        .repeat_interleave(lengths)
        .to(device, torch.int32),
        cu_seqlens_q=F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32),
        slot_mapping=index,
        predict_index=index,
        predict_target=index,
    )
    page_table = torch.arange(rows, dtype=torch.int32, device=device).repeat_interleave(blocks).unsqueeze(1)
    return packed, page_table, ends.repeat(rows).to(device, torch.int32)
