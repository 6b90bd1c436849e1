"""Log-probabilities of an answer's tokens: the log of how sure the model was when it committed each.

That is the model's own probability of the token in the forward that committed it, given the canvas as it
was then, not given the tokens before it as of a model that writes left to right. Other tokens' logits are
not kept.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from blockbatch.models.tokenizer import REPLACEMENT, IncrementalDecoder, Tokenizer


def logarithm(confidence: float) -> float:
    """Its natural logarithm, finite also where the probability is none that a float has."""
    return math.log(max(confidence, sys.float_info.min))


class TokenLogprob(NamedTuple):
    """One token of an answer.

    Attributes:
        token: its text alone; of a part of a character the replacement character.
        logprob: see the module.
        offset: characters of the answer before it.
    """

    token: str
    logprob: float
    offset: int


class TokenLogprobs:
    """Tells each token of a growing answer once, as soon as its text is settled.

    Args:
        tokenizer: of the model.

    Attributes:
        told: all so far.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._decoder = tokenizer, IncrementalDecoder(tokenizer)
        self._read = 0  # tokens whose text is counted
        self._length = 0  # of that text
        self._offsets: list[int] = []
        self.told: list[TokenLogprob] = []

    def push(
        self, tokens: Sequence[int], confidences: Sequence[float], settled: int | None
    ) -> list[TokenLogprob]:
        """The tokens that are new.

        Args:
            tokens: all of the answer that are final.
            confidences: of these.
            settled: characters of the answer that are; None: it has ended with these tokens.
        """
        new = []
        while len(self.told) < len(tokens):
            place = len(self.told)
            if self._read == place:
                self._offsets.append(self._length)
                self._length += len(self._decoder.push([tokens[place]]))
                self._read += 1
            if settled is not None and self._length > settled:
                break
            text = self._tokenizer.decode([tokens[place]], skip_special=False)
            new.append(TokenLogprob(text, logarithm(confidences[place]), self._offsets[place]))
            self.told.append(new[-1])
        return new


def of_chat(tokens: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    """As choices of a chat have them; None: nobody asked."""
    if tokens is None:
        return None
    content = [
        {
            "token": one.token,
            "logprob": one.logprob,
            "bytes": None if REPLACEMENT in one.token else list(one.token.encode()),
            "top_logprobs": [],
        }
        for one in tokens
    ]
    return {"content": content, "refusal": None}


def of_completion(tokens: Sequence[TokenLogprob] | None, top: bool) -> dict[str, Any] | None:
    """As choices of a completion have them.

    Args:
        top: whether `top_logprobs` name the token itself, the only one that is known.
    """
    if tokens is None:
        return None
    return {
        "tokens": [one.token for one in tokens],
        "token_logprobs": [one.logprob for one in tokens],
        "top_logprobs": [{one.token: one.logprob} for one in tokens] if top else None,
        "text_offset": [one.offset for one in tokens],
    }
