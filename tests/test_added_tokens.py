"""Added and special tokens of model folders: which files name them, their ids, and how text meets them."""

import json

import pytest
import tokenizers

from blockbatch.models.checkpoint import CheckpointError
from blockbatch.models.tokenizer import Tokenizer
from test_tokenizer import byte_alphabet, byte_level

TOKEN = "<|x|>"
FREE = 256  # the first id behind the bytes


def config(token_id, content=TOKEN, **fields):
    return {"added_tokens_decoder": {str(token_id): {"content": content, **fields}}}


class Folder:
    """Writes the files of one tokenizer, of either kind, whose vocabulary is the bytes and some tokens."""

    def __init__(self, path, kind):
        self.path, self.kind = path, kind

    def write(self, settings=(), vocabulary=(), own=(), **files):
        ids = {token: i for i, token in enumerate(byte_alphabet())} | dict(vocabulary)
        settings = dict(settings)
        if self.kind == "files":
            settings["tokenizer_class"] = "Qwen2Tokenizer"
            self.json("vocab.json", ids)
            (self.path / "merges.txt").write_text("#version: 0.2\n")
        else:
            backend = byte_level()
            content = json.loads(backend.to_str())
            content["model"]["vocab"] = ids
            content["added_tokens"] = list(own)
            self.json("tokenizer.json", content)
        self.json("tokenizer_config.json", settings)
        for name, content in files.items():
            self.json(f"{name}.json", content)
        return self

    def json(self, name, content):
        (self.path / name).write_text(json.dumps(content))

    def load(self):
        return Tokenizer.from_folder(self.path)

    def refused(self, message):
        with pytest.raises(CheckpointError, match=message):
            self.load()


@pytest.fixture(params=["files", "json"])
def folder(request, tmp_path):
    return Folder(tmp_path, request.param)


@pytest.fixture
def json_folder(tmp_path):
    return Folder(tmp_path, "json")


def entry(token_id, content=TOKEN, special=False, **flags):
    """An entry of a tokenizer.json's added_tokens."""
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"id": token_id, "content": content, "special": special, **plain, **flags}


def check(tokenizer, token_id, *, special, token=TOKEN):
    """The token is one id inside of text, and text again unless it is special."""
    a, b = tokenizer.token_to_id("a"), tokenizer.token_to_id("b")
    assert tokenizer.token_to_id(token) == token_id
    assert tokenizer.encode(f"a{token}b") == [a, token_id, b]
    assert tokenizer.decode([a, token_id, b]) == ("ab" if special else f"a{token}b")
    assert tokenizer.decode([a, token_id, b], skip_special=False) == f"a{token}b"


# Where tokens are listed


@pytest.mark.parametrize("token_id", [FREE, 300, 100_000])
@pytest.mark.parametrize("special", [True, False])
def test_added_tokens_decoder(folder, token_id, special):
    check(folder.write(config(token_id, special=special)).load(), token_id, special=special)


@pytest.mark.parametrize("token_id", [FREE, 300])
def test_added_tokens_json(folder, token_id):
    folder.write(added_tokens={TOKEN: token_id})
    check(folder.load(), token_id, special=False)
    folder.write({"additional_special_tokens": [TOKEN]})
    check(folder.load(), token_id, special=True)


@pytest.mark.parametrize("token_id", [FREE, 300])
@pytest.mark.parametrize("special", [True, False])
def test_a_token_that_stands_in_the_vocabulary(folder, token_id, special):
    folder.write(vocabulary={TOKEN: token_id})
    assert len(folder.load().encode(TOKEN)) == len(TOKEN)
    folder.write(config(token_id, special=special), {TOKEN: token_id})
    check(folder.load(), token_id, special=special)
    folder.write({}, {TOKEN: token_id}, added_tokens={TOKEN: token_id})
    check(folder.load(), token_id, special=False)


