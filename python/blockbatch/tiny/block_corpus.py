"""Training rows of the block-causal model: single problems, and texts of several.

The problems, their shares and the drills are those of `corpus`. Rows are stored one behind the other, since
they are from 40 to 1500 tokens long.
"""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blockbatch.tasks.built_in import generate_problems
from blockbatch.tasks.built_in.several import REQUEST, answer_head, question
from blockbatch.tiny.corpus import SHARES
from blockbatch.tiny.drills import draw_drill
from blockbatch.tiny.tokenizer import load_tokenizer

# Share of the steps by the longest row in them, EOS included; all other rows of a step nearly fill it.
LENGTHS = {
    96: 0.18,
    128: 0.20,
    192: 0.14,
    256: 0.10,
    384: 0.11,
    512: 0.09,
    768: 0.07,
    1024: 0.05,
    1536: 0.06,
}
SINGLE_LENGTH = 192  # steps up to this length hold single problems
LONGEST = max(LENGTHS)
_SHARD = 4000
_USES = 2  # how often a problem stands in texts of several


@dataclass
class TextRows:
    """Rows of tokens, one behind the other: row i is tokens[starts[i] : starts[i + 1]], without an EOS.

    tokens [total] int16; starts [rows + 1] int64; prompt_ends [rows] int32, counted from the row's start.
    """

    tokens: np.ndarray
    starts: np.ndarray
    prompt_ends: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[tuple[list[int], list[int]]]) -> TextRows:
        """From pairs of prompt ids and answer ids."""
        lengths = [len(prompt) + len(answer) for prompt, answer in rows]
        flat = [token for prompt, answer in rows for part in (prompt, answer) for token in part]
        starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        ends = np.array([len(prompt) for prompt, _ in rows], dtype=np.int32)
        return cls(np.array(flat, dtype=np.int16), starts, ends)

    @classmethod
    def joined(cls, parts: Sequence[TextRows]) -> TextRows:
        """All rows of `parts` in their order."""
        offsets = np.cumsum([0, *(len(part.tokens) for part in parts)])
        starts = [part.starts[:-1] + offset for part, offset in zip(parts, offsets)]
        return cls(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([*starts, offsets[-1:]]),
            np.concatenate([part.prompt_ends for part in parts]),
        )


def several_rows(
    prompts: Sequence[list[int]], answers: Sequence[list[int]], rng: random.Random
) -> list[tuple[list[int], list[int]]]:
    """Texts of several problems, given as token ids; each problem is used once, but for a few left over.

    Lengths are drawn so that each above `SINGLE_LENGTH` gets as many rows as its steps need; a text is filled
    until the next problem does not fit.
    """
    tokenizer = load_tokenizer()
    request = tokenizer.encode(REQUEST).ids
    heads = [
        [tokenizer.encode(text).ids for text in (question(n, ""), answer_head(n))] for n in range(1, 100)
    ]
    lengths = [length for length in LENGTHS if length > SINGLE_LENGTH]
    needs = [LENGTHS[length] / length for length in lengths]
    order = rng.sample(range(len(prompts)), len(prompts))
    rows = []
    while len(order) > 60:  # enough for the longest text
        room = rng.choices(lengths, needs)[0] - 1 - len(request)  # one token for the EOS
        row: tuple[list[int], list[int]] = (list(request), [])
        for asked, answered in heads:
            problem = order[-1]
            parts = asked + prompts[problem], answered + answers[problem]
            room -= len(parts[0]) + len(parts[1])
            if room < 0 or len(order) == 1:
                break
            row[0].extend(parts[0])
            row[1].extend(parts[1])
            order.pop()
        rows.append(row)
    return rows


def _shard(task: tuple[int, int]) -> TextRows:
    seed, index = task
    tokenizer = load_tokenizer()
    seed = seed * 1_000_003 + index
    texts = [
        (problem.prompt, problem.answer)
        for family, share in SHARES.items()
        for problem in generate_problems(family, "train", round(share * _SHARD), seed)
    ]
    problems = len(texts)
    rng = random.Random(f"several {seed}")
    texts += [draw_drill(rng) for _ in range(_SHARD - problems)]
    prompts = [encoding.ids for encoding in tokenizer.encode_batch([prompt for prompt, _ in texts])]
    answers = [encoding.ids for encoding in tokenizer.encode_batch([answer for _, answer in texts])]
    rows = list(zip(prompts, answers))
    for _ in range(_USES):
        rows += several_rows(prompts[:problems], answers[:problems], rng)
    return TextRows.of(rows)


class RowBuilder:
    """Draws about `problems` problems and makes their rows in the background.

    It forks: start it before the GPU is used.
    """

    def __init__(self, problems: int, seed: int) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._pool = multiprocessing.get_context("fork").Pool(os.cpu_count())
        tasks = [(seed, index) for index in range(max(1, problems // _SHARD))]
        self._shards = self._pool.map_async(_shard, tasks, chunksize=1)

    def result(self) -> TextRows:
        """Wait for the rows; the shards stand in their fixed order, however they were shared out."""
        rows = TextRows.joined(self._shards.get())
        self._pool.terminate()
        return rows


class BlockSampler:
    """The rows on the device, sorted by length; chooses each step's length and rows."""

    def __init__(self, rows: TextRows, device: torch.device, eos: int, seed: int) -> None:
        content = np.diff(rows.starts)
        order = np.argsort(content, kind="stable")
        ends = content[order]
        self.tokens = torch.from_numpy(rows.tokens).to(device)
        self.starts = torch.from_numpy(rows.starts[:-1][order]).to(device)
        self.prompt_ends = torch.from_numpy(rows.prompt_ends[order]).to(device)
        self.content_ends = torch.from_numpy(ends).to(device)
        self.eos = eos
        self.generator = torch.Generator(device).manual_seed(seed)
        self._chooser = np.random.default_rng(seed)
        self.plans: list[tuple[int, int, int]] = []  # length, first row, end row
        shares = []
        low = 0
        for length, share in LENGTHS.items():
            high = int(np.searchsorted(ends, length))  # at least one EOS
            if high > low:
                self.plans.append((length, low, high))
                shares.append(share)
            low = high
        self._shares = np.array(shares)

    def draw(self, clean_tokens: int, *, single: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of one length, filled with EOS, of `clean_tokens` tokens together; `single`: no long ones.

        Returns tokens [rows, length] int64, prompt_ends [rows], content_ends [rows].
        """
        lengths = np.array([length for length, _, _ in self.plans])
        shares = np.where(lengths <= SINGLE_LENGTH, self._shares, 0.0) if single else self._shares
        length, low, high = self.plans[self._chooser.choice(len(self.plans), p=shares / shares.sum())]
        index = torch.randint(
            low, high, (clean_tokens // length,), device=self.tokens.device, generator=self.generator
        )
        position = torch.arange(length, device=self.tokens.device)[None]
        content_ends = self.content_ends[index]
        inside = position < content_ends[:, None]
        places = torch.where(inside, self.starts[index][:, None] + position, 0)
        tokens = torch.where(inside, self.tokens[places].long(), self.eos)
        return tokens, self.prompt_ends[index], content_ends
