"""Checks of values that lie on the device, which the host would have to wait for.

`BBK_CHECK=1` in the environment switches them on: for tests, and for decoders that are being written. Without
it the operators never look at such values, but for those of page tables in host memory, which cost no wait.
Nothing is checked while a CUDA graph is captured.

Each function raises ValueError that names the argument, what was expected and what came.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from blockbatch_kernels.structs import AttentionPlan, BranchState, PagePool, Predictions, StepPlan


def _is_asked_for() -> bool:
    value = os.environ.get("BBK_CHECK", "0")
    if value not in ("0", "1", ""):
        raise ValueError(f"BBK_CHECK: expected 0 or 1, got {value!r}")
    return value == "1"


ENABLED = _is_asked_for()


def is_readable(tensor: Tensor) -> bool:
    """Whether the host can look at the values now."""
    if tensor.is_cuda:
        with torch.cuda.device_of(tensor):  # whose stream is asked
            return not torch.cuda.is_current_stream_capturing()
    return tensor.is_cpu


def check_attention(
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    page_size: int,
    num_tokens: int,
    num_pages: int | None = None,
    plan: AttentionPlan | None = None,
) -> None:
    """Queries that follow each other, keys and pages that are there, and a plan of these very queries.

    A row without queries may have any length and pages.
    """
    if not is_readable(page_table):
        return
    _check_ascending("cu_seqlens_q", cu_seqlens_q, num_tokens)
    bounds, lengths = cu_seqlens_q.tolist(), seqlens_k.tolist()
    columns = page_table.shape[1]
    for row, length in enumerate(lengths):
        if bounds[row] == bounds[row + 1]:
            lengths[row] = 0
        elif not 0 <= length <= columns * page_size:
            raise ValueError(
                f"seqlens_k: expected at most {columns * page_size} keys, {columns} pages of {page_size}, "
                f"got {length} in row {row}"
            )
    read = torch.tensor([-(-length // page_size) for length in lengths]).unsqueeze(1)
    read = (torch.arange(columns) < read).to(page_table.device)
    limit = torch.iinfo(torch.int32).max if num_pages is None else num_pages
    _check_entries("page_table", page_table, read & ((page_table < 0) | (page_table >= limit)), limit)
    if plan is not None:
        rows = torch.tensor([bounds[row + 1] - bounds[row] for row in range(len(lengths))])
        expected = torch.full((num_tokens,), -1, dtype=torch.int32)
        expected[: bounds[-1]] = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(rows)
        if plan.token_row.shape != expected.shape or not torch.equal(plan.token_row.cpu(), expected):
            raise ValueError("plan: expected one made of these cu_seqlens_q, got one of others")


def check_rope(positions: Tensor, slot_mapping: Tensor, cos: Tensor, k_cache: Tensor) -> None:
    """Positions that the tables have, slots that the caches have or -1."""
    if is_readable(positions):
        _check_range("positions", positions, 0, cos.shape[0])
        _check_range("slot_mapping", slot_mapping, None, k_cache.shape[0] * k_cache.shape[1])


def check_tokens(name: str, tokens: Tensor, vocab_size: int) -> None:
    """Ids of the vocabulary."""
    if is_readable(tokens):
        _check_range(name, tokens, 0, vocab_size)


def check_packing(
    state: BranchState,
    plan: StepPlan,
    page_table: Tensor,
    page_size: int,
    capacity: int,
    predict_capacity: int,
    prediction_offset: int,
    scattered: bool,
) -> None:
    """Queries inside of the row's pages, and room for all of them."""
    if not is_readable(page_table):
        return
    starts, ends = plan.query_start.tolist(), plan.query_end.tolist()
    table, length = page_table.cpu(), page_table.shape[1] * page_size
    total = wanted = 0
    predict, prompts = plan.predict.cpu(), state.prompt_length.tolist()
    longest = max(prompts)
    if longest > state.prompt_tokens.shape[1]:
        raise ValueError(
            f"state.prompt_length: expected at most {state.prompt_tokens.shape[1]}, got {longest}"
        )
    for row, (start, end) in enumerate(zip(starts, ends)):
        if end <= start:
            continue
        total += end - start
        if scattered:
            most = plan.query_position.shape[1]
            if start < 0 or end > most:
                raise ValueError(
                    f"plan.query_end: expected places from 0 to {most} of plan.query_position, got {start} "
                    f"to {end} in row {row}"
                )
            positions = plan.query_position[row, start:end].cpu()
            first, last = int(positions.min()), int(positions.max())
        else:
            positions, first, last = torch.arange(start, end), start, end - 1
        if first < 0 or last >= length:
            raise ValueError(
                f"plan.query_end: expected positions below {length}, {page_table.shape[1]} pages of "
                f"{page_size}, got {first} to {last} in row {row}"
            )
        target = positions + prediction_offset - prompts[row // state.num_branches]
        target = target[(target >= 0) & (target < state.gen_length)]
        wanted += int(predict[row, target.long()].sum())
        columns = (positions // page_size).unique().long()
        if int(table[row, columns].min()) < 0:
            raise ValueError(
                f"page_table: expected a page for each query, got {table[row, columns].tolist()} in row {row}"
            )
    if total > capacity:
        raise ValueError(f"capacity: expected at least the plan's {total} query tokens, got {capacity}")
    if wanted > predict_capacity:
        raise ValueError(
            f"predict_capacity: expected at least the plan's {wanted} predictions, got {predict_capacity}"
        )


def check_sources(source_row: Tensor, num_rows: int) -> None:
    """Rows of the table, or -1."""
    if is_readable(source_row):
        _check_range("source_row", source_row, -1, num_rows)


def check_predictions(state: BranchState, predictions: Predictions) -> None:
    """Targets that are there, each once, or -1."""
    target = predictions.target
    if not is_readable(target):
        return
    _check_range("predictions.target", target, -1, state.tokens.numel())
    real = target[target >= 0]
    if real.numel() != real.unique().numel():
        twice = int(real[(real.unsqueeze(1) == real).sum(1) > 1][0])
        raise ValueError(f"predictions.target: expected each position once, got {twice} twice")


def check_pages(
    kv_cache: Tensor,
    page_table: Tensor,
    write_start: Tensor,
    write_end: Tensor,
    num_branches: int,
    write_positions: Tensor | None,
    pool: PagePool | None,
) -> None:
    """Pages of the pool; in host memory even where `ENABLED` is false."""
    if not (ENABLED or page_table.is_cpu) or not is_readable(page_table):
        return
    num_rows, columns = page_table.shape
    num_pages = kv_cache.shape[2]
    if pool is None:
        rows = torch.arange(num_rows, device=page_table.device).unsqueeze(1)
        row_of_page = torch.div(page_table, max(columns, 1), rounding_mode="floor")
        is_own = page_table % max(columns, 1) == torch.arange(columns, device=page_table.device)
        is_own &= row_of_page // num_branches == rows // num_branches
        foreign = (page_table >= 0) & ~is_own
        if bool(foreign.any()):
            row, column = foreign.nonzero()[0].tolist()
            raise ValueError(
                f"page_table: expected -1 or a page of the fixed pool, (request * {num_branches} + k) * "
                f"{columns} + column, got {int(page_table[row, column])} in row {row}, column {column}; ids "
                "of another allocator need pool="
            )
    else:
        _check_entries("page_table", page_table, page_table >= num_pages, num_pages)
        _check_range("pool.free_pages", pool.free_pages, 0, num_pages)
        if pool.free_pages.unique().numel() != pool.free_pages.numel():
            raise ValueError("pool.free_pages: expected each page once, got some more than once")
    if ENABLED:
        _check_writes(write_start, write_end, write_positions, columns * kv_cache.shape[3])


def _check_writes(start: Tensor, end: Tensor, positions: Tensor | None, length: int) -> None:
    most = length if positions is None else positions.shape[1]
    writes = start < end
    _check_range("write_start", start[writes], 0, most)
    _check_range("write_end", end[writes], 0, most + 1)
    if positions is None:
        return
    for row in writes.nonzero().flatten().tolist():
        listed = positions[row, int(start[row]) : int(end[row])]
        _check_range("write_positions", listed, 0, length)
        if bool((listed[1:] <= listed[:-1]).any()):
            raise ValueError(
                f"write_positions: expected ascending positions, got {listed.tolist()} in row {row}"
            )


def _check_ascending(name: str, bounds: Tensor, most: int) -> None:
    values = bounds.tolist()
    if values[0] != 0 or values[-1] > most or any(b < a for a, b in zip(values, values[1:])):
        raise ValueError(f"{name}: expected ascending values from 0 to at most {most}, got {values}")


def _check_range(name: str, tensor: Tensor, least: int | None, limit: int) -> None:
    if tensor.numel() == 0:
        return
    low, high = (int(value) for value in tensor.aminmax())
    if (least is None or low >= least) and high < limit:
        return
    expected = f"values below {limit}" if least is None else f"values from {least} to {limit - 1}"
    raise ValueError(f"{name}: expected {expected}, got {high if high >= limit else low}")


def _check_entries(name: str, table: Tensor, wrong: Tensor, limit: int) -> None:
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: expected pages from 0 to {limit - 1}, got {int(table[row, column])} in row {row}, "
            f"column {column}"
        )
