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

    Args:
        first: without padding among its tokens.
        view, seqlens_k: of the rows.

    Returns:
        The pack, and what its rows read.
    """
    tokens, rows = first.input_ids.shape[0], view.page_table.shape[0]
    second = second._replace(
        row_index=torch.where(second.row_index < 0, -1, second.row_index + rows),
        cu_seqlens_q=second.cu_seqlens_q[1:] + tokens,
        predict_index=second.predict_index + tokens,
    )
    packed = bbk.PackedQueries(*(torch.cat(pair) for pair in zip(first, second, strict=True)))
    table = view.page_table.repeat(2, 1)
    return packed, view._replace(page_table=table), seqlens_k.repeat(2)


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
