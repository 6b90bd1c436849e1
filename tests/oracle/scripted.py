"""A fake model whose logits are a seeded hash, tuned to make the events of the decoding methods frequent."""

import numpy as np
import torch


def mix(x):
    """splitmix64's finaliser on a uint64 array."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class ScriptedModel:
    """Logits as a function of a row's tokens *as they were when each position was last computed*.

    That is what a K/V cache remembers, so the "K/V row" here is that list of tokens, and a decoder which
    computes the wrong positions, or keeps a cache too long, gets other logits everywhere. Positions never
    computed hold -1.

    A position p predicts a target token: with probability `agreement` one that depends on p alone (branches
    then agree and merge), otherwise one that depends on the whole row too; that token is an EOS with
    probability `eos_rate`, MASK with `mask_rate`. Its logit stands above uniform noise by a margin drawn
    from `peak` (low, high), half by position and half by row: with 23 tokens 0..2 means confidences around
    0.2, 1..8 everything up to 0.99, 7..10 nearly sure.

    The last id is MASK, the `eos_count` before it are EOS. prediction_offset 1 shifts predictions as Dream
    does.
    """

    def __init__(
        self, seed=0, *, vocab_size=23, peak=(1.0, 8.0), agreement=0.8, eos_rate=0.02, mask_rate=0.0,
        eos_count=1, prediction_offset=0, suppress_mask=False,
    ):  # fmt: skip
        self.seed, self.vocab_size, self.peak = seed, vocab_size, peak
        self.agreement, self.eos_rate, self.mask_rate = agreement, eos_rate, mask_rate
        self.prediction_offset, self.suppress_mask = prediction_offset, suppress_mask
        self.mask_token_id = vocab_size - 1
        self.eos_token_ids = frozenset(range(vocab_size - 1 - eos_count, vocab_size - 1))

    def new_row(self, length):
        return np.full(length, -1, dtype=np.int64)

    def copy_row(self, row):
        return row.copy()

    def forward(self, token_ids, positions, row):
        """Logits, a float32 tensor [n, vocab_size]; `row` is *written* at `positions`."""
        row[list(positions)] = token_ids
        return self.logits(row, positions)

    def logits(self, row, positions):
        """Logits [n, vocab_size] at `positions` given the tokens last seen at every position of the row."""
        places = np.arange(len(row), dtype=np.uint64)
        seen = np.asarray(row, dtype=np.int64).astype(np.uint64)
        context = mix(self._hash(1, places) ^ mix(seen + np.uint64(7))).sum(
            dtype=np.uint64
        )  # whole row, by position
        places = np.asarray(list(positions), dtype=np.uint64)
        by_place = self._hash(2, places)
        by_row = mix(by_place ^ mix(context[None]))

        agrees = self._uniform(by_row, 3) < self.agreement
        source = np.where(agrees, by_place, by_row)
        ordinary = self.vocab_size - 1 - len(self.eos_token_ids)
        target = (self._draw(source, 4) % np.uint64(ordinary)).astype(np.int64)
        which_eos = (self._draw(source, 5) % np.uint64(len(self.eos_token_ids))).astype(np.int64)
        target = np.where(self._uniform(source, 6) < self.eos_rate, ordinary + which_eos, target)
        target = np.where(self._uniform(by_row, 7) < self.mask_rate, self.mask_token_id, target)

        low, high = self.peak
        margin = low + (high - low) * (self._uniform(by_place, 8) + self._uniform(by_row, 9)) / 2
        tokens = np.arange(self.vocab_size, dtype=np.uint64)
        noise = self._uniform(mix(by_row[:, None] ^ self._hash(10, tokens)[None]), 11)  # [n, vocab_size]
        noise[:, ordinary:] -= (
            1.0  # below every ordinary token, so that EOS and MASK come at their rates only
        )
        logits = noise + np.where(tokens.astype(np.int64)[None] == target[:, None], margin[:, None], 0.0)
        return torch.from_numpy(logits.astype(np.float32))

    def _hash(self, stream, values):
        key = np.array([self.seed * 64 + stream], dtype=np.uint64)
        return mix(mix(key) + mix(values + np.uint64(1)))

    def _draw(self, hashes, stream):
        return mix(hashes ^ mix(np.array([stream], dtype=np.uint64)))

    def _uniform(self, hashes, stream):
        return (self._draw(hashes, stream) >> np.uint64(40)).astype(np.float64) / 2.0**24
