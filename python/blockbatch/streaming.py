"""The text of a running decode, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from blockbatch.decoding import BlockSession, NonFiniteLogitsError, Session
from blockbatch.result import Result
from blockbatch.stops import PrefixReader
from blockbatch.tracing import Record


class Stream(Iterator[str]):
    """The pieces of one text, each as soon as no branch can change it; `blockbatch.stream` makes one.

    Asking for a piece runs as many forwards as it takes. The pieces together are `result.text`. By `close()`,
    when a `with` block is left, and when nothing refers to the stream any more, the decode ends where it is
    and gives back what it holds.

    Attributes:
        result: what `generate` would return, once the last piece was read. None before, and for good if the
            stream was closed earlier.
    """

    def __init__(
        self,
        session: Session | BlockSession,
        recorder: Any,
        reader: PrefixReader,
        finish: Callable[[Session | BlockSession, list[Record] | None], Result],
    ) -> None:
        """
        Args:
            session: of one prompt, before its first forward.
            recorder: of the session; None: no trace.
            reader: of the session's tokens.
            finish: makes the result of the finished session and its trace.
        """
        self.result: Result | None = None
        self._running: tuple[Session | BlockSession, Any] | None = (session, recorder)
        self._reader, self._finish = reader, finish
        self._length = 0  # characters that are out

    def __next__(self) -> str:
        """The next piece, never an empty one.

        Raises:
            MemoryError, NonFiniteLogitsError: as of `generate`; the stream is closed then.
        """
        failed = None
        try:
            piece = self._next_piece()
        except NonFiniteLogitsError as error:
            # Its traceback would hold the session, and with it the cache that the next decode is to have.
            failed = error.with_traceback(None)
        except BaseException:
            self.close()
            raise
        if failed is not None:
            self.close()
            raise failed
        if not piece:
            raise StopIteration
        return piece

    def _next_piece(self) -> str:
        piece = ""
        while self._running is not None and not piece:
            session, recorder = self._running
            if (step := session.step()) is not None:
                if recorder:
                    recorder.add(step)
                piece = self._reader.push(session.final_prefixes()[0])
            else:
                self.result = self._finish(session, recorder.traces[0] if recorder else None)
                piece = self.result.text[self._length :]
                self.close()
        self._length += len(piece)
        return piece

    def close(self) -> None:
        """Ends the decode where it is; nothing where it has ended."""
        self._running = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
