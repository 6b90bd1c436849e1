"""The query tokens of all rows, back to back: a count for each row, then everything in a second launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockbatch_kernels.structs import BranchState, PackedQueries, StepPlan
from blockbatch_kernels.triton.rows import CHUNK, check_contiguous, device_of, kernel, state_tensors

_BLOCK = 256


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
    device, num_rows, gen_length = state.tokens.device, state.num_rows, state.gen_length
    tensors = state_tensors(state)
    check_contiguous("plan", plan)

    def empty(size: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    packed = PackedQueries(
        input_ids=empty(capacity),
        positions=empty(capacity),
        row_index=empty(capacity),
        cu_seqlens_q=empty(num_rows + 1),
        slot_mapping=empty(capacity, torch.int64),
        predict_index=empty(predict_capacity, torch.int64),
        predict_target=empty(predict_capacity, torch.int64),
    )
    prediction_counts = empty(num_rows)
    max_prompt = state.prompt_tokens.shape[1]
    sizes = {
        "num_branches": state.num_branches,
        "gen_length": gen_length,
        "prediction_offset": prediction_offset,
        "capacity": capacity,
        "SCATTERED": scattered,
        # Open queries count by their places, of which there is one more than positions.
        "COLUMNS": triton.next_power_of_2(gen_length + scattered),
    }
    # A row has as many blocks of positions as its canvas may need; those behind its queries end at once.
    blocks = triton.cdiv(gen_length + 1 if scattered else max_prompt + gen_length, _BLOCK)
    with device_of(state.tokens):
        _count_kernel[(num_rows,)](tensors, plan, prediction_counts, **sizes)
        _pack_kernel[(num_rows + 1, blocks)](
            tensors,
            plan,
            page_table,
            *page_table.stride(),
            page_table.shape[1],
            prediction_counts,
            packed,
            num_rows,
            max_prompt,
            page_size,
            predict_capacity,
            BLOCK=_BLOCK,
            **sizes,
        )
    return packed


@triton.jit
def _tokens_before(plan, row):
    """Packed tokens of all rows before `row`."""
    tokens = 0
    for first in range(0, row, CHUNK):
        rows = first + tl.arange(0, CHUNK)
        starts = tl.load(plan.query_start + rows, mask=rows < row, other=0)
        tokens += tl.sum(tl.load(plan.query_end + rows, mask=rows < row, other=0) - starts, 0)
    return tokens


@triton.jit
def _predicting(
    state,
    plan,
    row,
    first_token,
    column,
    num_branches,
    gen_length,
    prediction_offset,
    capacity,
    SCATTERED: tl.constexpr,
):
    """[G] each: whether one of the row's packed queries predicts a target, the query's index, and the target.

    Columns are targets; with scattered queries they are places.
    """
    start, end = tl.load(plan.query_start + row), tl.load(plan.query_end + row)
    if SCATTERED:
        query = column
        position = _scattered(plan, row, column, (column >= start) & (column < end), gen_length)
        target = position - tl.load(state.prompt_length + row // num_branches) + prediction_offset
    else:
        target = column
        query = target + tl.load(state.prompt_length + row // num_branches) - prediction_offset
    index = first_token + query - start
    predict = plan.predict + row.to(tl.int64) * gen_length + target
    is_target = target < gen_length
    if SCATTERED:
        is_target &= target >= 0
    wanted = tl.load(predict, mask=is_target, other=False) != 0
    return wanted & (query >= start) & (query < end) & (index < capacity), index, target


@triton.jit
def _scattered(plan, row, place, valid, gen_length):
    """The canvas positions of open queries."""
    return tl.load(plan.query_position + row.to(tl.int64) * (gen_length + 1) + place, mask=valid, other=0)


@kernel
def _count_kernel(
    state,
    plan,
    prediction_counts,
    num_branches,
    gen_length,
    prediction_offset,
    capacity,
    SCATTERED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column = tl.program_id(0), tl.arange(0, COLUMNS)
    first_token = _tokens_before(plan, row)
    wanted, _, _ = _predicting(
        state,
        plan,
        row,
        first_token,
        column,
        num_branches,
        gen_length,
        prediction_offset,
        capacity,
        SCATTERED,
    )
    tl.store(prediction_counts + row, tl.sum(wanted.to(tl.int32), 0))


@kernel
def _pack_kernel(
    state,
    plan,
    page_table,
    table_row_stride,
    table_column_stride,
    pages_per_row,
    prediction_counts,
    packed,
    num_rows,
    max_prompt,
    page_size,
    predict_capacity,
    num_branches,
    gen_length,
    prediction_offset,
    capacity,
    BLOCK: tl.constexpr,
    SCATTERED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, block = tl.program_id(0), tl.program_id(1)
    first_token = _tokens_before(plan, row)
    first_prediction = 0
    for first in range(0, row, CHUNK):
        rows = first + tl.arange(0, CHUNK)
        first_prediction += tl.sum(tl.load(prediction_counts + rows, mask=rows < row, other=0), 0)
    if block == 0:
        tl.store(packed.cu_seqlens_q + row, first_token)

    # One row of programs stands behind the rows.
    if row == num_rows:
        _fill_padding(packed, first_token, first_prediction, block, capacity, predict_capacity, BLOCK)
    else:
        start, end = tl.load(plan.query_start + row), tl.load(plan.query_end + row)
        position = start + block * BLOCK + tl.arange(0, BLOCK)
        index = first_token + position - start
        valid = (position < end) & (index < capacity)
        if SCATTERED:
            position = _scattered(plan, row, position, valid, gen_length)
        generated = position - tl.load(state.prompt_length + row // num_branches)
        # What lies outside of prompt, canvas and pages is a caller's mistake, and not read.
        prompt_at = (row // num_branches).to(tl.int64) * max_prompt + tl.minimum(position, max_prompt - 1)
        prompt_id = tl.load(state.prompt_tokens + prompt_at, mask=valid & (generated < 0), other=0)
        generated_at = row.to(tl.int64) * gen_length + tl.minimum(generated, gen_length - 1)
        generated_id = tl.load(state.tokens + generated_at, mask=valid & (generated >= 0), other=0)
        page_at = (position // page_size).to(tl.int64) * table_column_stride
        has_page = valid & (position >= 0) & (position // page_size < pages_per_row)
        page = tl.load(page_table + row.to(tl.int64) * table_row_stride + page_at, mask=has_page, other=0)
        slot = tl.where(has_page, page.to(tl.int64) * page_size + position % page_size, -1)
        tl.store(packed.input_ids + index, tl.where(generated < 0, prompt_id, generated_id), mask=valid)
        tl.store(packed.positions + index, position, mask=valid)
        tl.store(packed.row_index + index, tl.zeros_like(index) + row, mask=valid)
        tl.store(packed.slot_mapping + index, slot, mask=valid)
        if block == 0:
            column = tl.arange(0, COLUMNS)
            wanted, query, target = _predicting(
                state,
                plan,
                row,
                first_token,
                column,
                num_branches,
                gen_length,
                prediction_offset,
                capacity,
                SCATTERED,
            )
            rank = first_prediction + tl.cumsum(wanted.to(tl.int32), 0) - 1
            wanted &= rank < predict_capacity
            tl.store(packed.predict_index + rank, query.to(tl.int64), mask=wanted)
            tl.store(packed.predict_target + rank, row.to(tl.int64) * gen_length + target, mask=wanted)


@triton.jit
def _fill_padding(packed, tokens, predictions, block, capacity, predict_capacity, BLOCK: tl.constexpr):
    step = tl.num_programs(1) * BLOCK
    lane = block * BLOCK + tl.arange(0, BLOCK)
    for first in range(tokens, capacity, step):
        index = first + lane
        padding = index < capacity
        tl.store(packed.input_ids + index, tl.zeros_like(index), mask=padding)
        tl.store(packed.positions + index, tl.zeros_like(index), mask=padding)
        tl.store(packed.row_index + index, tl.full(index.shape, -1, tl.int32), mask=padding)
        tl.store(packed.slot_mapping + index, tl.full(index.shape, -1, tl.int64), mask=padding)
    for first in range(predictions, predict_capacity, step):
        index = first + lane
        padding = index < predict_capacity
        tl.store(packed.predict_index + index, tl.zeros_like(index).to(tl.int64), mask=padding)
        tl.store(packed.predict_target + index, tl.full(index.shape, -1, tl.int64), mask=padding)
