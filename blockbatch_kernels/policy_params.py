"""The settings of the policy between two forwards."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Annotated

QUERY_SPANS = ("window", "suffix", "canvas", "open")
REFRESH_SCOPES = ("canvas", "generation")
EOS_EXITS = ("prefix", "window", "none")
POLICIES = ("llada_published", "dream_published")


@dataclass(frozen=True)
class PolicyParams:
    """The settings of `decode_policy`; its front door calls `check`.

    Attributes:
        mask_token_id: id of MASK.
        eos_token_ids: any of these ends a text.
        threshold: commit every MASK whose confidence is at least this; None follows `steps_per_block`
            instead.
        steps_per_block: with `threshold=None`, forwards that a block of s tokens takes: s // steps_per_block
            tokens a step, one more in its first s % steps_per_block steps.
        leap_radius: LocalLeap (arXiv 2510.07081): within this distance of an anchor (a MASK that reaches
            its threshold in this step) a MASK already commits at `leap_threshold`. 0 switches it off.
        leap_threshold: see `leap_radius`.
        tail_threshold: from `threshold` to 1 (ours). Behind the first MASK of the window that is below
            `threshold`, a MASK commits at this confidence instead, and is an anchor of `leap_radius` only
            then: what may depend on an undecided token has to be surer. As elsewhere, a MASK near an anchor
            commits at `leap_threshold` there, and the surest of the window always. None: `threshold` holds
            in the whole window.
        merge_threshold: confidence that a destination must exceed to take a token from another branch.
        sync_threshold: a branch that trails the leader by more committed tokens than this takes over its
            state.
        refresh_interval: tokens of finished blocks after which a branch asks for a full forward; None: never.
        eos_exit: one of EOS_EXITS.
        query_span: what a block denoise computes: the "window", the window and everything behind it
            ("suffix"), the whole "canvas", or what is "open": the MASKs of the window, and once more every
            token of the generation region whose K/V was computed from another (ours, not in the paper).
        refresh_scope: what a refresh computes of each distinct row: the whole "canvas", or the "generation"
            region alone, which leaves the K/V of the prompt as the first forward left them (ours).
        drafts: lengths of the drafts, ascending (ours; none: ()). Row 0 of a request is then its only branch,
            and row d holds, for a block step, what row 0 holds and the `drafts[d - 1]` MASKs of its window
            that the last forward was surest of, as that forward predicts them. Where row 0 comes to hold the
            same, the draft's forward is its next one. See `reference/drafts.py`.
        prediction_offset: 0 if the logits at a position predict that position, 1 if they predict the next
            one.
        policy: whose rule decides what is committed, merged and synced, and when a request ends: that which
            BlockBatch's authors published for LLaDA, or that for Dream (see `reference/dream_policy.py`).
            The latter has `threshold`, `sync_threshold`, `refresh_interval`, and as `eos_exit` "prefix" or
            "none"; what else is a rule stays at its default.
    """

    mask_token_id: int
    eos_token_ids: tuple[int, ...]
    threshold: float | None = 0.9
    steps_per_block: int | None = None
    leap_radius: int = 0
    leap_threshold: float = 0.75
    tail_threshold: float | None = None
    merge_threshold: float = 0.5
    sync_threshold: int = 8
    refresh_interval: int | None = 32
    eos_exit: Annotated[str, EOS_EXITS] = "prefix"
    query_span: Annotated[str, QUERY_SPANS] = "window"
    refresh_scope: Annotated[str, REFRESH_SCOPES] = "canvas"
    prediction_offset: Annotated[int, (0, 1)] = 0
    drafts: tuple[int, ...] = ()
    policy: Annotated[str, POLICIES] = "llada_published"

    def check(self) -> None:
        """Raises ValueError, naming the setting, for values that the policy does not know."""
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}: expected {_one_of(choices)}, got {value!r}")
        if any(b <= a for a, b in zip((0, *self.drafts), self.drafts)):
            raise ValueError(f"drafts: expected ascending lengths from 1 on, got {self.drafts}")
        if self.drafts and self.query_span != "window":
            # A draft's forward is the next one only where both compute the window whole.
            raise ValueError(f'drafts: expected query_span "window", got {self.query_span!r}')
        if not 0.5 <= self.merge_threshold <= 1.0:
            # Below one half two different tokens could pass, and the rule would need the whole distribution.
            raise ValueError(f"merge_threshold: expected a value from 0.5 to 1, got {self.merge_threshold}")
        if self.policy == "dream_published":
            self._check_dream()
        if (self.threshold is None) == (self.steps_per_block is None):
            raise ValueError("threshold: expected either threshold or steps_per_block, got both or neither")
        if self.tail_threshold is None:
            return
        if self.threshold is None:
            raise ValueError(f"tail_threshold: expected None without a threshold, got {self.tail_threshold}")
        if not self.tail_threshold >= self.threshold:
            raise ValueError(
                f"tail_threshold: expected at least threshold = {self.threshold}, got {self.tail_threshold}"
            )

    def _check_dream(self) -> None:
        if self.eos_exit == "window":
            raise ValueError(
                f'eos_exit: expected prefix or none with policy "{self.policy}", got {self.eos_exit!r}'
            )
        for name, only in _DREAM_HAS.items():
            if (value := getattr(self, name)) != only:
                raise ValueError(f'{name}: expected {only!r} with policy "{self.policy}", got {value!r}')


# What the policy "dream_published" has no rule for.
_DREAM_HAS = dict(
    steps_per_block=None,
    leap_radius=0,
    tail_threshold=None,
    merge_threshold=0.5,
    query_span="window",
    refresh_scope="canvas",
    drafts=(),
)

# Setting -> the values that it may have, of the settings that say so.
CHOICES: dict[str, tuple] = {
    name: hint.__metadata__[0]
    for name, hint in typing.get_type_hints(PolicyParams, include_extras=True).items()
    if typing.get_origin(hint) is Annotated
}


def _one_of(choices: tuple) -> str:
    if isinstance(choices[0], str):
        return f"one of {', '.join(choices)}"
    return " or ".join(map(str, choices))
