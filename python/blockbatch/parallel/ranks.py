"""What a decode does so that all ranks of a model decode the same: nothing, where there is one."""

from __future__ import annotations

from typing import Any

import torch

from blockbatch.parallel import digest
from blockbatch.parallel.group import RankGroup

# Forwards between two comparisons of the ranks' states.
INTERVAL = 16


class _Alone:
    """Of a model on one device: no step does anything."""

    def __enter__(self) -> _Alone:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def sample(self) -> None:
        pass

    def compare(self, running: int) -> None:
        pass


ALONE = _Alone()


class Ranks:
    """Of one decode on several ranks. A forward, with the wait for it, runs inside of `with ranks`.

    Args:
        group: the model's.
        state: the batch's `BranchState`, or a `HostDigest`.
        what: what is decoded how; its texts are compared at once.
    """

    def __init__(self, group: RankGroup, state: Any, what: tuple) -> None:
        group.agree("the start of a decode (prompts and settings)", digest.of_text(repr(what)))
        self._group, self._digest = group, digest.of_state(state)
        on_gpu = group.device.type == "cuda"
        self._host = torch.zeros((), dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        self._forwards, self._sampled = 0, False
        self._around: Any = None

    def __enter__(self) -> Ranks:
        self._forwards += 1
        self._around = self._group.forward(f"forward {self._forwards} of a decode")
        self._around.__enter__()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._around.__exit__(*error)

    def sample(self) -> None:
        """Every `INTERVAL` forwards starts the copy of a digest; the wait for the plan covers it."""
        if self._forwards % INTERVAL == 0:
            self._copy()

    def compare(self, running: int) -> None:
        """Compares what was sampled; at the end of the decode in any case.

        Args:
            running: requests that go on.

        Raises:
            RankError: the ranks' states differ.
        """
        if not self._sampled and running:
            return
        if not self._sampled:
            self._copy()
            if self._group.device.type == "cuda":
                torch.cuda.current_stream(self._group.device).synchronize()
        self._sampled = False
        self._group.agree(f"the state of the decode after forward {self._forwards}", int(self._host))

    def _copy(self) -> None:
        self._host.copy_(self._digest.compute(), non_blocking=True)
        self._sampled = True