@pytest.mark.parametrize(
    "named",
    [
        {"eos_token": TOKEN},
        {"pad_token": {"content": TOKEN, "special": True, "lstrip": False}},
        {"mask_token": TOKEN},
        {"additional_special_tokens": ["<|other|>", TOKEN]},
        {"additional_special_tokens": [{"content": TOKEN}]},
        {"extra_special_tokens": {"image_token": TOKEN}},
        {"extra_special_tokens": [TOKEN]},
    ],
)
def test_tokens_that_are_named_special(folder, named):
    """In the vocabulary, beside it or listed as plain: a name makes them special."""
    vocabulary = {TOKEN: 300}
    check(folder.write(named, vocabulary).load(), 300, special=True)
    check(folder.write({}, vocabulary, special_tokens_map=named).load(), 300, special=True)
    (folder.path / "special_tokens_map.json").unlink()
    check(folder.write({**named, **config(300, special=False)}).load(), 300, special=True)
    if folder.kind == "json":
        check(folder.write(named, own=[entry(FREE)]).load(), FREE, special=True)


def test_a_name_without_an_id_stays_text(folder):
    tokenizer = folder.write({"pad_token": "[PAD]", "additional_special_tokens": [TOKEN]}).load()
    assert tokenizer.token_to_id(TOKEN) is None and tokenizer.decode(tokenizer.encode(TOKEN)) == TOKEN


def test_eos_of_special_tokens_map(folder):
    folder.write(vocabulary={"<end>": 300}, special_tokens_map={"eos_token": {"content": "<end>"}})
    assert 300 in folder.load()._end_ids
    folder.write(special_tokens_map={"eos_token": "<nothing>"})
    folder.refused("eos_token must be a known token, got '<nothing>'")


@pytest.mark.parametrize("own, listed", [(True, False), (False, True), (True, True)])
def test_special_where_one_file_says_so(json_folder, own, listed):
    json_folder.write(config(FREE, special=listed), own=[entry(FREE, special=own)])
    check(json_folder.load(), FREE, special=True)


def test_all_sources_together(folder):
    vocabulary = {"<v>": 256, "<w>": 270}
    tokens = {"added_tokens_decoder": {"256": {"content": "<v>", "special": True}, "260": {"content": "<d>"}}}
    tokenizer = folder.write(tokens, vocabulary, added_tokens={"<d>": 260, "<e>": 263, "<w>": 270}).load()
    ids = [tokenizer.token_to_id(token) for token in ("<v>", "<d>", "<e>", "<w>")]
    assert ids == [256, 260, 263, 270] == tokenizer.encode("<v><d><e><w>")
    assert tokenizer.decode([*ids, 257, 258]) == "<d><e><w>" and tokenizer.vocab_size == 271


# Ids


def test_gaps_in_tokenizer_json(json_folder):
    """The library numbers added tokens by their order; the file says otherwise."""
    json_folder.write(own=[entry(256, "<a>", special=True), entry(400)])
    tokenizer = json_folder.load()
    check(tokenizer, 400, special=False)
    check(tokenizer, 256, special=True, token="<a>")
    assert tokenizer.vocab_size == 401 and tokenizer.decode([257]) == ""


def test_a_hole_in_the_vocabulary_moves_no_token(folder):
    ids = {token: i + (i > 5) for i, token in enumerate(byte_alphabet())}
    settings = config(258, special=True)
    check(folder.write(settings, ids).load(), 258, special=True)
    tokenizer = folder.load()
    assert tokenizer.decode(tokenizer.encode("naïve café")) == "naïve café"


def test_gaps_that_a_kind_of_vocabulary_cannot_hold(json_folder):
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -1.0)], 0))
    backend.save(str(json_folder.path / "tokenizer.json"))
    json_folder.json("tokenizer_config.json", config(3))
    assert json_folder.load().encode(f"a{TOKEN}b") == [1, 3, 2]
    json_folder.json("tokenizer_config.json", config(9))
    json_folder.refused("expected '<.x.>' at id 9, got id 3 .this kind of vocabulary")


