"""One turn of the decoding loop as the host sees it: the plan that was run, and what observers are told."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import blockbatch_kernels as bbk


class HostPlan:
    """The parts of a `StepPlan` that the host decides by.

    Attributes:
        running, phase, query_tokens, predictions, stalled: the plan's flags.
        query_start, query_end, source_row: lists, one entry for each row.
    """

    def __init__(self, values: list[int], num_rows: int) -> None:
        self.running, self.phase, self.query_tokens, self.predictions, self.stalled = values[:5]
        rows = values[5:]
        self.query_start, self.query_end, self.source_row = (
            rows[part * num_rows : (part + 1) * num_rows] for part in range(3)
        )

    @property
    def query_lengths(self) -> list[int]:
        return [end - start for start, end in zip(self.query_start, self.query_end, strict=True)]


class OpenQueries(NamedTuple):
    """What a block step of open queries computes, in positions of the generation region, ascending.

    Attributes:
        positions: [R] positions of each row; -1: the last one of the prompt.
        stale: [R] those of them that hold a token and K/V computed from another.
    """

    positions: list[list[int]]
    stale: list[list[int]]


class Step(NamedTuple):
    """One turn of the loop, for observers; its tensors are valid until the next turn.

    Attributes:
        phase: one of `blockbatch_kernels.PHASES`.
        plan: the forward that ran, on the host; its `query_tokens` are 0 where no row had anything to compute
            and no forward ran.
        windows: [R] windows (start, end) during the forward; None unless the session is observed.
        events: what the policy changed.
        seconds: of the whole turn.
        open_queries: of a block step with open queries, if the session is observed; else None.
    """

    phase: str
    plan: HostPlan
    windows: list[tuple[int, int]] | None
    events: bbk.PolicyEvents
    seconds: float
    open_queries: OpenQueries | None = None
