"""Data of the block-causal model: texts of several problems, rows, and what a step draws of them."""

import random

import numpy as np
import pytest
import torch

from blockbatch import tiny
from blockbatch.tasks.built_in.several import check_answers, draw_texts, join, split_answers
from blockbatch.tiny.block_corpus import (
    LENGTHS,
    LONGEST,
    SINGLE_LENGTH,
    BlockSampler,
    RowBuilder,
    TextRows,
    several_rows,
)
from blockbatch.tiny.tokenizer import EOS, load_tokenizer


@pytest.fixture(scope="module")
def problems():
    drawn = [p for family in tiny.FAMILIES for p in tiny.generate_problems(family, "train", 120, seed=4)]
    return random.Random(0).sample(drawn, len(drawn))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def rows():
    return RowBuilder(4000, seed=1).result()


def test_answers_of_a_joined_text_are_those_of_its_problems(problems):
    prompt, answer = join(problems[:12])
    assert all(problem.prompt in prompt for problem in problems[:12])
    assert split_answers(answer, 12) == [problem.answer for problem in problems[:12]]


def test_each_answer_of_a_text_is_checked(problems):
    some = [problem for problem in problems if problem.family != "code"][:5]
    _, answer = join(some)
    assert check_answers(some, answer) == [True] * 5
    spoiled = answer.replace(some[3].answer, some[3].answer[: len(some[3].answer) // 2])
    assert check_answers(some, spoiled) == [True, True, True, False, True]
    assert check_answers(some, answer[: answer.index("[5]")]) == [True, True, True, True, False]


def test_missing_and_foreign_heads_do_not_move_other_answers():
    text = "[1]\none\n[3]\nthree [2]\n[[5]]\n[4]\nfour\n\n"
    assert split_answers(text, 4) == ["one", "", "three [2]\n[[5]]", "four"]
    assert split_answers("", 2) == ["", ""]
    assert split_answers("[2]\nb\n[1]\na", 2) == ["a", ""]


def test_a_text_needs_a_problem():
    with pytest.raises(ValueError, match="problems: expected at least one"):
        join([])


def test_rows_of_several_problems_are_the_tokens_of_their_text(problems, tokenizer):
    prompts = [tokenizer.encode(problem.prompt).ids for problem in problems]
    answers = [tokenizer.encode(problem.answer).ids for problem in problems]
    made = several_rows(prompts, answers, random.Random(1))
    by_answer = {problem.answer: problem for problem in problems}
    assert len(made) > 10
    used = 0
    for prompt_ids, answer_ids in made:
        assert len(prompt_ids) + len(answer_ids) < LONGEST
        text = tokenizer.decode(answer_ids, skip_special_tokens=False)
        count = sum(
            line.startswith("[") and line.endswith("]") and line[1:-1].isdigit() for line in text.split("\n")
        )
        used += count
        prompt, answer = join([by_answer[part] for part in split_answers(text, count)])
        assert tokenizer.encode(prompt).ids == prompt_ids
        assert tokenizer.encode(answer).ids == answer_ids
    assert len(problems) - 60 <= used <= len(problems)


def test_joined_rows_keep_their_order():
    first = TextRows.of([([1, 2], [3]), ([4], [5, 6])])
    second = TextRows.of([([7], [8])])
    both = TextRows.joined([first, second])
    assert both.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert both.starts.tolist() == [0, 3, 6, 8] and both.prompt_ends.tolist() == [2, 1, 1]


def test_rows_are_drawn_again_from_the_same_seed(rows):
    again, other = RowBuilder(4000, seed=1).result(), RowBuilder(4000, seed=2).result()
    assert np.array_equal(again.tokens, rows.tokens) and np.array_equal(again.starts, rows.starts)
    assert not np.array_equal(other.tokens[:1000], rows.tokens[:1000])


def test_every_length_has_rows(rows, tokenizer):
    sampler = BlockSampler(rows, torch.device("cpu"), tokenizer.token_to_id(EOS), seed=1)
    assert [length for length, _, _ in sampler.plans] == list(LENGTHS)
    assert sampler.plans[-1][2] == len(rows.prompt_ends)


def test_a_step_draws_rows_that_fill_its_length(rows, tokenizer):
    eos = tokenizer.token_to_id(EOS)
    sampler = BlockSampler(rows, torch.device("cpu"), eos, seed=1)
    stored = {
        tuple(rows.tokens[begin:end].tolist()): int(prompt)
        for begin, end, prompt in zip(rows.starts, rows.starts[1:], rows.prompt_ends)
    }
    seen = set()
    for _ in range(60):
        tokens, prompt_ends, content_ends = sampler.draw(3072, single=False)
        length = tokens.shape[1]
        seen.add(length)
        assert tokens.numel() == 3072
        row = int(torch.randint(len(tokens), ()))
        end = int(content_ends[row])
        assert stored[tuple(tokens[row, :end].tolist())] == int(prompt_ends[row])
        assert (tokens[row, end:] == eos).all() and end < length
        shorter = [other for other in LENGTHS if other < length]
        assert not shorter or end >= max(shorter)
    assert {96, 128, 1536} & seen and len(seen) > 5
    assert all(sampler.draw(3072, single=True)[0].shape[1] <= SINGLE_LENGTH for _ in range(20))


def test_texts_of_a_test_use_each_problem_once(problems):
    texts = draw_texts(problems, 7, seed=1)
    assert len(texts) == len(problems) // 7 and all(len(text) == 7 for text in texts)
    assert len({problem.prompt for text in texts for problem in text}) == 7 * len(texts)
    assert draw_texts(problems, 7, seed=1) == texts != draw_texts(problems, 7, seed=2)
