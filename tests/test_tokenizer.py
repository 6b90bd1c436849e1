"""Tokenizers of model folders: ids and text, ends of text, chat formats, and text that comes in pieces."""

import json
import random

import pytest
import tokenizers

import plain_models
from blockbatch.models.checkpoint import CheckpointError, read_config, read_spec
from blockbatch.models.tokenizer import IncrementalDecoder, Tokenizer, has_tokenizer

TEXTS = [
    "Hello, world!",
    "  two  spaces\n\n\tand tabs ",
    "naïve café, Grüße, 你好世界, 🙂👩‍👩‍👧, Ωμέγα",
    "x = 1234 + 56.78  # it's we'll I'M",
    "",
]
LLADA_SPECIAL = (
    "<|startoftext|>", "<|endoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|mdm_mask|>",
)  # fmt: skip
DREAM_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>")


def byte_alphabet():
    return sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def byte_level(special=(), merges=()):
    """A byte-level BPE of the 256 bytes, the given merges and special tokens."""
    vocabulary = byte_alphabet() + [first + second for first, second in merges]
    model = tokenizers.models.BPE({token: i for i, token in enumerate(vocabulary)}, list(merges))
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return backend


def write_tokenizer(folder, special=LLADA_SPECIAL, **settings):
    folder.mkdir(exist_ok=True)
    byte_level(special).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_qwen2_files(folder, merges=("l l", "Ġ w"), special=DREAM_SPECIAL, **settings):
    """vocab.json, merges.txt and tokenizer_config.json as Dream ships them, without tokenizer.json."""
    folder.mkdir(exist_ok=True)
    vocabulary = byte_alphabet() + [merge.replace(" ", "") for merge in merges]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    added = {len(vocabulary) + i: {"content": token, "special": True} for i, token in enumerate(special)}
    settings = {"tokenizer_class": "DreamTokenizer", "added_tokens_decoder": added, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture
def spec(tmp_path):
    """A model of 300 ids: MASK 299, EOS 298."""
    plain_models.write_llada(tmp_path / "spec", vocab_size=300)
    return read_spec(read_config(tmp_path / "spec"))


# Ids and text


@pytest.mark.parametrize("write", [write_tokenizer, write_qwen2_files])
@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding(tmp_path, write, text):
    write(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.decode(ids) == text


def test_special_tokens_in_text(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    end = tokenizer.token_to_id("<|eot_id|>")
    ids = tokenizer.encode("a<|eot_id|>b")
    assert ids == [*tokenizer.encode("a"), end, *tokenizer.encode("b")]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special=False) == "a<|eot_id|>b"
    assert tokenizer.token_to_id("<|nothing|>") is None
    assert tokenizer.vocab_size == 256 + len(LLADA_SPECIAL)


def test_encoding_adds_cuts_and_pads_nothing(tmp_path):
    backend = byte_level(LLADA_SPECIAL)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|startoftext|> $A", special_tokens=[("<|startoftext|>", 256)]
    )
    backend.enable_truncation(2)
    backend.enable_padding(length=20)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode("abcdef"), skip_special=False) == "abcdef"


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("a 1234", ["a", " ", "1", "2", "3", "4"]),
        ("it's I'LL", ["it", "'s", " I", "'LL"]),
        ("(foo) x=1", ["(foo", ")", " x", "=", "1"]),
        ("a\n\n  b  ", ["a", "\n\n", " ", " b", "  "]),
        ("e\u0301", ["\u00e9"]),
    ],
)
def test_qwen2_files_split_text_as_qwen2_does(tmp_path, text, pieces):
    write_qwen2_files(tmp_path)
    backend = Tokenizer.from_folder(tmp_path)._backend
    split = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
    assert [backend.decoder.decode([piece]) for piece, _ in split] == pieces


def test_qwen2_files_merge_and_place_added_tokens(tmp_path):
    write_qwen2_files(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("ll w<|im_end|>") == [256, 257, 260]
    assert tokenizer.vocab_size == 262


def test_tokens_that_only_the_settings_list_are_added(tmp_path):
    write_tokenizer(tmp_path, added_tokens_decoder={"262": {"content": "<|new|>", "special": True}})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("<|new|>") == [262] and tokenizer.decode([262]) == ""


def test_text_must_be_text(tmp_path):
    write_tokenizer(tmp_path)
    with pytest.raises(TypeError, match="text must be a str, got list"):
        Tokenizer.from_folder(tmp_path).encode([1, 2])


# Ends of text


def test_ends_are_the_union_of_all_sources(tmp_path, spec):
    write_tokenizer(tmp_path, special=[*LLADA_SPECIAL, "<end>"], eos_token="<end>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    named = [tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|eot_id|>", "<end>")]
    assert tokenizer.eos_token_ids(spec) == tuple(sorted([5, 9, 298, *named]))


def test_eos_token_may_be_written_out(tmp_path, spec):
    write_tokenizer(tmp_path, special=["<end>"], eos_token={"content": "<end>", "special": True})
    assert Tokenizer.from_folder(tmp_path).eos_token_ids(spec) == (256, 298)


def test_ends_outside_the_model_s_vocabulary_are_left_out(tmp_path, spec):
    write_tokenizer(tmp_path, special=[])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 300}))
    assert Tokenizer.from_folder(tmp_path).eos_token_ids(spec) == (298,)


def test_mask_is_no_end(tmp_path, spec):
    write_tokenizer(tmp_path, special=[])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 299}))
    with pytest.raises(CheckpointError, match="expected ends of text other than MASK, got id 299"):
        Tokenizer.from_folder(tmp_path).eos_token_ids(spec)


