"""What a decode ends with when the model's numbers break: NaN or infinity where logits belong."""

from __future__ import annotations

import torch

import blockbatch_kernels as bbk

_ADVICE = {
    torch.float16: "float16 ends at 65504, which values inside of this model pass: load it with "
    "dtype='bfloat16' or dtype='float32'",
    torch.bfloat16: "bfloat16 reaches as far as float32, so look for damaged weights or those of another "
    "model; dtype='float32' shows whether rounding has a part in it",
    torch.float32: "no dtype reaches further (bfloat16 as far, float16 not), so look for damaged weights or "
    "those of another model",
}


class NonFiniteLogitsError(RuntimeError):
    """A forward gave logits without a softmax: NaN, plus infinity, or minus infinity alone.

    No token of that forward means anything, so the whole call ends. The model can decode on.

    Attributes:
        name: of the prompt, as the message calls it.
        request: its index among the prompts; the first one, if several are concerned.
        phase: what kind of forward it was, one of `blockbatch_kernels.PHASES`.
        number: which of its kind for this prompt, from 1.
        forward: which of all forwards for this prompt, from 1.
        dtype: what the model computes in.
    """

    def __init__(
        self, name: str, request: int, phase: str, number: int, forward: int, dtype: torch.dtype
    ) -> None:
        super().__init__(name, request, phase, number, forward, dtype)
        self.name, self.request, self.dtype = name, request, dtype
        self.phase, self.number, self.forward = phase, number, forward

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        advice = _ADVICE.get(self.dtype, "load the model with dtype='bfloat16' or dtype='float32'")
        return (
            f"{self.name}: expected finite logits, got NaN or infinity in {self.phase} forward {self.number} "
            f"(forward {self.forward} of all), computed in {dtype}. {advice[0].upper()}{advice[1:]}"
        )

    def of(self, name: str, request: int) -> NonFiniteLogitsError:
        """The same of a prompt that has another name and index for the caller."""
        return NonFiniteLogitsError(name, request, self.phase, self.number, self.forward, self.dtype)


def refuse_non_finite(state: bbk.BranchState, phase: int, dtype: torch.dtype) -> None:
    """Raises NonFiniteLogitsError if the last forward, of that phase (index into PHASES), broke a request.

    Waits for the device. No frame keeps the error, which would keep its traceback, and so the session.
    """
    counts = state.non_finite.tolist()
    request = next((index for index, count in enumerate(counts) if count), None)
    if request is None:
        return
    forwards = state.nfe[request].tolist()
    name = "prompt" if len(counts) == 1 else f"prompt[{request}]"
    raise NonFiniteLogitsError(name, request, bbk.PHASES[phase], forwards[phase], sum(forwards), dtype)
