"""Packing of the query tokens."""

import torch
from torch import Tensor

from blockbatch_kernels.cuda import extension
from blockbatch_kernels.cuda.placement import launch_on, require_contiguous
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
) -> PackedQueries:
    """See `blockbatch_kernels.ops.pack_windows`. One launch.

    The tensors are contiguous but for the row stride of `page_table`. Tokens and predictions beyond the
    capacities are left out; a query behind the row's pages has slot -1.
    """
    for name in ("prompt_tokens", "prompt_length", "tokens"):
        require_contiguous(f"state.{name}", getattr(state, name))
    for name in ("query_start", "query_end", "predict"):
        require_contiguous(f"plan.{name}", getattr(plan, name))
    if page_table.shape[1] > 1 and page_table.stride(1) != 1:
        raise ValueError(f"page_table: expected a last stride of 1, got {page_table.stride(1)}")

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
        prompt_tokens=state.prompt_tokens.data_ptr(),
        prompt_length=state.prompt_length.data_ptr(),
        tokens=state.tokens.data_ptr(),
        query_start=plan.query_start.data_ptr(),
        query_end=plan.query_end.data_ptr(),
        predict=plan.predict.data_ptr(),
        page_table=page_table.data_ptr(),
        page_table_stride=page_table.stride(0),
        **{name: tensor.data_ptr() for name, tensor in packed._asdict().items()},
        capacity=capacity,
        predict_capacity=predict_capacity,
        num_rows=state.num_rows,
        num_branches=state.num_branches,
        gen_length=state.gen_length,
        max_prompt=state.prompt_tokens.shape[1],
        pages_per_row=page_table.shape[1],
        page_size=page_size,
        prediction_offset=prediction_offset,
        **launch_on(page_table),
    )
    return packed
