"""Stop sequences: texts that end a request where they first appear.

A stop sequence counts once every branch holds the tokens that spell it and all before them, since only such a
prefix is final. It may begin and end inside tokens. The text of a stopped request is the text without stop
sequences, cut where the first of them begins; of several that begin at the same place it takes any.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import takewhile

from blockbatch.models.tokenizer import IncrementalDecoder, Tokenizer


class StopScan:
    """Reads a growing text and lets through what no stop sequence can take away any more.

    Args:
        stop: texts, none of them empty.

    Attributes:
        settled: length of the text that has been let through.
        found: whether a stop sequence begins right behind it.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._text = ""
        self.settled = 0
        self.found = False

    def push(self, piece: str) -> str:
        """The text that is settled with `piece`; nothing once a stop sequence was found."""
        self._text += piece
        return self._settle(self._may_begin)

    def finish(self) -> str:
        """What was held back and is settled when no more text comes."""
        return self._settle(lambda at: False)

    def _settle(self, waits: Callable[[int], bool]) -> str:
        begin = self.settled
        while not self.found and self.settled < len(self._text):
            self.found = any(self._text.startswith(stop, self.settled) for stop in self._stop)
            if self.found or waits(self.settled):
                break
            self.settled += 1
        return self._text[begin : self.settled]

    def _may_begin(self, at: int) -> bool:
        """Whether a stop sequence that begins at `at` can be completed by the text to come."""
        rest = len(self._text) - at
        return any(len(stop) > rest and stop.startswith(self._text[at:]) for stop in self._stop)


class PrefixReader:
    """Reads the text of one request as its final tokens come.

    Args:
        tokenizer: of the model.
        stop: texts, none of them empty. One that is a special token of the tokenizer stands for its id, since
            the text does not show it.
        eos_token_ids: ids that end a text; what stands behind one is not read.

    Attributes:
        found: whether the text has come to a stop sequence.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], eos_token_ids: Sequence[int]) -> None:
        self._decoder, self._scan = IncrementalDecoder(tokenizer), StopScan(stop)
        self._stop_ids = _special_ids(tokenizer, stop)
        self._ends = self._stop_ids.union(eos_token_ids)
        self._read = 0
        self.found = False

    def push(self, prefix: Sequence[int]) -> str:
        """The text that is settled with `prefix`: all final tokens of the request, which only ever grow."""
        fresh = _before(prefix[self._read :], self._ends)
        self._read += len(fresh)
        piece = self._scan.push(self._decoder.push(fresh))
        # Behind the ids that were read stands an end, or nothing yet.
        at_stop_id = self._read < len(prefix) and prefix[self._read] in self._stop_ids
        self.found = self._scan.found or at_stop_id
        return piece


class StopSequences:
    """The stop sequences of a batch of requests, for `Session`.

    Args:
        tokenizer, texts, eos_token_ids: see `PrefixReader`.
        num_requests: of the batch.
        spans: for each request start and end of the tokens in which it looks; None: in all.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        texts: Sequence[str],
        eos_token_ids: Sequence[int],
        num_requests: int,
        spans: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        self.texts = tuple(texts)
        self._spans = spans or [(0, None)] * num_requests
        self._readers = [PrefixReader(tokenizer, texts, eos_token_ids) for _ in range(num_requests)]

    def ended(self, prefixes: Sequence[Sequence[int]]) -> list[int]:
        """The requests whose final tokens hold a stop sequence."""
        for reader, prefix, (start, end) in zip(self._readers, prefixes, self._spans, strict=True):
            reader.push(prefix[start:end])
        return [request for request, reader in enumerate(self._readers) if reader.found]


def cut(
    tokenizer: Tokenizer, tokens: list[int], stop: Sequence[str], eos_token_ids: Sequence[int]
) -> tuple[list[int], str, bool]:
    """The ids and the text before the first stop sequence or EOS, and whether a stop sequence ended them.

    A token that begins before the stop sequence and runs into it stays among the ids.
    """
    stop_ids = _special_ids(tokenizer, stop)
    before = _before(tokens, stop_ids.union(eos_token_ids))
    at_stop_id = len(before) < len(tokens) and tokens[len(before)] in stop_ids
    scan = StopScan(stop)
    text = scan.push(tokenizer.decode(before)) + scan.finish()
    if not scan.found:
        return before, text, at_stop_id
    decoder, length, count = IncrementalDecoder(tokenizer), 0, 0
    while length < len(text):
        length += len(decoder.push([before[count]]))
        count += 1
    return before[:count], text, True


def _before(tokens: Sequence[int], ends: Collection[int]) -> list[int]:
    """The ids in front of the first that is one of `ends`."""
    return list(takewhile(lambda token: token not in ends, tokens))


def _special_ids(tokenizer: Tokenizer, stop: Sequence[str]) -> frozenset[int]:
    ids = (tokenizer.token_to_id(text) for text in stop)
    return frozenset(token for token in ids if token is not None and tokenizer.decode([token]) == "")
