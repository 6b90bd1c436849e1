"""Drafts through the public interface: the canvases of decodes without, fewer steps, one branch shown."""

import json
import random
import re
from pathlib import Path

import pytest
import torch

import blockbatch
from blockbatch import branches, generation, memory
from blockbatch.cli import canvas, main
from blockbatch.tiny import FAMILIES, generate_problems
from plain_models import write_dream, write_llada
from test_generation import VOCABULARY, write_tokenizer

DATA = Path(__file__).parent / "data" / "conformance"
SETS = ((1,), (1, 2), (1, 3, 4, 6, 8))
NAMES = ("method", "gen_length", "block_size", "steps", "threshold", "eos_exit")


def recorded():
    """(options, record) of every record of a method that has drafts."""
    for record in json.loads((DATA / "trajectories.json").read_text()):
        if record["method"] == "dual_cache":
            yield {name: record[name] for name in NAMES if name in record}, record
    for record in json.loads((DATA / "open_queries.json").read_text()):
        if record["options"]["method"] != "blockbatch" and record["query_span"] == "window":
            yield {**record["options"], "refresh_scope": record["refresh_scope"]}, record


RECORDED = list(recorded())


@pytest.fixture(scope="module")
def conformance_model():
    return blockbatch.load_model(DATA, device="cpu")


@pytest.fixture(scope="module")
def tiny():
    return blockbatch.load_model("tiny", device="cpu")


def test_there_are_records_of_both_methods():
    kinds = [(options["method"], options.get("threshold", 0.9)) for options, _ in RECORDED]
    assert {("dual_cache", 0.9), ("dual_cache", None), ("local_leap", 0.9)} <= set(kinds) and len(kinds) == 23


@pytest.mark.parametrize("drafts", SETS, ids=str)
def test_recorded_decodes(conformance_model, drafts):
    adopted = 0
    for options, record in RECORDED:
        config = blockbatch.DecodeConfig(**options, drafts=drafts)
        result = blockbatch.generate(conformance_model, record["prompt"], config)
        assert result.canvas == record["canvas"], options
        nfe = record["nfe"] if isinstance(record["nfe"], int) else sum(record["nfe"])
        assert result.nfe.total + result.adopted == nfe
        adopted += result.adopted
    assert adopted > 5


@pytest.mark.parametrize("threshold, gen_length, least", [(0.9, 128, 0.1), (0.99, 64, 0.25)])
def test_problems_of_the_built_in_model(tiny, threshold, gen_length, least):
    prompts = [p.prompt for family in FAMILIES for p in generate_problems(family, "test", 7, 3)][:20]
    options = {"method": "dual_cache", "gen_length": gen_length, "threshold": threshold}
    options["eos_exit"] = "prefix"
    plain = blockbatch.generate(tiny, prompts, blockbatch.DecodeConfig(**options))
    drafted = blockbatch.generate(tiny, prompts, blockbatch.DecodeConfig(**options, drafts=(1, 2, 3)))
    for one, other in zip(plain, drafted, strict=True):
        assert (one.canvas, one.text, one.stop_reason) == (other.canvas, other.text, other.stop_reason)
        assert (one.nfe.init, one.nfe.refresh) == (other.nfe.init, other.nfe.refresh)
        assert one.nfe.block == other.nfe.block + other.adopted
        (mine,), (theirs,) = one.branches, other.branches
        assert (mine.block_size, mine.committed) == (theirs.block_size, theirs.committed)
        assert other.block_size == 32 and one.adopted == 0
    adopted = sum(result.adopted for result in drafted)
    assert adopted >= least * sum(result.nfe.block for result in plain)


@pytest.fixture(params=["llada", "dream"])
def model(request, tmp_path):
    write = {"llada": write_llada, "dream": write_dream}[request.param]
    write(tmp_path, vocab_size=VOCABULARY, sharpness=3.0)
    write_tokenizer(tmp_path)
    return blockbatch.load_model(tmp_path, device="cpu")


def random_prompts(count):
    rng = random.Random(count)
    return [[rng.randrange(VOCABULARY - 2) for _ in range(rng.randrange(3, 30))] for _ in range(count)]


