"""Packs of one forward put together, and predictions of several forwards."""

from __future__ import annotations

import torch
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.decoding.slot_pages import PagesView


def side_by_side(
    first: bbk.PackedQueries, second: bbk.PackedQueries, view: PagesView, seqlens_k: Tensor
) -> tuple[bbk.PackedQueries, PagesView, Tensor]:
    """Two packs of the same rows as one, whose rows are those of the first and then those of the second.

    Between them stand the rows of a request without keys, which the padding of the first pack falls to.

    Args:
        view, seqlens_k: of the rows.

    Returns:
        The pack, and what its rows read.
    """
    tokens, between = first.input_ids.shape[0], view.num_branches
    rows = view.page_table.shape[0] + between
    no_tokens = first.cu_seqlens_q.new_full((between - 1,), tokens)
    second = second._replace(
        row_index=torch.where(second.row_index < 0, -1, second.row_index + rows),
        cu_seqlens_q=torch.cat((no_tokens, second.cu_seqlens_q + tokens)),
        predict_index=second.predict_index + tokens,
    )
    packed = bbk.PackedQueries(*(torch.cat(pair) for pair in zip(first, second, strict=True)))
    table = torch.cat((view.page_table, view.page_table[:between], view.page_table))
    lengths = torch.cat((seqlens_k, torch.zeros_like(seqlens_k[:between]), seqlens_k))
    return packed, view._replace(page_table=table), lengths


def joined(parts: list[bbk.Predictions]) -> bbk.Predictions:
    """The predictions of several forwards."""
    if len(parts) == 1:
        return parts[0]
    columns = []
    for tensors in zip(*parts, strict=True):
        given = [tensor for tensor in tensors if tensor is not None]
        # Whoever needs probabilities of probes was there when they were asked for.
        filled = [
            given[0].new_zeros(len(part.target)) if tensor is None else tensor
            for part, tensor in zip(parts, tensors, strict=True)
            if given
        ]
        columns.append(torch.cat(filled) if given else None)
    return bbk.Predictions(*columns)
