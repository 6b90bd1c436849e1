"""What rank 0 tells the others before every forward of an engine, and what all of them compare."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from multiprocessing import connection
from typing import Any

import torch

from blockbatch.parallel import digest
from blockbatch.parallel.group import RankGroup
from blockbatch.parallel.ranks import INTERVAL
from blockbatch.parallel.watch import RankError, meet

# How often a rank that waits for a plan looks whether the others are still there.
_LOOK_SECONDS = 0.25
# That rank 0 waits at most until the others have taken note of the end.
_LAST_SECONDS = 10.0


class Plans:
    """Plans from rank 0 to the others, who wait for them as long as it takes; all ranks make it at one time.

    Rank 0 waits for nobody when it tells a plan: messages go one way, by a connection to each of the others.

    Attributes:
        rank, size: of this process.
        settled: whether there is no forward behind which states were not compared yet.

    Args:
        group: the model's.
        what: what all of them do; its texts are compared at once.
        closed: called when it ends.
    """

    def __init__(self, group: RankGroup, what: str, closed: Callable[[], None]) -> None:
        group.agree("the start of an engine (its options)", digest.of_text(what))
        self.rank, self.size, self._group, self._closed = group.rank, group.size, group, closed
        self._peers = meet(group.rank, group.size, group.from_first)
        for peer in self._peers.values():
            _send_at_once(peer)
        on_gpu = group.device.type == "cuda"
        self._host = torch.zeros((), dtype=torch.int64, device="cpu", pin_memory=on_gpu)
        self._digests: list[tuple[Any, digest.StateDigest | digest.HostDigest]] = []
        self._forwards, self._sampled = 0, -1
        self._calls: list[Callable[[str], None]] = []
        self.settled = True

    def check(self) -> None:
        """Raises RankError if a rank failed."""
        self._group.watch.check()

    def when_failed(self, call: Callable[[RankError], None]) -> None:
        """`call` hears of the first failure of another rank, on a thread of the watch, until `close`."""

        def tell(message: str) -> None:
            call(RankError(message))

        self._calls.append(tell)
        self._group.watch.when_failed(tell)

    def fail(self, error: BaseException) -> None:
        """Tells the others that this rank cannot go on."""
        if not isinstance(error, RankError):
            self._group.watch.fail(str(error).strip().split("\n")[0] or type(error).__name__)

    def tell(self, plan: bytes) -> None:
        """Sends a plan to all others.

        Raises:
            RankError: one of them ended, or a rank failed.
        """
        self.check()
        for rank, peer in self._peers.items():
            try:
                peer.send_bytes(plan)
            except OSError:
                raise self._lost(f"rank {rank} ended") from None

    def hear(self) -> bytes:
        """The next plan of rank 0, which may take any time to come.

        Raises:
            RankError: a rank failed, or rank 0 ended without a last plan.
        """
        peer = self._peers[0]
        try:
            while not peer.poll(_LOOK_SECONDS):
                self.check()
            return peer.recv_bytes()
        except (EOFError, OSError):
            raise self._lost("rank 0 ended before it closed its engine") from None

    def forward(self) -> AbstractContextManager:
        """Around what waits for the other ranks, see `RankGroup.forward`."""
        return self._group.forward(f"step {self._forwards + 1} of the engine")

    def sample(self, states: Sequence[Any]) -> None:
        """Within a forward, behind its launches: every `INTERVAL` of them starts the copy of a digest.

        Args:
            states: records as `digest.of_state` takes them.
        """
        self._forwards += 1
        self.settled = False
        if self._forwards % INTERVAL == 0:
            self._copy(states)

    def compare(self) -> None:
        """Behind the wait for a forward: compares what an earlier one sampled. No wait for the device.

        Raises:
            RankError: the ranks' states differ.
        """
        if 0 <= self._sampled < self._forwards:
            self._agree()

    def settle(self, states: Sequence[Any]) -> None:
        """Compares the states as they are; waits for the device."""
        self._copy(states)
        if self._group.device.type == "cuda":
            torch.cuda.current_stream(self._group.device).synchronize()
        self._agree()
        self.settled = True

    def wait_for_others(self) -> None:
        """Behind the last plan, until the others have closed: a rank that ends sooner could take with it what
        one of them has yet to read."""
        for peer in self._peers.values():
            with suppress(EOFError, OSError):
                if peer.poll(_LAST_SECONDS):
                    peer.recv_bytes()

    def close(self) -> None:
        """The end of all plans."""
        self.settled = True  # nobody is left to compare with
        peers, self._peers = self._peers, {}
        calls, self._calls = self._calls, []
        for call in calls:
            self._group.watch.forget(call)
        for peer in peers.values():
            peer.close()
        if peers:
            self._closed()

    def _agree(self) -> None:
        self._group.agree(f"the state of the engine after forward {self._sampled}", int(self._host))
        self._sampled = -1

    def _copy(self, states: Sequence[Any]) -> None:
        known = self._digests
        self._digests = [
            next((pair for pair in known if pair[0] is state), None) or (state, digest.of_state(state))
            for state in states
        ]
        total = torch.zeros((), dtype=torch.int64, device=self._group.device)
        for _, made in self._digests:
            total = total * 3 + made.compute()
        self._host.copy_(total, non_blocking=True)
        self._sampled = self._forwards

    def _lost(self, message: str) -> RankError:
        """Why a connection broke: what the watch heard, or `message`."""
        return RankError(self._group.watch.wait_for_failure(1.0) or message)


def _send_at_once(peer: connection.Connection) -> None:
    """Keeps the system from holding back a small message until the one before is acknowledged."""
    with socket.fromfd(peer.fileno(), socket.AF_INET, socket.SOCK_STREAM) as same:
        same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