@pytest.mark.parametrize("eos_exit", ["prefix", "window", "none"])
@pytest.mark.parametrize("method", ["dual_cache", "local_leap"])
def test_alone_and_in_batches(model, method, eos_exit):
    """Requests of different lengths that end and refresh at different times, by both families."""
    options = {"method": method, "gen_length": 32, "block_size": 16, "eos_exit": eos_exit}
    options["threshold"] = 0.6
    if method == "local_leap":
        options["leap_threshold"] = 0.4
    prompts = random_prompts(4)
    plain = blockbatch.generate(model, prompts, blockbatch.DecodeConfig(**options))
    for drafts, scope in (((1, 2), "canvas"), ((1, 3, 4, 5), "generation")):
        cheaper = {**options, "refresh_scope": scope}
        if scope == "generation":
            plain = blockbatch.generate(model, prompts, blockbatch.DecodeConfig(**cheaper))
        config = blockbatch.DecodeConfig(**cheaper, drafts=drafts)
        together = blockbatch.generate(model, prompts, config)
        alone = blockbatch.generate(model, prompts[1], config)
        same = together[1]
        assert sum(result.adopted for result in together) > 1
        assert (alone.canvas, alone.nfe, alone.branches) == (same.canvas, same.nfe, same.branches)
        for one, other in zip(plain, together, strict=True):
            assert (one.canvas, one.stop_reason) == (other.canvas, other.stop_reason)
            assert one.nfe.total == other.nfe.total + other.adopted


def decoded_problem(tiny):
    """A prompt of the built-in model, settings with drafts at which it adopts some, and its text."""
    options = {"method": "dual_cache", "gen_length": 64, "threshold": 0.99, "eos_exit": "prefix"}
    prompt = generate_problems("symbolic", "test", 5, 21)[4].prompt
    text = blockbatch.generate(tiny, prompt, blockbatch.DecodeConfig(**options)).text
    return prompt, {**options, "drafts": (1, 2, 4)}, text


def test_streams(tiny):
    prompt, options, text = decoded_problem(tiny)
    pieces = list(blockbatch.stream(tiny, prompt, blockbatch.DecodeConfig(**options)))
    assert "".join(pieces) == text and len(pieces) > 3


def test_a_final_prefix_is_that_of_the_branch(tiny):
    prompt, options, _ = decoded_problem(tiny)
    session = generation.open_session(tiny, tiny.tokenizer.encode(prompt), blockbatch.DecodeConfig(**options))
    differing, before = 0, []
    while session.step() is not None:
        prefix = generation.final_prefix(session)
        assert prefix[: len(before)] == before
        row = session.state.tokens[0].tolist()
        assert row[: len(prefix)] == prefix
        assert len(prefix) == 64 or row[len(prefix)] == tiny.spec.mask_token_id
        differing += bool((session.state.tokens[1:] != session.state.tokens[0]).any())
        view = canvas.read_view(session)
        assert view.tokens == [row] and view.block_sizes == [32] and view.leader == 0
        before = prefix
    assert differing > 3


