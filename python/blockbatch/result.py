"""What a decode gives for one request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from blockbatch.branches import NFE, BlockNFE, BranchResult


@dataclass(frozen=True)
class Result:
    """One decoded request.

    Attributes:
        text: `tokens` as text, up to the first of the config's stop sequences; None if the model has no
            tokenizer.
        tokens: the winner's ids before the first EOS. A stop sequence ends them too; the last of them may
            then run into it.
        canvas: all gen_length ids of the winner; MASK where it stopped early. Of a block-causal model: the
            ids behind the prompt, which end with a block.
        nfe: model forwards: init, block, refresh, total; of a block-causal model prefill, denoise, store,
            total.
        stop_reason: "eos", "length" or "stop" (a stop sequence ended the text).
        block_size: of the winning branch.
        branches: what each branch did.
        seconds: from the start of the batch to the end of this request.
        trace: one record for each forward (see `blockbatch.tracing`); None unless the config asks for it.
        prefix_tokens: of a block-causal model: tokens of the prompt whose K/V the prefix cache had.
        confidences: of `tokens`: how sure the model was of each in the forward that committed it; None where
            they were not asked for (see `Engine.submit`).
    """

    text: str | None
    tokens: list[int]
    canvas: list[int]
    nfe: NFE | BlockNFE
    stop_reason: str
    block_size: int
    branches: tuple[BranchResult, ...]
    seconds: float
    trace: list[dict[str, Any]] | None
    prefix_tokens: int = 0
    confidences: list[float] | None = None

    @property
    def adopted(self) -> int:
        """Forwards that were taken over from drafts; the decode without drafts has as many more."""
        return sum(branch.adopted for branch in self.branches)


@dataclass(frozen=True)
class Gap:
    """A gap of a filled text.

    Attributes:
        start, length: where it stands among the tokens that were given, in tokens.
        tokens: the ids that fill it, up to its first EOS or stop sequence.
        text: these as text; None if the model has no tokenizer.
    """

    start: int
    length: int
    tokens: list[int]
    text: str | None


@dataclass(frozen=True)
class FillResult(Result):
    """One text whose gaps were filled. What differs from `Result`:

    Attributes:
        text: the whole text, what was given as it was given. A gap ends before its first EOS, and before the
            first of the config's stop sequences in it; what it held behind is left out.
        tokens: ids of the whole text, without what is left out.
        canvas: all ids, as many as were given. MASK where the last gap ended early by a stop sequence.
        stop_reason: "length": all gaps were decoded to their end; "stop": a stop sequence stands in one.
        gaps: what each gap got, in their order; gaps side by side are one.
    """

    gaps: tuple[Gap, ...] = ()
