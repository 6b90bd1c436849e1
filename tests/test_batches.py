"""Buffers that serve one decode after another: chunks of rows, sizes of packs, the pool of runners."""

import gc
from dataclasses import replace

import pytest

import blockbatch
from blockbatch.decoding import METHOD_BUILDERS, RunnerPool, Session, forward
from blockbatch.decoding.graphs import packed_capacity
from plain_models import write_llada


@pytest.mark.parametrize(
    "lengths, limit, chunks",
    [
        ([], 10, []),
        ([0, 0], 10, []),
        ([4, 6, 5], 10, [(0, 2), (2, 3)]),
        ([4, 0, 6, 5], 10, [(0, 3), (3, 4)]),
        ([30, 4, 0, 30], 10, [(0, 1), (1, 2), (3, 4)]),
        ([5, 5, 5, 5], 15, [(0, 3), (3, 4)]),
    ],
)
def test_whole_rows_are_chunked(lengths, limit, chunks):
    assert [(rows.start, rows.stop) for rows in forward._chunks(lengths, limit)] == chunks


def test_packed_capacities_hold_the_pack_and_are_few():
    sizes = [packed_capacity(tokens) for tokens in range(1, 4097)]
    for tokens, size in enumerate(sizes, start=1):
        assert size >= tokens
        assert size == packed_capacity(size), "a capacity is its own capacity"
        assert tokens <= 128 or size < 1.25 * tokens
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 4 + 4 * 5


def test_the_host_knows_how_many_rows_differ(model):
    """After each full forward and in the block steps behind it: as many as there are page tables."""
    config = replace(CONFIG, refresh_interval=2, sync_threshold=32)
    apart = METHOD_BUILDERS["blockbatch"](config, model.spec, (2,))
    session = Session(model, [[1, 2, 3], [4]], apart, 32)
    seen = set()
    while True:
        step = session.step()
        if step is None:
            break
        cache = session.cache
        sources = session._batch._sources
        if step.phase != "block":
            for row, source in enumerate(sources):
                # Shared from the forward on, unless a sync came with it, which only shares more.
                same = cache.page_table[row].equal(cache.page_table[source])
                assert same or step.events.sync_source.ge(0).any()
        assert cache.distinct_rows == len(set(sources))
        seen.add((step.phase, cache.distinct_rows))
    assert ("init", 2) in seen and ("block", 2) in seen
    assert max(count for _, count in seen) > 2, "a refresh of rows that differ"


@pytest.fixture
def model(tmp_path):
    write_llada(tmp_path)
    return blockbatch.load_model(tmp_path, device="cpu")


CONFIG = blockbatch.DecodeConfig(gen_length=32, block_sizes=(4, 8, 32))


def method(model):
    return METHOD_BUILDERS["blockbatch"](CONFIG, model.spec, (2,))


def canvases(session):
    session.run()
    return session.state.tokens.clone()


def test_chunks_do_not_change_a_decode(model, monkeypatch):
    prompts = [[1, 2, 3], [4]]
    whole = canvases(Session(model, prompts, method(model), 32))
    monkeypatch.setitem(blockbatch.decoding.session.ROW_TOKENS, "cpu", 40)
    assert canvases(Session(model, prompts, method(model), 32)).equal(whole)


def test_chunks_of_regions_do_not_change_a_decode(model, monkeypatch):
    """Where every row's queries begin behind its prompt."""
    config = replace(CONFIG, refresh_interval=2, refresh_scope="generation")
    prompts = [[1, 2, 3], [4], [9, 9]]
    built = METHOD_BUILDERS["blockbatch"](config, model.spec, (2,))
    whole = canvases(Session(model, prompts, built, 32))
    for tokens in (33, 64):
        monkeypatch.setitem(blockbatch.decoding.session.ROW_TOKENS, "cpu", tokens)
        assert canvases(Session(model, prompts, built, 32)).equal(whole)


def test_a_runner_serves_one_session_at_a_time_and_starts_anew(model):
    pool = RunnerPool()

    def open_session(prompt):
        return pool.open_session(model, [prompt], method(model), 32, 8)

    alone = {tuple(prompt): canvases(open_session(prompt)) for prompt in ([1, 2, 3], [5], [6, 7, 8, 9])}
    assert len(pool._idle) == 1

    first, second = open_session([1, 2, 3]), open_session([5])
    assert first.cache is not second.cache
    while first.step() is not None:  # in turns
        second.step()
    assert first.state.tokens.equal(alone[1, 2, 3])
    assert canvases(second).equal(alone[5,])
    cache = first.cache
    del first
    assert pool.has(1, method(model), 32, 8) and pool.idle_bytes() == cache.kv.nbytes

    abandoned = open_session([6, 7, 8, 9])
    abandoned.step()
    del abandoned
    assert canvases(open_session([6, 7, 8, 9])).equal(alone[6, 7, 8, 9])


def test_a_failed_decode_leaves_the_runner_usable(model, monkeypatch):
    pool = RunnerPool()
    expected = canvases(pool.open_session(model, [[1, 2, 3]], method(model), 32, 8))
    broken = pool.open_session(model, [[1, 2, 3]], method(model), 32, 8)
    broken.step()
    monkeypatch.setattr(model, "predict", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        broken.step()
    monkeypatch.undo()
    del broken
    gc.collect()  # the traceback may have held the session
    assert len(pool._idle) == 1
    assert canvases(pool.open_session(model, [[1, 2, 3]], method(model), 32, 8)).equal(expected)


def test_room_is_made_by_dropping_the_runner_used_longest_ago(model):
    pool = RunnerPool()
    for longest in (8, 16, 24):
        pool.open_session(model, [[1]], method(model), 32, longest)
    sizes = [runner.batch.cache.kv.nbytes for runner in pool._idle.values()]
    pool.make_room(sizes[0] + 1, 0)
    assert [shape.max_prompt for shape in pool._idle] == [24]
    pool.make_room(0, 0)
    assert len(pool._idle) == 1


@pytest.mark.parametrize("name", METHOD_BUILDERS)
def test_no_block_step_exceeds_the_most_tokens(model, name):
    config = blockbatch.DecodeConfig(method=name, gen_length=64)
    session = Session(
        model, [[1, 2, 3], [4, 5]], METHOD_BUILDERS[name](config, model.spec, (2,)), config.gen_length
    )
    most = session._batch.most_tokens()
    seen = 0
    while (step := session.step()) is not None:
        if step.phase == "block":
            seen = max(seen, step.plan.query_tokens)
    assert 0 < seen <= most
    if name == "blockbatch":
        assert seen == most, "the first block steps compute every window whole"
