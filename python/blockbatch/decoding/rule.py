"""Commit rules of one's own, in plain torch, between a forward and the policy.

The policy takes over everything but the choice itself (EOS check, advance, merge, sync, plan), on any
backend, and needs no change for it: what a rule chose goes to it with a confidence that no probability
reaches, above a threshold that none reaches either. Behind it the model's own confidences stand in the state
again. Where the rule chose nothing, the policy commits the surest MASK of the window, as under every
published rule.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch import branches
from blockbatch.decoding.host_waits import host_wait_of

# Of what a rule chose: more than any probability. `PolicyParams.threshold` is this under a rule.
CHOSEN = 2.0
_STOP_EOS = bbk.STOP_REASONS.index("eos")
# Rules whose host waits were told.
_told: set[Callable[..., Any]] = set()


class RuleState(NamedTuple):
    """What a commit rule sees of a batch of R rows (branch b of request q is row q * num_branches + b), whose
    generation regions have G positions. All tensors but those of `memory` are copies.

    Attributes:
        tokens: [R, G] int32, MASK where nothing is decoded yet.
        top_token: [R, G] int32, the most probable token of the latest forward that computed the position.
        window_start, window_end: [R] int32, the open window of every row.
        block_size: [R] int32.
        steps_in_block: [R] int32, forwards that the row has had in this window before.
        mask_token_id: id of MASK.
        num_branches: rows of a request.
        options: the method's options, by name.
        memory: [R, G] tensors that the rule asked for, to be written in place; zero when a request begins.
    """

    tokens: Tensor
    top_token: Tensor
    window_start: Tensor
    window_end: Tensor
    block_size: Tensor
    steps_in_block: Tensor
    mask_token_id: int
    num_branches: int
    options: Mapping[str, Any]
    memory: Mapping[str, Tensor]


@dataclass(frozen=True)
class CommitRule:
    """A commit rule with its settings; see `blockbatch.commit_rule`.

    Attributes:
        name: of the method, for messages.
        function: the rule.
        options: the method's options.
        memory: names and dtypes of the tensors that it keeps between forwards.
        graphs: whether its steps may be captured.
    """

    name: str
    function: Callable[[RuleState, Tensor, Tensor], Tensor]
    options: tuple[tuple[str, Any], ...] = ()
    memory: tuple[tuple[str, torch.dtype], ...] = ()
    graphs: bool = True


class RuleRun:
    """A rule at work on the rows of one batch.

    Its construction tries the rule on the state before the first forward, so that what is wrong with it is
    said before any work.

    Args:
        rule: what to run.
        params: of the method, as `check_rule` wants them.
        state: of the batch.

    Attributes:
        can_capture: whether nothing in the rule waits for the device.

    Raises:
        ValueError, TypeError: the rule returns something else than a bool mask of the rows.
    """

    def __init__(self, rule: CommitRule, params: bbk.PolicyParams, state: bbk.BranchState) -> None:
        self.rule, self.params = rule, params
        self._options = MappingProxyType(dict(rule.options))
        self.can_capture = rule.graphs
        # Whatever mode the caller is in: tensors that any mode may write, and operators seen one by one.
        with torch.inference_mode(False), torch.no_grad():
            self._memory = {name: torch.zeros_like(state.tokens, dtype=dtype) for name, dtype in rule.memory}
            self._try(state)

    @property
    def memory(self) -> Mapping[str, Tensor]:
        """What the rule keeps between forwards, [R, G] each."""
        return self._memory

    def reset(self, rows: slice = slice(None)) -> None:
        """For new requests in these rows."""
        for tensor in self._memory.values():
            tensor[rows].zero_()

    def decode_policy(
        self,
        state: bbk.BranchState,
        predictions: bbk.Predictions,
        plan: bbk.StepPlan,
        out: tuple[bbk.StepPlan, bbk.PolicyEvents],
        backend: str | None,
    ) -> None:
        """As `blockbatch_kernels.decode_policy`, under this rule."""
        rows = torch.arange(state.num_rows, dtype=torch.int32, device=state.tokens.device)
        forwarded = plan.source_row >= 0
        source = torch.where(forwarded, plan.source_row, rows).long()
        target = torch.where(predictions.target < 0, state.tokens.numel(), predictions.target)

        def stored(before: Tensor, values: Tensor) -> Tensor:
            """[R, G]: as the policy stores predictions; the padding goes to a place behind the end."""
            padded = torch.cat((before.flatten(), before.new_zeros(1)))
            padded = padded.scatter(0, target, values.to(before.dtype))
            return padded[:-1].view_as(before)[source]  # equal rows of a full forward were computed once

        top_token = stored(state.top_token, predictions.top_token)
        confidence = stored(state.confidence, predictions.confidence)
        probe = predictions.probe_probability
        if probe is not None:
            probe = stored(torch.zeros_like(confidence), probe).flatten()
        candidates = self._candidates(state) & forwarded.unsqueeze(1)
        chosen = self._choose(state, top_token, candidates, confidence) & candidates & confidence.isfinite()
        finished = state.finished.clone()
        bbk.decode_policy(
            state,
            bbk.Predictions(
                torch.arange(state.tokens.numel(), device=state.tokens.device),
                top_token.flatten(),
                torch.where(chosen, CHOSEN, confidence).flatten(),
                probe,
            ),
            plan._replace(source_row=torch.where(forwarded, rows, -1)),
            self.params,
            out=out,
            backend=backend,
        )
        state.confidence.copy_(confidence)
        if state.num_branches > 1 and self.params.eos_exit == "prefix":
            self._rate_ends(state, finished)

    def _candidates(self, state: bbk.BranchState) -> Tensor:
        """[R, G] bool: MASKs of the windows."""
        position = torch.arange(state.gen_length, device=state.tokens.device)
        inside = (position >= state.window_start.unsqueeze(1)) & (position < state.window_end.unsqueeze(1))
        return inside & (state.tokens == self.params.mask_token_id)

    def _choose(
        self, state: bbk.BranchState, top_token: Tensor, candidates: Tensor, confidence: Tensor
    ) -> Tensor:
        seen = RuleState(
            state.tokens.clone(),
            top_token.clone(),
            state.window_start.clone(),
            state.window_end.clone(),
            state.block_size.clone(),
            state.steps_in_block.clone(),
            self.params.mask_token_id,
            state.num_branches,
            self._options,
            MappingProxyType(self._memory),
        )
        chosen = self.rule.function(seen, candidates.clone(), torch.where(candidates, confidence, 0.0))
        expected = f"method {self.rule.name!r}: expected a rule that returns a bool tensor "
        expected += f"{list(candidates.shape)} on {candidates.device}"
        if not isinstance(chosen, Tensor):
            raise TypeError(f"{expected}, got {chosen!r:.80}")
        if (chosen.dtype, chosen.shape, chosen.device) != (torch.bool, candidates.shape, candidates.device):
            dtype = str(chosen.dtype).removeprefix("torch.")
            raise ValueError(f"{expected}, got {dtype} {list(chosen.shape)} on {chosen.device}")
        return chosen

    def _rate_ends(self, state: bbk.BranchState, finished_before: Tensor) -> None:
        """The winner among branches that ended by EOS just now, by the model's confidence in that EOS.

        A request that has ended does not change any more, so what ended it still stands there.
        """
        is_eos = torch.zeros_like(state.tokens, dtype=torch.bool)
        for token in self.params.eos_token_ids:
            is_eos |= state.tokens == token
        first = is_eos.int().argmax(1, keepdim=True)
        position = torch.arange(state.gen_length, device=first.device)
        is_open = ((state.tokens == self.params.mask_token_id) & (position < first)).any(1)
        score = state.confidence.gather(1, first).squeeze(1)
        score = torch.where(is_eos.any(1) & ~is_open, score, float("-inf"))
        ended = state.finished & ~finished_before & (state.stop_reason == _STOP_EOS)
        winner = score.view(state.num_requests, state.num_branches).argmax(1).int()
        state.winner.copy_(torch.where(ended, winner, state.winner))

    def _try(self, state: bbk.BranchState) -> None:
        candidates, confidence = self._candidates(state), torch.zeros_like(state.confidence)

        def once() -> None:
            self._choose(state, state.top_token, candidates, confidence)

        if self.can_capture and state.tokens.device.type == "cuda":
            waits = host_wait_of(once)
            self.can_capture = waits is None
            if waits is not None:
                _tell(self.rule, waits)
        else:
            once()
        self.reset()


def try_rule(rule: CommitRule, params: bbk.PolicyParams, block_sizes: tuple[int, ...], length: int) -> None:
    """Tries a rule on an empty canvas of `length` positions on the CPU.

    Raises:
        ValueError, TypeError: it returns something else than a bool mask of the rows.
    """
    device = torch.device("cpu")
    RuleRun(rule, params, branches.empty_state(1, 1, block_sizes, length, params, device))


def _tell(rule: CommitRule, waits: str) -> None:
    if rule.function not in _told:
        _told.add(rule.function)
        warnings.warn(
            f"method {rule.name!r}: its rule waits for the device ({waits}), so its steps run without CUDA "
            "graphs, and slower",
            RuntimeWarning,
            stacklevel=2,
        )


def check_rule(block_sizes: tuple[int, ...], params: bbk.PolicyParams) -> None:
    """Raises ValueError for settings of the policy under which a rule would not be exact."""
    expected = (
        ("threshold", params.threshold, CHOSEN),
        ("tail_threshold", params.tail_threshold, None),
        ("leap_radius", params.leap_radius, 0),
        ("drafts", params.drafts, ()),
        ("policy", params.policy, "llada_published"),
    )
    for name, value, only in expected:
        if value != only:
            raise ValueError(f"{name}: expected {only!r} with a commit rule, got {value!r}")
    if params.eos_exit == "window" and len(block_sizes) > 1:
        raise ValueError(
            "eos_exit: expected prefix or none with a commit rule on several block sizes, got 'window'"
        )
