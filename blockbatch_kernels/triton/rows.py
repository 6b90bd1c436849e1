"""What the decoding kernels share: one program works on all rows of a request, as tiles [N, G].

`N` and `G` are padded to powers of two. The padding holds neither MASK nor EOS, and its rows are done. What
one row needs of another comes by a reduction over the tile, so that no phase waits for memory.
"""

from collections import namedtuple
from dataclasses import fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from blockbatch_kernels.structs import BranchState

StateTensors = namedtuple("StateTensors", [field.name for field in fields(BranchState)])

# A kernel is compiled once for all batches: neither for these sizes nor for the alignment of these records.
kernel = triton.jit(
    do_not_specialize=(
        "num_requests",
        "num_rows",
        "num_branches",
        "gen_length",
        "max_prompt",
        "num_predictions",
        "capacity",
        "predict_capacity",
        "num_positions",
    ),
    do_not_specialize_on_alignment=("state", "plan", "predictions", "events", "packed", "page_table")
    + ("source_row", "flags", "next_flags"),
)

# In padding columns: no token id.
_NO_TOKEN = tl.constexpr(-1)

# Requests or rows that a program looks through at a time.
CHUNK = tl.constexpr(128)

# Elements of a tile that a warp works on: 8 a thread, which keeps a dozen tiles in registers.
_ELEMENTS_PER_WARP = 256
_MAX_WARPS = 16


def state_tensors(state: BranchState) -> StateTensors:
    """The state as kernels take it."""
    tensors = StateTensors(*(getattr(state, name) for name in StateTensors._fields))
    check_contiguous("state", tensors)
    return tensors


def check_contiguous(name: str, record: tuple) -> None:
    """The kernels address the tensors of a record without strides."""
    for field, tensor in zip(record._fields, record, strict=True):
        if isinstance(tensor, Tensor) and not tensor.is_contiguous():
            raise ValueError(
                f"{name}.{field}: expected a contiguous tensor for the triton backend, got strides "
                f"{list(tensor.stride())}"
            )


def tile_options(state: BranchState, num_branches: int | None = None) -> dict[str, int]:
    """Sizes of a request's tile, as kernels take them, with the warps that it occupies.

    Kernels are compiled for the padded sizes alone.

    Args:
        num_branches: rows of a request that the tile holds; None: all.
    """
    num_branches = state.num_branches if num_branches is None else num_branches
    rows, columns = (triton.next_power_of_2(size) for size in (num_branches, state.gen_length))
    warps = triton.next_power_of_2(triton.cdiv(rows * columns, _ELEMENTS_PER_WARP))
    return {
        "num_branches": num_branches,
        "gen_length": state.gen_length,
        "ROWS": rows,
        "COLUMNS": columns,
        "num_warps": min(_MAX_WARPS, warps),
    }


def device_of(tensor: Tensor) -> torch.cuda.device_of:
    """Context in which Triton launches on the device of `tensor`, whatever the current one is."""
    return torch.cuda.device_of(tensor)


@triton.jit
def pick(rows, row, values):
    """The element or line of `values` [N] or [N, ...] at `row`; `rows` counts the rows in the same shape."""
    return tl.sum(tl.where(rows == row, values, tl.zeros_like(values)), 0)


@triton.jit
def any_of(flags, axis: tl.constexpr):
    return tl.max(flags.to(tl.int32), axis) > 0


@triton.jit
def first_true(flags, column, length):
    """[N]: first column whose flag is set, `length` without one."""
    return tl.min(tl.where(flags, column, length), 1)


@triton.jit
def as_key(score):
    """Orders scores as the reference does: NaN comes first."""
    return tl.where(score == score, score, float("inf"))


@triton.jit
def is_eos(tokens, eos_token_ids: tl.constexpr):
    found = tokens != tokens
    for k in tl.static_range(len(eos_token_ids)):
        found |= tokens == eos_token_ids[k]
    return found


@triton.jit
def in_window(column, window_start, window_end):
    return (column >= window_start[:, None]) & (column < window_end[:, None])


@triton.jit
def load_tokens(tokens, at, valid):
    """The tile at the offsets `at`; the padding holds no token."""
    return tl.load(tokens + at, mask=valid, other=_NO_TOKEN)


@triton.jit
def count_up(counter, number, valid):
    tl.store(counter, tl.load(counter, mask=valid, other=0) + number, mask=valid)
