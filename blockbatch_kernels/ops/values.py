"""Checks of values that lie on the device, which the host would have to wait for.

`BBK_CHECK=1` in the environment switches them on: for tests, and for decoders that are being written. Without
it the operators never look at such values, but for those of page tables in host memory, which cost no wait.
Nothing is checked while a CUDA graph is captured. What a check looks at comes to the host in one copy.

Each function raises ValueError that names the argument, what was expected and what came.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from blockbatch_kernels.structs import (
    AttentionPlan,
    BranchState,
    PagePool,
    Predictions,
    SamplingRules,
    StepPlan,
)


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


def _on_host(*tensors: Tensor) -> list[Tensor]:
    """Integers of one device in host memory, by one copy; some may come in a wider type."""
    if tensors[0].is_cpu:
        return list(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]


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
    planned = () if plan is None else (plan.token_row,)
    table, bounds, lengths, *planned = _on_host(page_table, cu_seqlens_q, seqlens_k, *planned)
    _check_ascending("cu_seqlens_q", bounds, num_tokens)
    queries, columns = bounds.diff(), table.shape[1]
    most = columns * page_size
    wrong = (queries > 0) & ((lengths < 0) | (lengths > most))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"seqlens_k: expected at most {most} keys, {columns} pages of {page_size}, "
            f"got {int(lengths[row])} in row {row}"
        )
    lengths = lengths * (queries > 0)
    limit = torch.iinfo(torch.int32).max if num_pages is None else num_pages
    first_key = torch.arange(columns, device="cpu") * page_size
    is_read = first_key < lengths.unsqueeze(1)
    _check_entries("page_table", table, is_read & ((table < 0) | (table >= limit)), limit)
    for token_row in planned:
        # A plan leaves out rows without keys, as it does padding.
        rows = torch.arange(len(lengths), device="cpu").masked_fill(lengths == 0, -1)
        expected = rows.repeat_interleave(queries)
        expected = F.pad(expected, (0, num_tokens - len(expected)), value=-1)
        if not torch.equal(token_row.long(), expected):
            raise ValueError("plan: expected one made of these cu_seqlens_q, got one of others")


def check_rope(positions: Tensor, slot_mapping: Tensor, cos: Tensor, k_cache: Tensor) -> None:
    """Positions that the tables have, slots that the caches have or -1."""
    if is_readable(positions):
        positions, slot_mapping = _on_host(positions, slot_mapping)
        _check_range("positions", positions, 0, cos.shape[0])
        _check_range("slot_mapping", slot_mapping, None, k_cache.shape[0] * k_cache.shape[1])


def check_tokens(name: str, tokens: Tensor, vocab_size: int) -> None:
    """Ids of the vocabulary."""
    if is_readable(tokens):
        _check_range(name, *_on_host(tokens), 0, vocab_size)


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
    tensors = (plan.query_start, plan.query_end, plan.predict, state.prompt_length, page_table)
    listed = (plan.query_position,) if scattered else ()
    start, end, predict, prompts, table, *listed = _on_host(*tensors, *listed)
    if int(prompts.max()) > state.prompt_tokens.shape[1]:
        raise ValueError(
            f"state.prompt_length: expected at most {state.prompt_tokens.shape[1]}, got {int(prompts.max())}"
        )
    length = table.shape[1] * page_size
    has_queries = start < end
    most = listed[0].shape[1] if scattered else length
    outside = has_queries & ((start < 0) | (end > most))
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        first, last = int(start[row]), int(end[row])
        if scattered:
            raise ValueError(
                f"plan.query_end: expected places from 0 to {most} of plan.query_position, "
                f"got {first} to {last} in row {row}"
            )
        raise _behind_the_pages(table, page_size, first, last - 1, row)
    rows, positions = _places(start, end)
    if scattered:
        positions = listed[0][rows, positions].long()
        outside = (positions < 0) | (positions >= length)
        if bool(outside.any()):
            row = int(rows[outside][0])
            low, high = (int(position) for position in positions[rows == row].aminmax())
            raise _behind_the_pages(table, page_size, low, high, row)
    missing = table[rows, positions // page_size] < 0
    if bool(missing.any()):
        row = int(rows[missing][0])
        pages = table[row, (positions[rows == row] // page_size).unique()].tolist()
        raise ValueError(f"page_table: expected a page for each query, got {pages} in row {row}")
    if len(rows) > capacity:
        raise ValueError(f"capacity: expected at least the plan's {len(rows)} query tokens, got {capacity}")
    target = positions + prediction_offset - prompts[rows // state.num_branches]
    inside = (target >= 0) & (target < state.gen_length)
    wanted = int(predict[rows[inside], target[inside]].sum())
    if wanted > predict_capacity:
        raise ValueError(
            f"predict_capacity: expected at least the plan's {wanted} predictions, got {predict_capacity}"
        )


def _behind_the_pages(table: Tensor, page_size: int, first: int, last: int, row: int) -> ValueError:
    columns = table.shape[1]
    return ValueError(
        f"plan.query_end: expected positions below {columns * page_size}, {columns} pages of {page_size}, "
        f"got {first} to {last} in row {row}"
    )


def _places(start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Row and place of everything from a row's start to its end, row after row."""
    start = start.long()
    counts = (end.long() - start).clamp(min=0)
    rows = torch.arange(len(start), device="cpu").repeat_interleave(counts)
    before = counts.cumsum(0) - counts
    return rows, torch.arange(len(rows), device="cpu") + (start - before)[rows]


