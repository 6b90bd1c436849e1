"""What a process holds of a model, all or a part, and how what it computes becomes whole."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

import blockbatch_kernels as bbk
from blockbatch.parallel import digest, group
from blockbatch.parallel.group import RankGroup
from blockbatch.parallel.head import ShardedHead
from blockbatch.parallel.lanes import Lanes
from blockbatch.parallel.plans import Plans
from blockbatch.parallel.ranks import ALONE, Ranks
from blockbatch.parallel.shards import Shard

# Of whole rows on a GPU. The second one costs the activations of a row, and gains up to 5% in LLaDA-8B's
# shape (bench/results/tensor_parallel.json).
LANES = 2


class Share:
    """All of a model, in one process: nothing is to be made whole, and nobody is waited for.

    Attributes:
        size: processes that hold the model together.
        shard: the part of the checkpoint; None: all of it.
        vocabulary: token ids of the LM head here; None: all of them.
        all_reduce_norm: see `transformer.forward`.
        head: has the operators `lm_head_confidence`, `lm_head_likely` and `lm_head_sample`, and all with
            `_fp8`.
        whole: the `Model` of all weights that this process holds beside its part; None: there is none, and
            all of them compute every row.
    """

    size: int = 1
    shard: Shard | None = None
    vocabulary: range | None = None
    all_reduce_norm: Callable[..., Any] | None = None
    head: Any = bbk
    whole: Any = None

    def local_spec(self, spec: Any) -> Any:
        """The shape of what this process computes."""
        return spec

    def forward(self, what: str) -> AbstractContextManager:
        """Around a forward outside of a decode."""
        return nullcontext()

    loading = forward

    def decode(self, state: Any, what: tuple) -> Any:
        """What goes with every step of a decode: see `Ranks`."""
        return ALONE

    def engine(self, what: str) -> Plans | None:
        """What an engine tells the other processes; None: there are none.

        Args:
            what: its options, the same in all of them.
        """
        return None

    def lanes(self) -> AbstractContextManager:
        """For forwards that do not depend on each other: a function that gives a context for each of them."""
        return nullcontext(_same_lane)

    @property
    def num_lanes(self) -> int:
        """Such forwards that are at work at the same time."""
        return 1

    def least(self, what: str, value: int) -> int:
        """The least of what the processes found."""
        return value

    def whole_logits(self, part: Tensor) -> Tensor:
        """[n, vocab_size]: from those of the LM head's rows that are here."""
        return part


def _same_lane(number: int) -> AbstractContextManager:
    return nullcontext()


WHOLE = Share()


class RankShare(Share):
    """The part of one of several processes; every one of them makes it at the same time.

    Attributes:
        group: the processes.
        most_lanes: lanes to be used of those that there are; None: all.

    Args:
        spec: `ModelSpec` of the whole model.
        device: this process's; its own GPU, or the CPU on all of them.
        dtype: of the model.
        transport: of tensors between GPUs, one of `group.TRANSPORTS`; None: the first that runs.
        lanes: whole rows that are at work at the same time on a GPU, at most.
    """

    def __init__(
        self,
        spec: Any,
        device: torch.device,
        dtype: torch.dtype,
        *,
        transport: str | None = None,
        lanes: int = LANES,
    ) -> None:
        self.shard = Shard(spec, *group.place())
        self.group = RankGroup(device, dtype, transport=transport, lanes=lanes)
        self._lanes = Lanes(self.group, lanes)
        self.most_lanes: int | None = None
        self.size, self.vocabulary = self.group.size, self.shard.vocabulary
        self.all_reduce_norm = self.group.all_reduce_norm
        self.head = ShardedHead(self.group, self.shard)
        self.group.agree("the start of loading (model and dtype)", digest.of_text(f"{spec} {dtype}"))
        self.exchange: Any = None
        self._engine: Plans | None = None

    def hold_whole(self, model: Any) -> None:
        """From now on rows are dealt out whole; every process calls it at the same time.

        Args:
            model: of all weights, as one process holds it.
        """
        if self.exchange is None:
            self.exchange = self.group.exchange_parts()
        self.whole = model

    def local_spec(self, spec: Any) -> Any:
        return self.shard.local_spec

    def forward(self, what: str) -> AbstractContextManager:
        self._refuse_beside_engine()
        return self.group.forward(what)

    def loading(self, what: str) -> AbstractContextManager:
        return self.group.loading(what)

    def decode(self, state: Any, what: tuple) -> Ranks:
        self._refuse_beside_engine()
        return Ranks(self.group, state, what)

    def engine(self, what: str) -> Plans:
        self._refuse_beside_engine()
        self._engine = Plans(self.group, what, self._end_engine)
        return self._engine

    def lanes(self) -> AbstractContextManager:
        return self._lanes.open(self.most_lanes)

    @property
    def num_lanes(self) -> int:
        return self._lanes.count

    def least(self, what: str, value: int) -> int:
        self._refuse_beside_engine()
        return self.group.least(what, value)

    def whole_logits(self, part: Tensor) -> Tensor:
        return self.head.whole_logits(part)

    def _end_engine(self) -> None:
        self._engine = None

    def _refuse_beside_engine(self) -> None:
        """The other ranks wait for what an engine tells them, and would come to nothing else."""
        if self._engine is not None:
            raise RuntimeError(
                f"model: expected no open engine on its {self.size} ranks, got one: they decode what it is "
                "given alone, until it is closed"
            )


def share_of(model: Any) -> Share:
    """Of a model, or of what stands for one."""
    return getattr(model, "share", WHOLE)