def test_stop_sequences(tiny):
    prompt, options, text = decoded_problem(tiny)
    stop = (text[len(text) // 3 :][:3],)
    config = blockbatch.DecodeConfig(**options, stop=stop)
    result = blockbatch.generate(tiny, prompt, config)
    plain = blockbatch.generate(
        tiny, prompt, blockbatch.DecodeConfig(**{**options, "drafts": None}, stop=stop)
    )
    assert (result.text, result.tokens, result.stop_reason) == (plain.text, plain.tokens, "stop")
    assert result.text == text.split(stop[0])[0] and result.nfe.total < plain.nfe.total
    assert len(result.branches) == 1
    assert "".join(blockbatch.stream(tiny, prompt, config)) == result.text


def test_requests_that_are_ended_from_outside_keep_their_branch(tiny):
    config = blockbatch.DecodeConfig(method="dual_cache", gen_length=64, drafts=(1, 2))
    session = generation._session(tiny, [[1, 2], [3]], config)
    session.step()
    session.state.progress[2:3] = 99  # of a draft, which must not win
    branches.end_requests(session.state, [0, 1], drafts=2)
    assert session.state.winner.tolist() == [0, 0] and session.state.finished.all()
    outcome = branches.read_outcome(session.state, 0, drafts=2)
    assert len(outcome.branches) == 1 and outcome.canvas == session.state.tokens[0].tolist()


def test_memory_counts_rows(tiny):
    def needs(**options):
        config = blockbatch.DecodeConfig(method="dual_cache", gen_length=256, **options)
        return memory.needs(tiny, config, 2, 40), config

    (plain, _), (drafted, config) = needs(), needs(drafts=(1, 2, 3))
    assert drafted.cache == 4 * plain.cache and drafted.work >= plain.work
    session = generation._session(tiny, [[1] * 40, [2]], config)
    assert session.cache.kv.nbytes == drafted.cache
    many = memory.needs(tiny, config, 40, 40)
    assert many.work > memory.needs(tiny, needs()[1], 40, 40).work


def test_memory_of_open_queries(tmp_path):
    """A row may compute its whole generation region and the position in front of it."""
    write_dream(tmp_path, sharpness=3.0)
    model = blockbatch.load_model(tmp_path, device="cpu")
    config = blockbatch.DecodeConfig(gen_length=64, block_sizes=(8, 16), query_span="open")
    session = generation._session(model, [[1, 2, 3]] * 100, config)
    most = session._batch.most_tokens()
    assert most == 200 * 65
    from blockbatch.models import transformer

    assert memory.needs(model, config, 100, 3).work == transformer.activation_bytes(
        model.spec, model.dtype, most
    )


@pytest.mark.parametrize(
    "drafts, rows",
    [(None, "1 branch of 288"), ((1,), "1 branch and 1 draft of"), ((1, 2), "1 branch and 2 drafts of")],
)
def test_too_little_memory(drafts, rows):
    model = blockbatch.load_model("tiny", device="cpu", cache_bytes=1000)
    config = blockbatch.DecodeConfig(method="dual_cache", drafts=drafts)
    with pytest.raises(MemoryError, match=f"cache_bytes: expected at least .* for the K/V cache of {rows}"):
        blockbatch.generate(model, [1] * 32, config)


BAD = [
    ("vanilla", {"drafts": (1,)}, "drafts: not an option of vanilla (it has "),
    ("prefix_cache", {"drafts": (1,)}, "drafts: not an option of prefix_cache (it has "),
    ("blockbatch", {"drafts": (1,)}, "drafts: not an option of blockbatch (it has "),
    ("vanilla", {"query_span": "open"}, "query_span: not an option of vanilla (it has "),
    ("prefix_cache", {"refresh_scope": "generation"}, "refresh_scope: not an option of prefix_cache"),
    ("dual_cache", {"drafts": ()}, "drafts: expected 1 to 31 ascending numbers, got ()"),
    ("dual_cache", {"drafts": (2, 1)}, "drafts: expected 1 to 31 ascending numbers, got (2, 1)"),
    ("dual_cache", {"drafts": (1, 1)}, "drafts: expected 1 to 31 ascending numbers, got (1, 1)"),
    ("local_leap", {"drafts": (0, 1)}, "drafts: expected at least 1, got 0"),
    ("local_leap", {"drafts": (1, 32)}, "drafts: expected numbers below block_size = 32"),
    ("dual_cache", {"drafts": (8,), "block_size": 8}, "drafts: expected numbers below block_size = 8"),
    ("dual_cache", {"drafts": (1,), "query_span": "open"}, 'drafts: expected query_span="window"'),
    ("dual_cache", {"query_span": "all"}, "query_span: expected window or open, got 'all'"),
    ("blockbatch", {"refresh_scope": "rows"}, "refresh_scope: expected canvas or generation, got 'rows'"),
]
BAD_IN_PYTHON = [
    ({"drafts": 2}, TypeError, "drafts: expected a sequence of integers, got 2"),
    ({"drafts": "12"}, TypeError, "drafts: expected a sequence of integers, got '12'"),
    ({"drafts": (1.0,)}, TypeError, "drafts: expected an integer, got 1.0"),
    ({"drafts": tuple(range(1, 33))}, ValueError, "drafts: expected 1 to 31 ascending numbers, got (1, 2"),
    ({"query_span": None}, ValueError, "query_span: expected window or open, got None"),
]


@pytest.mark.parametrize("method, options, message", BAD, ids=str)
def test_bad_options(method, options, message, capsys):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        blockbatch.DecodeConfig(method=method, **options)
    arguments = ["generate", "--prompt", "x", "--method", method]
    for name, value in options.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        arguments += ["--" + name.replace("_", "-"), text]
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"blockbatch: error: {error.value}\n"


@pytest.mark.parametrize("options, error, message", BAD_IN_PYTHON, ids=str)
def test_bad_options_in_python(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        blockbatch.DecodeConfig(method="dual_cache", block_size=64, **options)


def test_drafts_as_lists_and_as_none():
    assert blockbatch.DecodeConfig(method="dual_cache", drafts=[1, 3]).drafts == (1, 3)
    assert blockbatch.DecodeConfig(method="vanilla", drafts=None).drafts is None


def test_draft_rows_of_the_state_are_no_branches(tiny):
    """What reads a state directly is told how many of its rows are drafts."""
    config = blockbatch.DecodeConfig(method="dual_cache", gen_length=32, drafts=(1, 2))
    session = generation._session(tiny, [[1, 2, 3]], config)
    session.run()
    assert session.state.num_branches == 3
    assert torch.equal(session.state.committed[1:], torch.zeros(2, dtype=torch.int32))
    assert len(generation.build_result(tiny, session, 0).branches) == 1
