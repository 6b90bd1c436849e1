"""Checks of the operators' arguments: shape, dtype and device, never a value on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from blockbatch_kernels.structs import BranchState, PolicyEvents, Predictions, StepPlan

# Of everything that a model computes with.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_INT, _BOOL, _FLOAT = torch.int32, torch.bool, torch.float32
# Field -> its shape and dtype; R rows, Q requests, G generated positions, * anything.
_STATE = {
    "prompt_tokens": ("Q*", _INT),
    "prompt_length": ("Q", _INT),
    "tokens": ("RG", _INT),
    "block_size": ("R", _INT),
    "window_start": ("R", _INT),
    "window_end": ("R", _INT),
    "decoded": ("R", _INT),
    "progress": ("R", _INT),
    "blocks_since_refresh": ("R", _INT),
    "steps_in_block": ("R", _INT),
    "needs_refresh": ("R", _BOOL),
    "done": ("R", _BOOL),
    "top_token": ("RG", _INT),
    "confidence": ("RG", _FLOAT),
    "cached_token": ("RG", _INT),
    "committed": ("R", _INT),
    "merged": ("R", _INT),
    "synced": ("R", _INT),
    "adopted": ("R", _INT),
    "nfe": ("Q3", _INT),
    "finished": ("Q", _BOOL),
    "winner": ("Q", _INT),
    "stop_reason": ("Q", _INT),
}
_PLAN = {
    "query_start": ("R", _INT),
    "query_end": ("R", _INT),
    "source_row": ("R", _INT),
    "predict": ("RG", _BOOL),
    "flags": ("5", _INT),
    "query_position": ("RH", _INT),
}
_EVENTS = {"committed": ("RG", _BOOL), "merged": ("RG", _BOOL), "sync_source": ("R", _INT)}


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
) -> None:
    """`None` in `shape` stands for any size, as `device` for any device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}")
    if tensor.dim() != len(shape) or any(
        want not in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    ):
        expected = ", ".join("*" if want is None else str(want) for want in shape)
        raise ValueError(f"{name}: expected shape [{expected}], got {list(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name}: expected device {device}, got {tensor.device}")


def check_state(state: BranchState) -> None:
    """Every field against `tokens` (rows, generation length, device) and `prompt_length` (requests)."""
    check_tensor("state.tokens", state.tokens, (None, None), (_INT,))
    check_tensor("state.prompt_length", state.prompt_length, (None,), (_INT,))
    if state.num_requests < 1 or state.num_rows % state.num_requests:
        raise ValueError(
            f"state.prompt_length: expected a divisor of the {state.num_rows} rows, got {state.num_requests}"
        )
    _check_fields("state", state, _STATE, state)


def check_plan(name: str, plan: StepPlan, state: BranchState) -> None:
    _check_fields(name, plan, _PLAN, state)


def check_events(name: str, events: PolicyEvents, state: BranchState) -> None:
    _check_fields(name, events, _EVENTS, state)


def check_predictions(predictions: Predictions, device: torch.device) -> None:
    check_tensor("predictions.target", predictions.target, (None,), (torch.int64,), device)
    size = predictions.target.shape
    check_tensor("predictions.top_token", predictions.top_token, size, (_INT,), device)
    check_tensor("predictions.confidence", predictions.confidence, size, (_FLOAT,), device)
    if predictions.probe_probability is not None:
        check_tensor("predictions.probe_probability", predictions.probe_probability, size, (_FLOAT,), device)


def _check_fields(
    owner: str,
    record: BranchState | StepPlan | PolicyEvents,
    fields: dict[str, tuple[str, torch.dtype]],
    state: BranchState,
) -> None:
    rows, gen_length = state.tokens.shape
    sizes = {
        "R": rows,
        "Q": state.num_requests,
        "G": gen_length,
        "H": gen_length + 1,
        "3": 3,
        "5": 5,
        "*": None,
    }
    for name, (letters, dtype) in fields.items():
        shape = tuple(sizes[letter] for letter in letters)
        check_tensor(f"{owner}.{name}", getattr(record, name), shape, (dtype,), state.tokens.device)
