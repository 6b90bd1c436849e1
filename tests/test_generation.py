"""The public interface: prompts in every form, streams, what is refused before any work."""

import json
import random

import pytest
import tokenizers
import torch

import blockbatch
from blockbatch import generation, memory
from blockbatch.tracing import save_trace
from plain_models import write_dream, write_llada

VOCABULARY = 40


def write_tokenizer(folder):
    """A byte-level tokenizer whose tokens are letters, parts of a two-byte character, MASK and EOS."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    euro = ["â", "Ĥ", "¬"]  # the three bytes of the euro sign, as the byte-level alphabet writes them
    letters = sorted(set(alphabet) - set(euro))[: VOCABULARY - 5]
    vocab = {token: index for index, token in enumerate(letters + euro)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], unk_token=None))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|mdm_mask|>"])
    backend.save(str(folder / "tokenizer.json"))


@pytest.fixture(params=["llada", "dream"])
def model(request, tmp_path):
    write = {"llada": write_llada, "dream": write_dream}[request.param]
    write(tmp_path, vocab_size=VOCABULARY, sharpness=3.0)  # MASK is the last id, EOS the one before
    write_tokenizer(tmp_path)
    return blockbatch.load_model(tmp_path, device="cpu")


CONFIG = blockbatch.DecodeConfig(gen_length=32, block_sizes=(4, 8, 32))


def test_every_form_of_prompt_gives_the_same(model):
    text = "0123"
    ids = model.tokenizer.encode(text)
    assert len(ids) == 4
    result = blockbatch.generate(model, text, CONFIG)
    for prompt in (ids, tuple(ids), torch.tensor(ids)):
        assert blockbatch.generate(model, prompt, CONFIG).canvas == result.canvas
    several = blockbatch.generate(model, [text, ids, torch.tensor(ids)], CONFIG)
    assert [other.canvas for other in several] == [result.canvas] * 3
    (alone,) = blockbatch.generate(model, [text], CONFIG)
    assert alone.canvas == result.canvas


def test_result_is_consistent(model):
    eos, mask = VOCABULARY - 2, VOCABULARY - 1
    stops = set()
    for seed in range(12):
        rng = random.Random(seed)
        prompt = [rng.randrange(VOCABULARY - 2) for _ in range(9)]
        result = blockbatch.generate(model, prompt, CONFIG)
        stops.add(result.stop_reason)
        assert len(result.canvas) == 32 and result.seconds > 0 and result.trace is None
        before = result.canvas[: result.canvas.index(eos)] if eos in result.canvas else result.canvas
        assert result.tokens == before and mask not in result.tokens
        assert result.text == model.tokenizer.decode(before)
        assert (result.stop_reason == "eos") == (eos in result.canvas)
        assert result.nfe.total == result.nfe.init + result.nfe.block + result.nfe.refresh
        assert result.block_size in CONFIG.block_sizes
        assert [branch.block_size for branch in result.branches] == list(CONFIG.block_sizes)
    assert stops


@pytest.mark.parametrize("method", blockbatch.METHODS)
def test_stream_equals_generate(model, method):
    for seed in range(4):
        rng = random.Random(seed)
        prompt = [rng.randrange(VOCABULARY - 2) for _ in range(7)]
        config = blockbatch.DecodeConfig(method=method, gen_length=64, eos_exit="prefix")
        pieces = list(blockbatch.stream(model, prompt, config))
        assert "".join(pieces) == blockbatch.generate(model, prompt, config).text
        assert all(pieces)


def test_eos_ids_can_be_overridden(model):
    prompt = [1, 2, 3]
    plain = blockbatch.generate(model, prompt, blockbatch.DecodeConfig(gen_length=32, eos_exit="none"))
    first = plain.canvas[5]
    config = blockbatch.DecodeConfig(gen_length=32, eos_exit="none", eos_token_ids=(first,))
    result = blockbatch.generate(model, prompt, config)
    assert result.canvas == plain.canvas
    assert result.tokens == plain.canvas[: plain.canvas.index(first)]


def test_trace_file(model, tmp_path):
    config = blockbatch.DecodeConfig(gen_length=32, trace=True)
    result = blockbatch.generate(model, [1, 2, 3], config)
    save_trace(tmp_path / "trace.json", result.trace, canvas=result.canvas)
    saved = json.loads((tmp_path / "trace.json").read_text())
    assert saved == {"canvas": result.canvas, "trace": result.trace}
    assert [record["kind"] for record in saved["trace"]][0] == "init"
    with pytest.raises(TypeError):
        save_trace(tmp_path / "bad.json", [object()])
    assert sorted(path.name for path in tmp_path.glob("*.json*") if "bad" in path.name) == []


def bad_prompts(model):
    mask, most = model.spec.mask_token_id, model.spec.max_length
    yield [1, mask], ValueError, f"prompt: expected no MASK token \\(id {mask}\\), got one at position 1"
    yield "0<|mdm_mask|>", ValueError, "prompt: expected no MASK token"
    yield [VOCABULARY], ValueError, f"prompt: expected ids from 0 to {VOCABULARY - 1}, got {VOCABULARY} at 0"
    yield [-1], ValueError, f"prompt: expected ids from 0 to {VOCABULARY - 1}, got -1 at 0"
    yield [[1], [mask]], ValueError, r"prompt\[1\]: expected no MASK token"
    yield (
        [0] * most,
        ValueError,
        f"prompt: expected prompt and gen_length to fit in {most} positions, got {most} \\+ 32",
    )
    yield 5, TypeError, "prompt: expected text, token ids or a list of either, got int"
    yield [1.5, 2], TypeError, r"prompt\[0\]: expected text or token ids, got 1.5"
    yield [True], TypeError, r"prompt\[0\]: expected text or token ids, got True"
    yield None, TypeError, "prompt: expected text, token ids or a list of either, got NoneType"


def test_bad_prompts(model):
    for prompt, error, message in bad_prompts(model):
        with pytest.raises(error, match=message):
            blockbatch.generate(model, prompt, CONFIG)
        if isinstance(prompt, list) and len(prompt) == 2 and isinstance(prompt[0], list):
            continue
        with pytest.raises(error, match=message):
            blockbatch.stream(model, prompt, CONFIG)  # before the first piece is asked for


def test_empty_prompt(model):
    if model.spec.family == "dream":
        with pytest.raises(
            ValueError, match="prompt: expected at least one token for dream, got an empty prompt"
        ):
            blockbatch.generate(model, "", CONFIG)
    else:
        assert len(blockbatch.generate(model, "", CONFIG).canvas) == 32


def test_stream_takes_one_prompt(model):
    with pytest.raises(ValueError, match="prompt: expected one prompt, got a list of 2"):
        blockbatch.stream(model, ["0", "1"], CONFIG)


def test_text_needs_a_tokenizer(tmp_path):
    write_llada(tmp_path)
    bare = blockbatch.load_model(tmp_path, device="cpu")
    with pytest.raises(
        ValueError, match="prompt: expected token ids, since the model's folder has no tokenizer"
    ):
        blockbatch.generate(bare, "text", CONFIG)
    with pytest.raises(ValueError, match="model: expected a model with a tokenizer"):
        blockbatch.stream(bare, [1], CONFIG)
    assert blockbatch.generate(bare, [1], CONFIG).text is None


def test_eos_outside_the_vocabulary(model):
    config = blockbatch.DecodeConfig(gen_length=32, eos_token_ids=(VOCABULARY,))
    with pytest.raises(ValueError, match=f"eos_token_ids: expected ids from 0 to {VOCABULARY - 1}"):
        blockbatch.generate(model, [1], config)


def test_as_many_prompts_at_a_time_as_fit(model, monkeypatch):
    """Without cache_bytes the free memory decides, for the cache and for a forward over all rows."""
    prompts = [[1, 2], [3], [4, 5, 6], [7]]
    together = blockbatch.generate(model, prompts, CONFIG)
    batches = []
    original = generation._session
    monkeypatch.setattr(generation, "_session", lambda *a: batches.append(len(a[1])) or original(*a))
    for_two = sum(memory.needs(model, CONFIG, 2, 3))
    monkeypatch.setattr(memory, "free_bytes", lambda model: for_two)
    split = blockbatch.generate(model, prompts, CONFIG)
    assert batches == [2, 2]
    assert [result.canvas for result in split] == [result.canvas for result in together]
    cache = memory.needs(model, CONFIG, 1, 3).cache
    monkeypatch.setattr(memory, "free_bytes", lambda model: cache)
    with pytest.raises(MemoryError, match="free memory of cpu: expected at least"):
        blockbatch.generate(model, prompts, CONFIG)


def test_what_a_decode_needs(model):
    positions = 3 * 48  # three branches of at most 35 positions, in pages of 16
    needed = memory.needs(model, CONFIG, 1, 3)
    assert needed.cache == positions * 2 * model.spec.num_layers * model.spec.num_kv_heads * 8 * 4
    assert needed.work > 3 * 35 * (3 * 32 + 3 * 48) * 4
    assert memory.needs(model, CONFIG, 2, 3).cache == 2 * needed.cache


def test_cache_too_small(model):
    model.cache_bytes = 1000
    with pytest.raises(
        MemoryError, match="cache_bytes: expected at least .* bytes for the K/V cache of 3 branches"
    ):
        blockbatch.generate(model, [1], CONFIG)
    with pytest.raises(MemoryError, match="cache_bytes"):
        next(blockbatch.stream(model, [1], CONFIG))