@pytest.mark.parametrize(
    "settings, files, message",
    [
        (config(7), {}, "expected '<.x.>' at id 7, which is the id of"),
        (config(300), {"added_tokens": {TOKEN: 301}}, "added_tokens.json: .*at id 301, got id 300"),
        (config(256, "<v>"), {}, "expected '<v>' at id 256, got id 299"),
        ({}, {"added_tokens": {"<v>": 5}}, "expected '<v>' at id 5, got id 299"),
        (config(300), {"added_tokens": {"<y>": 300}}, "expected '<y>' at id 300, which is the id of '<.x.>'"),
        ({"added_tokens_decoder": {"300": {"content": TOKEN}, "301": {"content": TOKEN}}}, {},
         "tokenizer_config.json: expected '<.x.>' at id 301, got id 300"),
        (config(-1), {}, "added_tokens_decoder: expected .* at id None"),
        (config(300, ""), {}, "added_tokens_decoder: expected"),
        (config(300, 5), {}, "added_tokens_decoder: expected"),
        (config(300, special="yes"), {}, "special of '<.x.>' must be true or false, got 'yes'"),
        (config(300, lstrip=1), {}, "lstrip of '<.x.>' must be true or false, got 1"),
        ({}, {"added_tokens": {TOKEN: "300"}}, "added_tokens.json: expected {token: id}, got '<.x.>': '300'"),
        ({}, {"added_tokens": {TOKEN: True}}, "added_tokens.json: expected {token: id}"),
        ({}, {"added_tokens": {TOKEN: -1}}, "added_tokens.json: expected {token: id}"),
        ({}, {"added_tokens": {"": 300}}, "added_tokens.json: expected {token: id}"),
        ({}, {"added_tokens": [TOKEN]}, "added_tokens.json: expected a JSON object"),
        ({}, {"special_tokens_map": [TOKEN]}, "special_tokens_map.json: expected a JSON object"),
    ],
)  # fmt: skip
def test_files_that_contradict_each_other(folder, settings, files, message):
    folder.write(settings, {"<v>": 299}, **files).refused(message)


@pytest.mark.parametrize("own", [{}, [5], [{"id": 256}], [{"id": "256", "content": "<a>"}]])
def test_a_broken_list_in_tokenizer_json(json_folder, own):
    json_folder.write()
    content = json.loads((json_folder.path / "tokenizer.json").read_text())
    json_folder.json("tokenizer.json", {**content, "added_tokens": own or {"a": 1}})
    json_folder.refused("tokenizer.json: ")


# Flags


@pytest.mark.parametrize(
    "flags, text, pieces",
    [
        ({}, "a <|x|> b", ["a", "Ġ", TOKEN, "Ġ", "b"]),
        ({"lstrip": True}, "a  <|x|> b", ["a", TOKEN, "Ġ", "b"]),
        ({"rstrip": True}, "a <|x|>  b", ["a", "Ġ", TOKEN, "b"]),
        ({"lstrip": True, "rstrip": True}, "a <|x|> b", ["a", TOKEN, "b"]),
        ({"single_word": True}, "a <|x|> b", ["a", "Ġ", TOKEN, "Ġ", "b"]),
        ({"single_word": True}, "a<|x|>b", ["a", *TOKEN, "b"]),
    ],
)
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("where", ["beside", "vocabulary", "own", "map"])
def test_flags(folder, flags, text, pieces, special, where):
    settings = config(FREE, special=special, **flags)
    if where == "vocabulary":
        folder.write(settings, {TOKEN: FREE})
    elif where == "own" and folder.kind == "json":
        folder.write(settings, own=[entry(FREE, special=special)])  # tokenizer_config.json's flags count
    elif where == "map":
        folder.write({}, {TOKEN: FREE}, special_tokens_map={"sep_token": {"content": TOKEN, **flags}})
    else:
        folder.write(settings)
    tokenizer = folder.load()
    assert tokenizer.encode(text) == [tokenizer.token_to_id(piece) for piece in pieces]


@pytest.mark.parametrize("normalized, found", [(True, True), (False, False), (None, True)])
def test_normalized_tokens_are_found_in_normalised_text(tmp_path, normalized, found):
    """The Qwen2 tokenizer composes characters; a plain token is looked for behind that unless it says no."""
    flags = {} if normalized is None else {"normalized": normalized}
    tokenizer = Folder(tmp_path, "files").write(config(FREE, "e\u0301!", **flags)).load()
    assert (FREE in tokenizer.encode("a\u00e9!")) == found
    assert FREE in tokenizer.encode("ae\u0301!")


def test_an_untouched_tokenizer_is_loaded_as_it_is(tmp_path):
    byte_level(["<|a|>", TOKEN]).save(str(tmp_path / "tokenizer.json"))
    settings = {"added_tokens_decoder": {"256": {"content": "<|a|>", "special": True}}, "eos_token": TOKEN}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    check(Tokenizer.from_folder(tmp_path), 257, special=True)
