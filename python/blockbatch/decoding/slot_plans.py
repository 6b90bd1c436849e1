"""A phase for each request: the policy of some requests at a time, and plans that keep both kinds of forward.

`bbk.decode_policy` knows one phase for all requests of a state: one that needs a refresh makes the next
forward a refresh, and the others wait. Here requests that are not concerned count as finished during a call,
which leaves all of theirs as it is. So requests go on by phase and by settings, and the next block step and
the next full forward are both planned, each for those that it is for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.decoding.rule import RuleRun
from blockbatch.decoding.slots import Slots
from blockbatch_kernels import PolicyParams
from blockbatch_kernels.structs import PHASE_REFRESH

# A number and the settings of those requests whose `Slots.group` it is.
Group = tuple[int, PolicyParams]


class SlotPlans:
    """What the requests of some slots ask for next.

    Args:
        rule: that commits in the place of the settings; None: they do.

    Attributes:
        block, full: the plans; their flags mean nothing. `full` holds init and refresh of every request that
            waits for one. Of open queries `block` has places, as ever.
        blocking, refreshing: [Q] bool, requests that each is for; those before their init are in neither.
    """

    def __init__(self, slots: Slots, rule: RuleRun | None, backend: str | None) -> None:
        self.slots, self.rule, self.backend = slots, rule, backend
        size = slots.num_rows, slots.state.gen_length, slots.device
        self.block, self.full, self._other = (bbk.StepPlan.allocate(*size) for _ in range(3))
        self.events = bbk.PolicyEvents.allocate(*size)
        self.blocking, self.refreshing = (torch.zeros_like(slots.begun) for _ in range(2))
        self.row = torch.arange(slots.num_rows, dtype=torch.int32, device=slots.device)
        self._flags = torch.zeros(3, 5, dtype=torch.int32, device=slots.device)
        self._flags[:, 1] = torch.arange(3, device=slots.device)
        self._nobody = torch.full_like(self.row, -1)
        for plan in (self.block, self.full):
            plan.source_row.fill_(-1)

    def policy(
        self,
        members: Tensor,
        predictions: bbk.Predictions,
        plan: bbk.StepPlan,
        phase: int,
        groups: Sequence[Group],
    ) -> Tensor:
        """Goes on with the requests `members` [Q] behind a forward; gives the rows of syncs, -1 elsewhere.

        Args:
            predictions: of the forward; those of other requests are passed over.
            plan: the forward was made of.
            phase: index into `bbk.PHASES`.
        """
        sources = self._nobody
        for number, params in groups:
            mine = members if len(groups) == 1 else members & (self.slots.group == number)
            rows = self.slots.by_row(mine)
            source_row = torch.where(rows, plan.source_row, -1)
            own = plan._replace(source_row=source_row, flags=self._flags[phase])
            self._call(mine, rows, self.of_rows(rows, predictions), own, params, self._other, self.rule)
            sources = torch.where(rows, self.events.sync_source, sources)
        return sources

    def next(self, groups: Sequence[Group], *, inits: bool = True) -> None:
        """Plans what comes next for all requests.

        Args:
            inits: whether requests may be before their init.
        """
        state, slots = self.slots.state, self.slots
        wants = (state.needs_refresh & ~state.done).view(slots.sizes.requests, -1).any(1)
        going = ~state.finished & slots.begun
        self.refreshing.copy_(going & wants)
        self.blocking.copy_(going & ~wants)
        # A refresh without a row only plans. Drafts are written on the way, for those of the last call.
        idle = self.block._replace(source_row=self._nobody, flags=self._flags[PHASE_REFRESH])
        nothing = self.no_predictions()
        for members, into in ((self.refreshing, self.full), (self.blocking, self.block)):
            for number, params in groups:
                if len(groups) == 1:
                    self._call(members, slots.by_row(members), nothing, idle, params, into)
                    continue
                mine = slots.group == number
                rows = slots.by_row(mine)
                self._call(members & mine, rows & slots.by_row(members), nothing, idle, params, self._other)
                for target, value in zip(into, self._other, strict=True):
                    if target is not into.flags:
                        kept = rows.view(-1, *[1] * (value.dim() - 1))
                        target.copy_(torch.where(kept, value, target))
        self._cut(groups)
        if inits:
            self.plan_inits(groups)

    def plan_inits(self, groups: Sequence[Group]) -> None:
        """Puts requests before their init into `full`: a whole row each, whose results all its rows have."""
        slots, state = self.slots, self.slots.state
        waiting = slots.by_row(~slots.begun & ~state.finished)
        first = self.row - self.row % slots.sizes.num_branches
        computed = waiting & (self.row == first)
        end = torch.where(computed, slots.by_row(state.prompt_length + slots.gen_length), 0)
        predict = (state.tokens == slots.mask_token_id) & computed.unsqueeze(1)
        if groups and groups[0][1].policy == "dream_published":  # which writes the first MASK alone
            predict = predict & (predict.int().cumsum(1) == 1)
        full = self.full
        full.query_start.masked_fill_(waiting, 0)
        full.query_end.copy_(torch.where(waiting, end, full.query_end))
        source = torch.where(slots.live, first, -1)
        full.source_row.copy_(torch.where(waiting, source, full.source_row))
        full.predict.copy_(torch.where(waiting.unsqueeze(1), predict, full.predict))

    def drop(self, slot: int) -> None:
        """Takes a request out of both plans."""
        rows = self.slots.rows_of(slot)
        for plan in (self.block, self.full):
            plan.query_start[rows], plan.query_end[rows] = 0, 0
            plan.source_row[rows], plan.predict[rows] = -1, False
        self.blocking[slot], self.refreshing[slot] = False, False

    def mixed(self, now: Tensor) -> bbk.StepPlan:
        """The block step and those whole rows that `now` [R] marks, as one plan."""
        block, full = self.block, self.full
        return block._replace(
            query_start=torch.where(now, full.query_start, block.query_start),
            query_end=torch.where(now, full.query_end, block.query_end),
            predict=torch.where(now.unsqueeze(1), full.predict, block.predict),
        )

    def whole(self, now: Tensor) -> bbk.StepPlan:
        """Those whole rows that `now` [R] marks alone."""
        end = torch.where(now, self.full.query_end, self.full.query_start)
        return self.full._replace(query_end=end)

    def no_predictions(self) -> bbk.Predictions:
        """Of a forward of nothing."""
        nothing = torch.zeros(0, dtype=torch.int32, device=self.slots.device)
        likely = nothing.view(0, bbk.NUM_LIKELY)
        floats = nothing.float()
        return bbk.Predictions(nothing.long(), nothing, floats, floats, likely, likely.float())

    def _cut(self, groups: Sequence[Group]) -> None:
        """Ends whole rows where the canvas of their request ends, which may be before that of the slots."""
        slots = self.slots
        ends = slots.by_row(slots.state.prompt_length + slots.gen_length)
        is_open = bool(groups) and groups[0][1].query_span == "open"
        for plan in (self.full,) if is_open else (self.full, self.block):
            torch.minimum(plan.query_end, ends, out=plan.query_end)

    def _call(
        self,
        members: Tensor,
        rows: Tensor,
        predictions: bbk.Predictions,
        plan: bbk.StepPlan,
        params: PolicyParams,
        into: bbk.StepPlan,
        rule: RuleRun | None = None,
    ) -> None:
        """`bbk.decode_policy` of the requests `members`, whose rows are `rows`, and of no other."""
        state = self.slots.state
        # What a call may change of those that count as finished: the prefix exit of one group would end the
        # windows of another, and Dream's rule asks no finished row whether it needs a refresh.
        of_rows = {name: getattr(state, name).clone() for name in ("needs_refresh", "window_end")}
        finished = state.finished.clone()
        state.finished.logical_or_(~members)
        out = (into, self.events)
        if rule is None:
            bbk.decode_policy(state, predictions, plan, params, out=out, backend=self.backend)
        else:
            memory = {name: values.clone() for name, values in rule.memory.items()}
            rule.decode_policy(state, predictions, plan, out, self.backend)
            for name, before in memory.items():
                rule.memory[name].copy_(torch.where(rows.unsqueeze(1), rule.memory[name], before))
        state.finished.copy_(torch.where(members, state.finished, finished))
        for name, before in of_rows.items():
            field = getattr(state, name)
            field.copy_(torch.where(rows, field, before))

    def of_rows(self, rows: Tensor, predictions: bbk.Predictions) -> bbk.Predictions:
        """The predictions of some rows; the others become padding."""
        target = predictions.target
        row = target.clamp(min=0) // self.slots.state.gen_length
        return predictions._replace(target=torch.where(rows[row], target, -1))
