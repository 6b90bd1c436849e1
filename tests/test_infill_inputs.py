"""How texts with gaps are written, what a fill gives back, and what is refused before any work."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import block_models
import blockbatch
from blockbatch import gaps, generation, infill
from plain_models import write_dream, write_llada
from test_generation import VOCABULARY, write_tokenizer

EOS, MASK = VOCABULARY - 2, VOCABULARY - 1
CONFIG = blockbatch.DecodeConfig("dual_cache", gen_length=32)


@pytest.fixture(scope="module", params=["llada", "dream"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write = {"llada": write_llada, "dream": write_dream}[request.param]
    write(folder, vocab_size=VOCABULARY, sharpness=3.0)
    write_tokenizer(folder)
    return blockbatch.load_model(folder, device="cpu")


@pytest.mark.parametrize(
    "text, parts",
    [
        ("a{8}b", ["a", 8, "b"]),
        ("{1}", [1]),
        ("{2}{03}", [2, 3]),
        ("{{8}}", ["{8}"]),
        ("{{{8}}}", ["{", 8, "}"]),
        ('x = {{"a": {4}}}\n', ['x = {"a": ', 4, "}\n"]),
        ("}}{{", ["}{"]),
        ("none", ["none"]),
        ("", []),
    ],
)
def test_gaps_and_braces(text, parts):
    assert gaps.split(text, "text", 100) == parts


@given(st.lists(st.one_of(st.text("a{}8\n", min_size=1, max_size=6), st.integers(1, 99)), max_size=6))
def test_what_is_written_is_read(parts):
    doubled = "".join(
        f"{{{part}}}" if isinstance(part, int) else part.replace("{", "{{").replace("}", "}}")
        for part in parts
    )
    joined = []
    for part in parts:
        if joined and isinstance(part, str) and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    assert gaps.split(doubled, "text", 99) == joined


GROWING = r"expected the number of a gap's tokens, such as \{8\}, got .*; gaps that grow .* DreamOn"


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "a {x} b",
            r"text: expected a gap such as \{8\} for 8 tokens, or \{\{ and \}\} for braces, got '\{x\}' at",
        ),
        ("a {", "text: expected a gap .*, got '{' at character 2"),
        ("ab }", "text: expected a gap .*, got '}' at character 3"),
        ("{{8}", "text: expected a gap .*, got '}' at character 3"),
        ("{-1}", "text: expected a gap"),
        ("{0}", r"text: expected gaps of 1 to 100 tokens, got '\{0\}' at character 0"),
        ("{101}", "text: expected gaps of 1 to 100 tokens"),
        ("{" + "9" * 5000 + "}", "text: expected gaps of 1 to 100 tokens"),
        *((f"a{{{mark}}}", f"text: {GROWING}") for mark in ("", " ", "*", "...", "8+", "1-8", "4..9", "8*")),
    ],
)
def test_braces_that_are_no_gap(text, message):
    with pytest.raises(ValueError, match=message):
        gaps.split(text, "text", 100)


def test_a_fill_gives_the_whole_text(model):
    text = "01{4}2{{3}}{3}45"
    result = blockbatch.fill(model, text, CONFIG)
    encode = model.tokenizer.encode
    ids = [*encode("01"), *[MASK] * 4, *encode("2{3}"), *[MASK] * 3, *encode("45")]
    first, second = result.gaps
    assert isinstance(result, blockbatch.FillResult) and isinstance(result, blockbatch.Result)
    assert (first.start, first.length, second.start, second.length) == (2, 4, 6 + len(encode("2{3}")), 3)
    assert result.text == f"01{first.text}2{{3}}{second.text}45"
    assert first.text == model.tokenizer.decode(first.tokens)
    assert result.tokens == [*encode("01"), *first.tokens, *encode("2{3}"), *second.tokens, *encode("45")]
    assert len(result.canvas) == len(ids) and MASK not in result.canvas
    assert result.stop_reason == "length" and result.nfe.total > 0 and result.trace is None
    same = blockbatch.fill(model, ids, CONFIG)
    assert (same.canvas, same.tokens, same.gaps) == (result.canvas, result.tokens, result.gaps)


def test_every_form_of_text_gives_the_same(model):
    ids = [1, 2, MASK, MASK, 3, MASK, 4]
    expected = blockbatch.fill(model, ids, CONFIG)
    forms = [tuple(ids), np.array(ids), torch.tensor(ids), [np.int32(token) for token in ids]]
    for form in forms:
        assert blockbatch.fill(model, form, CONFIG).canvas == expected.canvas
    several = blockbatch.fill(model, [*forms, "01{2}2", "01<|mdm_mask|><|mdm_mask|>2"], CONFIG)
    assert [result.canvas for result in several[:4]] == [expected.canvas] * 4
    assert several[4].canvas == several[5].canvas and several[4].text == several[5].text
    assert blockbatch.fill(model, [], CONFIG) == []
    (alone,) = blockbatch.fill(model, ["01{2}2"], CONFIG)
    assert alone.text == several[4].text


def test_gaps_side_by_side_are_one(model):
    result = blockbatch.fill(model, "01{2}{3}2", CONFIG)
    assert [(gap.start, gap.length) for gap in result.gaps] == [(2, 5)]


def test_settings_of_every_text(model):
    texts = ["01{4}2", "3{2}", "01{4}4"]
    configs = [CONFIG, blockbatch.DecodeConfig("vanilla"), blockbatch.DecodeConfig.preset("fast")]
    results = blockbatch.fill(model, texts, configs)
    for text, config, result in zip(texts, configs, results, strict=True):
        assert result.canvas == blockbatch.fill(model, text, config).canvas
    with pytest.raises(ValueError, match="config: expected one for each of 3"):
        blockbatch.fill(model, texts, configs[:2])
    with pytest.raises(TypeError, match="config: expected a DecodeConfig for one text, got list"):
        blockbatch.fill(model, texts[0], configs)


def test_a_text_may_begin_with_a_gap(model):
    if model.spec.family == "dream":
        with pytest.raises(
            ValueError, match="text: expected at least one token before the first gap for dre"
        ):
            blockbatch.fill(model, "{2}01", CONFIG)
    else:
        result = blockbatch.fill(model, "{2}01", CONFIG)
        assert result.text == result.gaps[0].text + "01" and result.gaps[0].start == 0


def test_the_beginning_of_text_stands_in_front_once(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "bos_token_id", 7)
    monkeypatch.setattr(model.tokenizer, "add_bos", True)
    assert infill.read_text(model, "{2}01{1}2").ids[:3] == [7, MASK, MASK]
    assert infill.read_text(model, "01{1}2").ids.count(7) == 1
    assert infill.read_text(model, "01{1}2", add_bos=False).ids.count(7) == 0
    result = blockbatch.fill(model, "{2}01", CONFIG)
    assert result.tokens[0] == 7 and result.text == result.gaps[0].text + "01"


class Scripted:
    """Decodes nothing: the gaps hold what a test says."""

    def __init__(self, monkeypatch, filling):
        def decode_group(model, prompts, config, members, names, finish, regions, **more):
            for index in members:
                left = iter(filling)
                self.canvas = [next(left) if token == MASK else token for token in regions[index]]
                finish(self, 0, index, None)

        monkeypatch.setattr(infill, "decode_group", decode_group)
        self.params = type("Params", (), {"eos_token_ids": (EOS,)})
        self.stops, self.seconds = None, [1.0]

    def outcome(self, request):
        branch = blockbatch.BranchResult(4, 1, 0, 0, 0)
        return type(
            "Outcome", (),
            dict(canvas=self.canvas, nfe=None, branches=(branch,), winner=0, stop_reason="length"),
        )  # fmt: skip


def test_an_eos_in_a_gap_ends_the_gap_alone(model, monkeypatch):
    a, b, c = model.tokenizer.encode("ABC")
    Scripted(monkeypatch, [a, EOS, b, b, c, c])
    result = blockbatch.fill(model, "01{4}2{2}3", CONFIG)
    assert result.text == "01A2CC3" and [gap.text for gap in result.gaps] == ["A", "CC"]
    assert [gap.tokens for gap in result.gaps] == [[a], [c, c]]
    assert EOS in result.canvas and EOS not in result.tokens and result.stop_reason == "length"


def test_a_stop_text_cuts_its_gap_alone(model, monkeypatch):
    a, b, c = model.tokenizer.encode("ABC")
    scripted = Scripted(monkeypatch, [a, b, c, c, a, b])
    scripted.stops = type("Stops", (), {"texts": ("BC",)})
    result = blockbatch.fill(model, "BC{4}BC{2}BC", CONFIG)
    assert result.text == "BCABCABBC" and [gap.text for gap in result.gaps] == ["A", "AB"]
    assert result.stop_reason == "stop" and result.tokens == model.tokenizer.encode("BCABCABBC")


@pytest.mark.parametrize("method", blockbatch.METHODS)
def test_a_stop_text_in_the_last_gap_ends_the_decode(model, method):
    options = {"vanilla": {}, "blockbatch": {"threshold": 1.0, "block_sizes": (2, 4)}}.get(
        method, {"threshold": 1.0, "block_size": 8}
    )

    def settings(**more):
        return blockbatch.DecodeConfig(method, gen_length=32, **options, **more)

    fewer = cuts = 0
    for start in map(str, range(10, 60)):
        if cuts == 4:
            break
        text = start + "{3}12{24}45"
        whole = blockbatch.fill(model, text, settings())
        last = whole.gaps[1].text
        if len(set(last)) < 3:
            continue
        stop = last[len(last) // 3]
        result = blockbatch.fill(model, text, settings(stop=stop))
        assert result.text == "".join(
            (start, whole.gaps[0].text.split(stop)[0], "12", last.split(stop)[0], "45")
        )
        assert result.stop_reason == "stop" and result.nfe.total <= whole.nfe.total
        assert [gap.length for gap in result.gaps] == [3, 24] and len(result.canvas) == len(whole.canvas)
        fewer += result.nfe.total < whole.nfe.total
        cuts += 1
    assert cuts == 4 and fewer > 0


def test_a_character_over_the_end_of_a_gap(model, monkeypatch):
    """Ids may cut a character in two; a text never does."""
    first, *rest = model.tokenizer.encode("€")
    Scripted(monkeypatch, rest)
    assert blockbatch.fill(model, [1, first, MASK, MASK, 2], CONFIG).text == model.tokenizer.decode(
        [1, first, *rest, 2]
    )


def bad_texts(model):
    most = model.spec.max_length
    yield (
        "01",
        ValueError,
        r"text: expected at least one gap, such as \{8\} in a text or MASK \(id 39\) among",
    )
    yield "", ValueError, "text: expected at least one gap"
    yield [[]], ValueError, r"text\[0\]: expected at least one gap"
    yield [1, 2], ValueError, "text: expected at least one gap"
    yield ["0{1}", "0{x}"], ValueError, r"text\[1\]: expected a gap such as"
    yield "0{}", ValueError, "text: expected the number of a gap's tokens.*DreamOn"
    yield [1, VOCABULARY, MASK], ValueError, f"text: expected ids from 0 to {MASK}, got {VOCABULARY} at 1"
    yield (
        "0{" + str(most) + "}",
        ValueError,
        f"text: expected a text that fits in {most} positions with its g",
    )
    yield "0{" + str(most + 1) + "}", ValueError, f"text: expected gaps of 1 to {most} tokens"
    yield "a\ud83db{1}", ValueError, "text: expected text of whole characters"
    yield 5, TypeError, "text: expected text, token ids or a list of either, got int"
    yield None, TypeError, "text: expected text, token ids or a list of either, got NoneType"
    yield [["0", 1]], TypeError, r"text\[0\]: expected text or token ids"


def test_bad_texts(model, monkeypatch):
    monkeypatch.setattr(generation, "_session", lambda *a: pytest.fail("work"))
    for text, error, message in bad_texts(model):
        with pytest.raises(error, match=message):
            blockbatch.fill(model, text, CONFIG)
    with pytest.raises(ValueError, match="method: expected .*, got 'block_diffusion'"):
        blockbatch.fill(model, "0{1}", blockbatch.DecodeConfig("block_diffusion"))
    with pytest.raises(ValueError, match="stop: expected texts that can be decoded"):
        blockbatch.fill(model, "0{1}", blockbatch.DecodeConfig(stop="<|mdm_mask|>"))


def test_generate_names_what_fills_gaps(model):
    with pytest.raises(ValueError, match="prompt: expected no MASK token .*; blockbatch.fill decodes MASK"):
        blockbatch.generate(model, [1, MASK, 2], CONFIG)


def test_block_causal_models_are_refused(tmp_path):
    for family in ("sdar", "fast_dllm_v2"):
        model = blockbatch.load_model(block_models.write(tmp_path / family, family), device="cpu")
        with pytest.raises(
            ValueError, match=f"model: expected one of full attention, .*, got {family}, whose"
        ):
            blockbatch.fill(model, [1, model.spec.mask_token_id, 2])


def test_without_a_tokenizer(tmp_path):
    write_llada(tmp_path)
    bare = blockbatch.load_model(tmp_path, device="cpu")
    mask = bare.spec.mask_token_id
    result = blockbatch.fill(bare, [1, mask, mask, 2], CONFIG)
    assert result.text is None and result.gaps[0].text is None
    assert result.gaps[0].tokens == [token for token in result.canvas[1:3] if token not in bare.eos_token_ids]
    with pytest.raises(
        ValueError, match="text: expected token ids, since the model's folder has no tokenizer"
    ):
        blockbatch.fill(bare, "a{1}", CONFIG)


def test_what_does_not_fit(model, monkeypatch):
    monkeypatch.setattr(model, "cache_bytes", 1000)
    with pytest.raises(MemoryError, match="cache_bytes: expected at least .* of 7 positions"):
        blockbatch.fill(model, [1, 2, MASK, MASK, 3, MASK, 4], CONFIG)


def test_numbers_that_break_name_the_text(tmp_path):
    write_llada(tmp_path)
    broken = blockbatch.load_model(tmp_path, device="cpu")
    broken.weights.lm_head[:] = float("nan")
    with pytest.raises(blockbatch.NonFiniteLogitsError, match=r"text\[1\]|text\[0\]") as caught:
        blockbatch.fill(broken, [[1, broken.spec.mask_token_id]] * 2, CONFIG)
    assert caught.value.name == "text[0]"


def test_a_result_as_json(model):
    from dataclasses import asdict

    result = blockbatch.fill(model, "0{2}1", CONFIG)
    assert json.loads(json.dumps(asdict(result)))["gaps"][0]["length"] == 2
