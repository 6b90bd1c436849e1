"""What a forward predicted, brought to its places in the state."""

import triton
import triton.language as tl
from torch import Tensor

from blockbatch_kernels.structs import BranchState, Predictions
from blockbatch_kernels.triton.rows import kernel

_BLOCK = 256


def store_predictions(
    state: BranchState, predictions: Predictions, *, probe: Tensor | None = None, place: Tensor | None = None
) -> None:
    """Scatters the packed predictions, and counts those without a finite confidence.

    Args:
        state: *written*: `top_token`, `confidence`, `non_finite`.
        probe: [R, G] fp32, *written*: probe probabilities; None: they are not asked for.
        place: [R, G] int32, *written* where there is a prediction: which of the packed ones; None: not asked
            for.
    """
    size = predictions.target.shape[0]
    if size:
        _scatter_kernel[(triton.cdiv(size, _BLOCK),)](
            predictions,
            state.top_token,
            state.confidence,
            state.non_finite,
            probe,
            place,
            size,
            state.num_requests,
            state.num_branches,
            state.gen_length,
            BLOCK_SIZE=_BLOCK,
        )


@kernel
def _scatter_kernel(
    predictions,
    top_token,
    confidence,
    non_finite,
    probe,
    place,
    num_predictions,
    num_requests,
    num_branches,
    gen_length,
    BLOCK_SIZE: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    target = tl.load(predictions.target + index, mask=index < num_predictions, other=-1)
    per_request = num_branches * gen_length
    given = (target >= 0) & (target < num_requests * per_request)
    tl.store(top_token + target, tl.load(predictions.top_token + index, mask=given), mask=given)
    predicted = tl.load(predictions.confidence + index, mask=given, other=0.0)
    tl.store(confidence + target, predicted, mask=given)
    # Infinity and NaN alone leave something when they are taken from themselves.
    tl.atomic_add(non_finite + target // per_request, 1, mask=given & (predicted - predicted != 0))
    if probe is not None:
        value = tl.load(predictions.probe_probability + index, mask=given)
        tl.store(probe + target, value, mask=given)
    if place is not None:
        tl.store(place + target, index, mask=given)
