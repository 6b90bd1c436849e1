"""Admission: requests begin in order, pages are never reserved twice, and nobody waits for ever."""

import itertools
import random
from collections import deque
from types import SimpleNamespace

import pytest

from blockbatch.decoding.admission import (
    LOAD_TOKENS,
    MOST_OVERTAKEN,
    Admission,
    branches_under_load,
    drafts_under_load,
    fewer_sizes,
    rows_within,
)
from blockbatch.decoding.requests import QueueFullError, RequestTooLargeError

SIZES = (4, 8, 16, 32, 64, 128)


class Seat(SimpleNamespace):
    __hash__ = object.__hash__
    __eq__ = object.__eq__


def seat(pages, number=0):
    request = SimpleNamespace(prompt=[0] * number, branches=1)
    return Seat(pages=pages, request=request, config=SimpleNamespace(gen_length=8), number=number)


@pytest.mark.parametrize("seed", range(20))
def test_random_arrivals_never_over_reserve_and_never_starve(seed):
    rng = random.Random(seed)
    num_pages, most = rng.randint(20, 60), rng.randint(1, 8)
    admission = Admission(most, rng.randint(1, 200), num_pages)
    running, overtaken, waiting_for, begun = {}, {}, deque(), 0
    for turn in itertools.count():
        if turn >= 1000 and not (waiting_for or running):
            break
        assert turn < 10_000, "somebody waits for ever"
        for _ in range(rng.choice((0, 0, 1, 3)) if turn < 1000 else 0):
            pages = rng.choice((1, 2, 5, num_pages // 2, num_pages, num_pages + 1))
            new = seat(pages, turn)
            if pages > num_pages:
                with pytest.raises(RequestTooLargeError):
                    admission.add(new)
                continue
            try:
                admission.add(new)
            except QueueFullError as full:
                assert full.retry_after >= 1
                assert len(admission.waiting) >= admission.max_queue
                continue
            waiting_for.append(new)
            overtaken[new] = 0
        if waiting_for and rng.random() < 0.02:
            gone = rng.choice(list(waiting_for))
            assert admission.remove(gone) and not admission.remove(gone)
            waiting_for.remove(gone)
        admitted = admission.admit()
        for new in admitted:
            first = waiting_for[0]
            if new is not first:
                overtaken[first] += 1
            waiting_for.remove(new)
            running[new] = turn + rng.randint(1, 12)
            begun += 1
        assert list(admission.waiting) == list(waiting_for)
        assert admission.reserved == sum(new.pages for new in running) <= num_pages
        assert admission.running == len(running) <= most
        assert 0 <= admission.usage <= 1
        if not running:
            assert not waiting_for, "an empty engine takes the first in the queue"
        for new in [new for new, end in running.items() if end <= turn]:
            admission.release(new, 1.0)
            del running[new]
    assert admission.reserved == 0 and begun > 100
    assert max(overtaken.values()) <= MOST_OVERTAKEN


def test_small_requests_pass_a_large_one_until_it_has_waited_enough():
    admission = Admission(8, 200, 10)
    admission.add(seat(6))
    (blocker,) = admission.admit()
    large = seat(10)
    admission.add(large)
    for _ in range(MOST_OVERTAKEN):
        admission.add(seat(2))
        (small,) = admission.admit()
        admission.release(small)
    admission.add(seat(2))
    assert admission.admit() == [], "what becomes free is kept for the first in the queue"
    admission.release(blocker)
    assert admission.admit() == [large]
    assert admission.admit() == []


def test_a_place_that_is_free_does_not_count_as_waiting():
    admission = Admission(3, 0, 10)
    for _ in range(3):
        admission.add(seat(1))
    with pytest.raises(QueueFullError):
        admission.add(seat(1))


def test_branches_fall_with_the_requests():
    counts = [branches_under_load(SIZES, requests) for requests in range(1, 65)]
    assert counts[0] == 6 and counts[-1] == 1 and counts == sorted(counts, reverse=True)
    for requests, count in enumerate(counts, start=1):
        assert count == 1 or sum(fewer_sizes(SIZES, count)) * requests <= LOAD_TOKENS
    assert branches_under_load((64,), 1) == branches_under_load((512, 1024), 40) == 1


def test_drafts_end_with_the_load():
    counts = [drafts_under_load(32, (1, 2), requests) for requests in range(1, 9)]
    assert counts[0] and not counts[-1] and counts == sorted(counts, reverse=True)
    assert LOAD_TOKENS // 96 == sum(counts)


def test_fewer_branches_are_those_near_the_usual_size():
    assert [fewer_sizes(SIZES, count) for count in range(1, 7)] == [
        (32,),
        (16, 32),
        (16, 32, 64),
        (8, 16, 32, 64),
        (8, 16, 32, 64, 128),
        SIZES,
    ]


@pytest.mark.parametrize("seed", range(50))
def test_rows_of_a_forward(seed):
    rng = random.Random(seed)
    waiting = [[rng.randint(1, 50) for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(0, 8))]
    budget = rng.randint(-50, 200)
    counts = rows_within(waiting, budget)
    assert len(counts) == len(waiting)
    taken = [tokens for rows, count in zip(waiting, counts) for tokens in rows[:count]]
    if waiting:
        assert counts[0] >= 1, "whoever has waited longest goes on"
        assert sum(taken) <= budget or len(taken) == 1
        # Nothing that comes next would still fit.
        for rows, count in zip(waiting, counts):
            assert count == len(rows) or sum(taken) + rows[count] > budget or not taken
