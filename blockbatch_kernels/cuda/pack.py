"""Packing of the query tokens."""

import torch
from torch import Tensor

from blockbatch_kernels.cuda import extension
from blockbatch_kernels.structs import BranchState, PackedQueries, StepPlan


def pack_windows(
    state: BranchState,
    plan: StepPlan,
    page_table: Tensor,
    *,
    page_size: int,
    capacity: int,
    predict_capacity: int,
    prediction_offset: int,
    scattered: bool = False,
) -> PackedQueries:
    """See `blockbatch_kernels.ops.pack_windows`. One launch.

    The tensors are contiguous but for the row stride of `page_table`. Tokens and predictions beyond the
    capacities are left out; a query behind the row's pages has slot -1.
    """

    def empty(size: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=page_table.device)

    packed = PackedQueries(
        input_ids=empty(capacity, torch.int32),
        positions=empty(capacity, torch.int32),
        row_index=empty(capacity, torch.int32),
        cu_seqlens_q=empty(state.num_rows + 1, torch.int32),
        slot_mapping=empty(capacity, torch.int64),
        predict_index=empty(predict_capacity, torch.int64),
        predict_target=empty(predict_capacity, torch.int64),
    )
    extension.load().pack_windows(
        state=state,
        plan=plan,
        page_table=page_table,
        packed=packed,
        page_size=page_size,
        prediction_offset=prediction_offset,
        scattered=scattered,
        stream=extension.stream_of(page_table),
    )
    return packed