# Chat


def test_llada_chat(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    question = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHow?<|eot_id|>"
    opening = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert tokenizer.chat(" How?\n", "llada") == question + opening
    messages = [
        {"role": "user", "content": "How?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "Why?"},
    ]
    assert tokenizer.chat(messages, "llada") == (
        f"{question}{opening}So.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>{opening}"
    )


def test_dream_chat(tmp_path):
    write_qwen2_files(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    question = "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"
    standard = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert tokenizer.chat("How?", "dream") == standard + question
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How?"}]
    assert tokenizer.chat(messages, "dream") == "<|im_start|>system\nBe brief.<|im_end|>\n" + question


def test_chat_needs_the_format_s_tokens(tmp_path):
    write_tokenizer(tmp_path, special=["<|startoftext|>", "<|eot_id|>"])
    tokenizer = Tokenizer.from_folder(tmp_path)
    with pytest.raises(CheckpointError, match="it lacks <.start_header_id.>, <.end_header_id.>:"):
        tokenizer.chat("How?", "llada")
    with pytest.raises(CheckpointError, match="it lacks <.im_start.>, <.im_end.>:"):
        tokenizer.chat("How?", "dream")


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "at least one message, got none"),
        ([{"role": "tool", "content": "x"}], "role must be one of .* got 'tool'"),
        ([{"role": "user"}], "content must be text, got None"),
    ],
)
def test_bad_messages(tmp_path, messages, message):
    write_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_folder(tmp_path).chat(messages, "llada")


def test_unknown_chat_family(tmp_path):
    write_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="family must be one of .* got 'gpt'"):
        Tokenizer.from_folder(tmp_path).chat("How?", "gpt")


# Broken folders


def test_folder_without_a_tokenizer(tmp_path):
    assert not has_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="expected a tokenizer .*got none"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    assert not has_tokenizer(tmp_path)


@pytest.mark.parametrize("write", [write_tokenizer, write_qwen2_files])
def test_folder_with_a_tokenizer(tmp_path, write):
    write(tmp_path)
    assert has_tokenizer(tmp_path)


def test_broken_tokenizer_json(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(CheckpointError, match="tokenizer.json: expected a tokenizer, got"):
        Tokenizer.from_folder(tmp_path)


def test_broken_merges(tmp_path):
    write_qwen2_files(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nq zz\n")
    with pytest.raises(CheckpointError, match="expected a vocabulary in vocab.json and merges.txt, got"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", None])
def test_vocabulary_of_an_unknown_kind(tmp_path, kind):
    write_qwen2_files(tmp_path, tokenizer_class=kind)
    with pytest.raises(
        CheckpointError, match=f"tokenizer_class .* to be one of DreamTokenizer.* got {kind!r}"
    ):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"added_tokens_decoder": {"7": {"content": "<|eot_id|>"}}},
            "expected '<.eot_id.>' at id 7, got id 260",
        ),
        (
            {"added_tokens_decoder": {"260": {"content": "<|new|>"}}},
            "expected '<.new.>' at id 260, which is the id of '<.eot_id.>'",
        ),
        ({"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder: expected"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder: expected"),
        ({"eos_token": "<|nothing|>"}, "eos_token must be a known token, got '<.nothing.>'"),
        ({"eos_token": 5}, "eos_token must be a known token, got 5"),
    ],
)
def test_settings_at_odds_with_the_tokenizer(tmp_path, settings, message):
    write_tokenizer(tmp_path, **settings)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_broken_generation_config(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(CheckpointError, match="generation_config.json: eos_token_id must be .* got 'end'"):
        Tokenizer.from_folder(tmp_path)


# Text in pieces


def metaspace():
    """A tokenizer that decodes the first token of a text differently: its leading space is dropped."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"▁a": 0, "▁b": 1, "c": 2, "<s>": 3}, unk_token="c")
    )
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend)


def test_pieces_together_are_the_whole_text(tmp_path):
    write_tokenizer(tmp_path)
    generator = random.Random(0)
    for tokenizer in (Tokenizer.from_folder(tmp_path), metaspace()):
        for _ in range(300):
            # Any ids: also bytes that are no text, replacement characters and special tokens.
            ids = [generator.randrange(tokenizer.vocab_size) for _ in range(generator.randrange(12))]
            if tokenizer.vocab_size > 256:
                ids += tokenizer.encode(generator.choice([*TEXTS, "a\ufffdb"]))
            for skip in (True, False):
                decoder, text, rest = IncrementalDecoder(tokenizer, skip_special=skip), "", list(ids)
                while rest:
                    size = generator.randrange(4)
                    text += decoder.push(rest[:size])
                    rest = rest[size:]
                assert text + decoder.finish() == tokenizer.decode(ids, skip)


def test_no_half_characters(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push([token]) for token in tokenizer.encode("aé🙂b")]
    assert pieces == ["a", "", "é", "", "", "", "🙂", "b"]
    assert decoder.finish() == ""


def test_text_before_half_a_character_is_not_held_back(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    ids = tokenizer.encode("ok é!")
    decoder = IncrementalDecoder(tokenizer)
    assert [decoder.push(ids[:4]), decoder.push(ids[4:])] == ["ok ", "é!"]


def test_unfinished_character_comes_at_the_end(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    decoder = IncrementalDecoder(tokenizer)
    assert decoder.push(tokenizer.encode("é")[:1]) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.push(tokenizer.encode("x")) == "x"
