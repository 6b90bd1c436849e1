"""The LM head whose vocabulary is dealt out: each rank reduces its own logits, and all merge the same parts.

Of a prediction a rank gives the highest logit of its tokens, the lowest token that has it, the sum of
exp(logit - highest) and what is asked beside: a few numbers instead of logits. The parts are merged in the
order of the ranks, which is the order of the tokens: a tie goes to the lowest id, as on one device.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.parallel.group import RankGroup
from blockbatch.parallel.shards import Shard
from blockbatch_kernels.cuda import lm_head as compiled
from blockbatch_kernels.ops.sampling import parts_of, sampling_of
from blockbatch_kernels.shapes import LEAST_LIKELY
from blockbatch_kernels.tuning import LM_HEAD_LOGITS_BYTES

# Predictions whose logits exist at the same time, at most.
_HEAD_ROWS = 512
_NONE = float("-inf")


class ShardedHead:
    """Stands for the operators of the same names; `weight` is this rank's part, [its tokens, dim], and
    `weight_scale` [its tokens] that of one in e4m3.

    Token ids are those of the whole vocabulary. Results are the same bits on every rank.
    """

    def __init__(self, group: RankGroup, shard: Shard) -> None:
        self._group, self._tokens, self._vocab_size = group, shard.vocabulary, shard.spec.vocab_size

    def lm_head_confidence(
        self,
        hidden: Tensor,
        weight: Tensor,
        *,
        weight_scale: Tensor | None = None,
        probe_tokens: Tensor | None = None,
        suppress_token: int | None = None,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `blockbatch_kernels.lm_head_confidence`."""
        options = dict(weight_scale=weight_scale, probe_tokens=probe_tokens, suppress_token=suppress_token)
        operator = "lm_head_confidence" if weight_scale is None else "lm_head_confidence_fp8"
        parts_of = self._parts
        if hidden.is_cuda and bbk.backend_of(operator, hidden.device, backend) == "cuda":
            parts_of, options["first_token"] = compiled.lm_head_parts, self._tokens.start
        else:
            options["backend"] = backend
        parts = parts_of(hidden, weight, **options)
        if parts.is_cuda and backend in (None, "cuda"):
            found = self._group.merge_head(parts, probes=probe_tokens is not None)
            if found is not None:
                return found
        highest, total, token, probe = self._group.all_gather(parts).unbind(-1)  # each [ranks, predictions]
        top, top_token, whole = _merged(highest, total, token)
        probability = None
        if probe_tokens is not None:
            probability = (probe.amax(0) - top).exp() / whole
        return top_token.int(), 1.0 / whole, probability

    def lm_head_confidence_fp8(
        self, hidden: Tensor, weight: Tensor, weight_scale: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `blockbatch_kernels.lm_head_confidence_fp8`."""
        return self.lm_head_confidence(hidden, weight, weight_scale=weight_scale, **options)

    def _parts(
        self,
        hidden: Tensor,
        weight: Tensor,
        *,
        weight_scale: Tensor | None,
        probe_tokens: Tensor | None,
        suppress_token: int | None,
        backend: str | None,
    ) -> Tensor:
        """See `blockbatch_kernels.cuda.lm_head.lm_head_parts`."""
        parts = hidden.new_empty(hidden.shape[0], 4, dtype=torch.float32)
        for rows, logits in self._logits(hidden, weight, weight_scale, backend):
            self._suppress(logits, suppress_token)
            highest, total, token = self._reduced(logits)
            probe = torch.full_like(highest, _NONE)
            if probe_tokens is not None:
                probe = self._probed(logits, probe_tokens[rows])
            parts[rows] = torch.stack((highest, total, token, probe), 1)
        return parts

    def lm_head_likely(
        self,
        hidden: Tensor,
        weight: Tensor,
        *,
        weight_scale: Tensor | None = None,
        suppress_token: int | None = None,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `blockbatch_kernels.lm_head_likely`."""
        places, count = bbk.NUM_LIKELY, hidden.shape[0]
        parts = hidden.new_empty(count, 5 + 2 * places, dtype=torch.float32)
        for rows, logits in self._logits(hidden, weight, weight_scale, backend):
            every, every_total, _ = self._reduced(logits)
            likely = every.new_full((logits.shape[0], 2 * places), _NONE)
            remaining = logits.clone()
            for place in range(min(places, logits.shape[1])):
                token = remaining.argmax(-1, keepdim=True)
                likely[:, place] = remaining.gather(1, token).squeeze(1)
                likely[:, places + place] = token.squeeze(1) + self._tokens.start
                remaining.scatter_(1, token, _NONE)
            self._suppress(logits, suppress_token)
            highest, total, token = self._reduced(logits)
            parts[rows] = torch.cat((torch.stack((highest, total, token, every, every_total), 1), likely), 1)
        gathered = self._group.all_gather(parts)  # [ranks, predictions, 5 + 2 * places]
        _, top_token, whole = _merged(*gathered[..., :3].unbind(-1))
        every_top, _, every_whole = _merged(gathered[..., 3], gathered[..., 4], gathered[..., 2])
        # Ranks in order and places in order: on a tie the lowest id stands first, and a stable sort keeps it.
        logits = gathered[..., 5 : 5 + places].transpose(0, 1).flatten(1)
        tokens = gathered[..., 5 + places :].transpose(0, 1).flatten(1)
        order = torch.argsort(logits, dim=1, descending=True, stable=True)[:, :places]
        probability = (logits.gather(1, order) - every_top.unsqueeze(1)).exp() / every_whole.unsqueeze(1)
        is_likely = probability > LEAST_LIKELY
        likely_token = torch.where(is_likely, tokens.gather(1, order), -1.0).int()
        return top_token.int(), 1.0 / whole, likely_token, torch.where(is_likely, probability, 0.0)

    def lm_head_likely_fp8(
        self, hidden: Tensor, weight: Tensor, weight_scale: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `blockbatch_kernels.lm_head_likely_fp8`."""
        return self.lm_head_likely(hidden, weight, weight_scale=weight_scale, **options)

    def lm_head_sample(
        self,
        hidden: Tensor,
        weight: Tensor,
        rules: bbk.SamplingRules,
        request: Tensor,
        positions: Tensor,
        *,
        weight_scale: Tensor | None = None,
        probe_tokens: Tensor | None = None,
        backend: str | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `blockbatch_kernels.lm_head_sample`.

        A token's noise depends on no other token: each rank draws among its own, and the highest score wins.
        With `top_p` or `top_k`, which ask for all of a row, and by Triton the logits travel, and every rank
        draws all tokens from them.
        """
        sampling, count = sampling_of(hidden, backend), hidden.shape[0]
        by_parts = parts_of(hidden, rules, backend)
        token = torch.empty(count, dtype=torch.int32, device=hidden.device)
        confidence = torch.empty(count, dtype=torch.float32, device=hidden.device)
        probability = torch.empty_like(confidence) if probe_tokens is not None else None
        for rows, part in self._logits(hidden, weight, weight_scale, backend, whole=by_parts is None):
            about, options["probe_tokens"] = (rules, request[rows], positions[rows]), None
            if probe_tokens is not None:
                options["probe_tokens"] = probe_tokens[rows]
            if by_parts is None:
                found = sampling.sample_logits(self.whole_logits(part), *about, **options)
            else:
                found = self._drawn(by_parts, part, *about, **options)
            token[rows], confidence[rows] = found[:2]
            if probability is not None:
                probability[rows] = found[2]
        return token, confidence, probability

    def lm_head_sample_fp8(
        self, hidden: Tensor, weight: Tensor, weight_scale: Tensor, *arguments: Any, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `blockbatch_kernels.lm_head_sample_fp8`."""
        return self.lm_head_sample(hidden, weight, *arguments, weight_scale=weight_scale, **options)

    def _drawn(
        self,
        by_parts: ModuleType,
        logits: Tensor,
        *about: Any,
        probe_tokens: Tensor | None,
        confidence: str = "probability",
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`lm_head_sample` of all ranks' logits, from this rank's [n, its tokens]."""
        size, piece_tokens = self._group.size, by_parts.part_tokens()
        longest = -(-self._vocab_size // size)
        num_pieces = -(-longest // piece_tokens)
        options |= dict(first_token=self._tokens.start, num_pieces=num_pieces, confidence=confidence)
        parts = by_parts.sample_parts(logits, *about, probe_tokens=probe_tokens, **options)
        gathered = self._group.all_gather(parts).transpose(0, 1).flatten(1, 2)  # ranks in order, then pieces
        place = None
        if probe_tokens is not None:
            # The rank whose tokens [vocab_size * rank // size, ...) hold it.
            owner = ((probe_tokens.long() + 1) * size - 1) // self._vocab_size
            within = probe_tokens - owner * self._vocab_size // size
            place = owner * num_pieces + within // piece_tokens
            place.masked_fill_((probe_tokens < 0) | (probe_tokens >= self._vocab_size), -1)
        return by_parts.merge_parts(gathered, place, confidence)

    def whole_logits(self, part: Tensor) -> Tensor:
        """[n, vocab_size]: of all ranks, from this rank's [n, its tokens]; in the dtype of these."""
        longest = -(-self._vocab_size // self._group.size)
        padded = F.pad(part, (0, longest - part.shape[1]))
        sizes = [
            self._vocab_size * (rank + 1) // self._group.size - self._vocab_size * rank // self._group.size
            for rank in range(self._group.size)
        ]
        gathered = self._group.all_gather(padded)
        return torch.cat([gathered[rank, :, :size] for rank, size in enumerate(sizes)], 1)

    def _logits(
        self,
        hidden: Tensor,
        weight: Tensor,
        weight_scale: Tensor | None,
        backend: str | None,
        *,
        whole: bool = False,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Some rows and their logits, within the memory that the operators take for theirs.

        Args:
            whole: whether those of all ranks are to come to them.
        """
        row_bytes = max(1, len(self._tokens)) * (2 * hidden.element_size() + 4)
        if whole:
            row_bytes += self._vocab_size * (3 * hidden.element_size() + 4)
        count = max(1, min(_HEAD_ROWS, LM_HEAD_LOGITS_BYTES // row_bytes))
        for start in range(0, hidden.shape[0], count):
            rows = slice(start, start + count)
            if weight_scale is None:
                yield rows, bbk.linear(hidden[rows], weight, static_weight=True, backend=backend)
            else:
                options = dict(out_dtype=hidden.dtype, static_weight=True, backend=backend)
                own = bbk.quantize_rows(hidden[rows], backend=backend)
                yield rows, bbk.linear_fp8(*own, weight, weight_scale, **options)

    def _suppress(self, logits: Tensor, token: int | None) -> None:
        if token is not None and token in self._tokens:
            logits[:, token - self._tokens.start] = _NONE

    def _reduced(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Highest logit, sum of exp(logit - highest), and token of each row, fp32."""
        token = logits.argmax(-1, keepdim=True)
        highest = logits.gather(1, token).float()
        # One pass over the logits: the highest one's probability among them is 1 / the sum.
        total = logits.softmax(-1, dtype=torch.float32).gather(1, token).reciprocal_()
        # Of nothing but minus infinity: a part without weight, not one without a value.
        total.masked_fill_(highest == _NONE, 0.0)
        return highest.squeeze(1), total.squeeze(1), token.squeeze(1).float() + self._tokens.start

    def _probed(self, logits: Tensor, probe_tokens: Tensor) -> Tensor:
        """Logits of the probes that are among this rank's tokens; minus infinity for others."""
        place = probe_tokens.long() - self._tokens.start
        inside = (place >= 0) & (place < len(self._tokens))
        found = logits.gather(1, place.clamp(0, len(self._tokens) - 1).unsqueeze(1)).squeeze(1).float()
        return found.masked_fill(~inside, _NONE)


def _merged(highest: Tensor, total: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Highest logit, its token and the whole sum of exp(logit - highest), from each rank's, [ranks, n].

    A NaN is above everything and makes the sum NaN; so does a row of nothing but minus infinity.
    """
    top, rank = highest.max(0)  # of equal ones the first
    whole = (total * (highest - top).exp()).sum(0)
    return top, token.gather(0, rank.unsqueeze(0)).squeeze(0), whole
