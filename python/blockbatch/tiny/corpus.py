"""Training rows: problems drawn and tokenized by many processes, as arrays."""

from __future__ import annotations

import multiprocessing
import os
import random
from dataclasses import dataclass

import numpy as np

from blockbatch.tasks.built_in import generate_problems
from blockbatch.tiny.drills import draw_drill
from blockbatch.tiny.tokenizer import EOS, load_tokenizer

# Code is the easiest family to learn, the symbolic one has the most kinds. The remaining rows are drills.
SHARES = {"arithmetic": 0.32, "code": 0.14, "symbolic": 0.40}
ROW_CAPACITY = 256
_SHARD = 4000


@dataclass
class Corpus:
    """tokens [rows, ROW_CAPACITY] int16 (prompt, answer, EOS fill); the ends [rows] int32."""

    tokens: np.ndarray
    prompt_ends: np.ndarray
    content_ends: np.ndarray


def _shard(task: tuple[int, int]) -> Corpus:
    seed, index = task
    tokenizer = load_tokenizer()
    eos = tokenizer.token_to_id(EOS)
    seed = seed * 1_000_003 + index
    texts = [
        (problem.prompt, problem.answer)
        for family, share in SHARES.items()
        for problem in generate_problems(family, "train", round(share * _SHARD), seed)
    ]
    rng = random.Random(f"drills {seed}")
    texts += [draw_drill(rng) for _ in range(_SHARD - len(texts))]
    prompts = tokenizer.encode_batch([prompt for prompt, _ in texts])
    answers = tokenizer.encode_batch([answer for _, answer in texts])
    tokens = np.full((len(texts), ROW_CAPACITY), eos, dtype=np.int16)
    prompt_ends = np.zeros(len(texts), dtype=np.int32)
    content_ends = np.zeros(len(texts), dtype=np.int32)
    for row, (prompt, answer) in enumerate(zip(prompts, answers)):
        ids = prompt.ids + answer.ids
        prompt_ends[row], content_ends[row] = len(prompt.ids), len(ids)
        tokens[row, : len(ids)] = ids
    return Corpus(tokens, prompt_ends, content_ends)


class CorpusBuilder:
    """Builds a corpus of about `rows` rows in the background. It forks: start it before the GPU is used."""

    def __init__(self, rows: int, seed: int) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._pool = multiprocessing.get_context("fork").Pool(os.cpu_count())
        tasks = [(seed, index) for index in range(max(1, rows // _SHARD))]
        self._shards = self._pool.map_async(_shard, tasks, chunksize=1)

    def result(self) -> Corpus:
        """Wait for the corpus; the shards stand in their fixed order, however they were shared out."""
        shards = self._shards.get()
        self._pool.terminate()
        return Corpus(
            np.concatenate([shard.tokens for shard in shards]),
            np.concatenate([shard.prompt_ends for shard in shards]),
            np.concatenate([shard.content_ends for shard in shards]),
        )