def check_sources(source_row: Tensor, num_rows: int) -> None:
    """Rows of the table, or -1."""
    if is_readable(source_row):
        _check_range("source_row", *_on_host(source_row), -1, num_rows)


def check_predictions(state: BranchState, predictions: Predictions) -> None:
    """Targets that are there, each once, or -1."""
    if not is_readable(predictions.target):
        return
    (target,) = _on_host(predictions.target)
    _check_range("predictions.target", target, -1, state.tokens.numel())
    repeated = _repeated(target[target >= 0])
    if len(repeated):
        raise ValueError(f"predictions.target: expected each position once, got {int(repeated[0])} twice")


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
    num_pages, page_size = kv_cache.shape[2:4]
    listed = () if write_positions is None else (write_positions,)
    free_pages = () if pool is None else (pool.free_pages,)
    table, start, end, *others = _on_host(page_table, write_start, write_end, *listed, *free_pages)
    if pool is None:
        _check_own_pages(table, num_branches)
    else:
        _check_entries("page_table", table, table >= num_pages, num_pages)
        _check_range("pool.free_pages", others[-1], 0, num_pages)
        if len(_repeated(others[-1])):
            raise ValueError("pool.free_pages: expected each page once, got some more than once")
    if ENABLED:
        _check_writes(start, end, others[0] if listed else None, table.shape[1] * page_size)


def _check_own_pages(table: Tensor, num_branches: int) -> None:
    num_rows, columns = table.shape
    rows = torch.arange(num_rows, device="cpu").unsqueeze(1)
    row_of_page = torch.div(table, max(columns, 1), rounding_mode="floor")
    is_own = table % max(columns, 1) == torch.arange(columns, device="cpu")
    is_own &= row_of_page // num_branches == rows // num_branches
    foreign = (table >= 0) & ~is_own
    if bool(foreign.any()):
        row, column = foreign.nonzero()[0].tolist()
        raise ValueError(
            f"page_table: expected -1 or a page of the fixed pool, (request * {num_branches} + k) * "
            f"{columns} + column, got {int(table[row, column])} in row {row}, column {column}; ids "
            "of another allocator need pool="
        )


def _check_writes(start: Tensor, end: Tensor, positions: Tensor | None, length: int) -> None:
    most = length if positions is None else positions.shape[1]
    writes = start < end
    _check_range("write_start", start[writes], 0, most)
    _check_range("write_end", end[writes], 0, most + 1)
    if positions is None:
        return
    rows, places = _places(start, end)
    listed = positions[rows, places]
    _check_range("write_positions", listed, 0, length)
    falls = (rows[1:] == rows[:-1]) & (listed[1:] <= listed[:-1])
    if bool(falls.any()):
        row = int(rows[1:][falls][0])
        raise ValueError(
            f"write_positions: expected ascending positions, got {listed[rows == row].tolist()} in row {row}"
        )


def _repeated(values: Tensor) -> Tensor:
    """Those that are there more than once."""
    values = values.sort().values
    return values[1:][values[1:] == values[:-1]]


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


def check_sampling(
    rules: SamplingRules, request: Tensor, probe_tokens: Tensor | None, vocab_size: int
) -> None:
    """Requests that there are, ids of the vocabulary, each changed one once."""
    if not is_readable(request):
        return
    given, changed = _on_host(request, rules.changed_token)
    _check_range("request", given, 0, rules.temperature.shape[0])
    _check_range("rules.changed_token", changed, 0, vocab_size)
    if len(_repeated(changed)):
        raise ValueError("rules.changed_token: expected each id once, got some more than once")
    if probe_tokens is not None:
        check_tokens("probe_tokens", probe_tokens, vocab_size)
