"""Who of the ranks is still there: a connection of every rank to rank 0 that only its end takes down.

The operating system closes a dead process's connections at once, so the others know of it without asking. A
rank that fails says why before it closes.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import connection
from typing import NoReturn

# Between a failure and the end of a process that is still in a forward, where it waits for the others.
_GRACE_SECONDS = 3.0
_POLL_SECONDS = 0.25
# From the first rank's word where it listens to the last connection.
_MEET_SECONDS = 60.0
EXIT_STATUS = 70


class RankError(RuntimeError):
    """The ranks of a model cannot go on together: one ended, failed, or does something else than the others.

    No forward of this model can run any more, on any rank.
    """


class Watch:
    """Tells a rank of the failure of another.

    Args:
        rank, size: of this process.
        exchange: gives every rank the text that rank 0 passed to it.
        stall_seconds: how long a forward may take at most.
    """

    def __init__(self, rank: int, size: int, exchange: Callable[[str], str], *, stall_seconds: float) -> None:
        self.rank, self._stall_seconds = rank, stall_seconds
        self.failure: str | None = None
        self._lock = threading.Lock()
        # What this rank is in, for messages, and since when; None: nothing that waits for the others.
        self._busy: tuple[str, float] | None = None
        self._closed = False
        self._listeners: list[Callable[[str], None]] = []
        self._peers = meet(rank, size, exchange)
        self._thread = threading.Thread(target=self._run, name="blockbatch-ranks", daemon=True)
        self._thread.start()

    def enter(self, what: str, *, patient: bool = False) -> None:
        """From now on this rank waits for the others, in `what`; `patient`: however long.

        Raises:
            RankError: a rank failed before.
        """
        self.check()
        self._busy = what, float("inf") if patient else time.monotonic()

    def leave(self) -> None:
        self._busy = None

    def check(self) -> None:
        """Raises RankError if a rank failed."""
        if self.failure is not None:
            raise RankError(self.failure)

    def fail(self, message: str) -> None:
        """Tells the others that this rank cannot go on."""
        self._fail(f"rank {self.rank}: {message}")

    def when_failed(self, call: Callable[[str], None]) -> None:
        """`call` gets, on the watch's thread, the failure that another rank tells, or that this one finds
        while it waits for others."""
        with self._lock:
            self._listeners.append(call)
            failure = self.failure
        if failure is not None:
            call(failure)

    def forget(self, call: Callable[[str], None]) -> None:
        """`call` is to hear nothing any more."""
        with self._lock:
            self._listeners = [other for other in self._listeners if other is not call]

    def wait_for_failure(self, seconds: float) -> str | None:
        """The failure, which may come some moments behind what it causes."""
        end = time.monotonic() + seconds
        while self.failure is None and time.monotonic() < end:
            time.sleep(0.02)
        return self.failure

    def close(self) -> None:
        """The end of this rank is none of a failure."""
        self._closed = True
        with self._lock:
            for peer in self._peers.values():
                try:
                    peer.send_bytes(b'{"bye": true}')
                except OSError:
                    pass

    def _fail(self, message: str, source: int | None = None) -> None:
        with self._lock:
            if self.failure is not None:
                return
            self.failure = message
            for rank, peer in self._peers.items():
                if rank != source:
                    try:
                        peer.send_bytes(json.dumps({"failed": message}).encode())
                    except OSError:
                        pass

    def _found(self, message: str, source: int | None = None) -> None:
        """A failure that the thread in the forward may not hear of."""
        self._fail(message, source)
        with self._lock:
            told, self._listeners = self._listeners, []
        for call in told:
            call(self.failure)

    def _run(self) -> None:
        peers = {peer: rank for rank, peer in self._peers.items()}
        failed_at = None
        while not self._closed:
            for peer in connection.wait(list(peers), timeout=_POLL_SECONDS) if peers else ():
                self._hear(peers, peer)
            if not peers:
                time.sleep(_POLL_SECONDS)
            busy, now = self._busy, time.monotonic()
            if busy is not None and self.failure is None and now - busy[1] > self._stall_seconds:
                self._found(
                    f"rank {self.rank}: expected {busy[0]} to end within {self._stall_seconds:g} s, it has "
                    "not: a rank stands still, or the ranks are at different forwards"
                )
            if self.failure is None or busy is None:
                failed_at = None
            else:
                failed_at = failed_at or now
                if now - failed_at > _GRACE_SECONDS:
                    self._end()

    def _hear(self, peers: dict, peer: connection.Connection) -> None:
        rank = peers[peer]
        try:
            message = json.loads(peer.recv_bytes())
        except (EOFError, OSError):
            del peers[peer]
            if not self._closed:
                self._found(f"rank {rank} ended", source=rank)
            return
        if "failed" in message:
            self._found(message["failed"], source=rank)
        elif "bye" in message:
            del peers[peer]

    def _end(self) -> NoReturn:
        """Ends a process whose main thread waits for ranks that never come, in a call that nothing breaks."""
        print(f"blockbatch: error: {self.failure}", file=sys.stderr, flush=True)
        os._exit(EXIT_STATUS)


def meet(rank: int, size: int, exchange: Callable[[str], str]) -> dict[int, connection.Connection]:
    """Connections from rank 0 to each of the others, by their ranks; theirs to rank 0.

    Args:
        rank, size: of this process.
        exchange: gives every rank the text that rank 0 passed to it.

    Raises:
        RankError: on rank 0, when the others did not come.
    """
    if rank > 0:
        port, key = json.loads(exchange(""))
        peer = connection.Client(("127.0.0.1", port), authkey=key.encode())
        peer.send_bytes(str(rank).encode())
        return {0: peer}
    key, peers = secrets.token_hex(16), {}
    with connection.Listener(("127.0.0.1", 0), authkey=key.encode(), backlog=size) as listener:
        exchange(json.dumps([listener.address[1], key]))

        def accept() -> None:
            for _ in range(size - 1):
                peer = listener.accept()
                peers[int(peer.recv_bytes())] = peer

        # Nothing else bounds how long it waits for a connection.
        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        accepting.join(_MEET_SECONDS)
        if len(peers) < size - 1:
            others, found = size - 1, len(peers)
            raise RankError(f"rank 0: expected {others} others within {_MEET_SECONDS:g} s, got {found}")
    return peers
