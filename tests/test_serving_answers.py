"""Final tokens as text: never half a character, stop texts across borders, the limit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import blockbatch

pytest.importorskip("fastapi", reason="needs the packages of the extra serve")
from blockbatch.serving.answers import Answer, ChatShape, CompletionShape, Usage  # noqa: E402
from blockbatch.stops import cut  # noqa: E402

TEXTS = ["plain words", "café \N{SNOWMAN} 你好 \U0001f600\U0001f680 end", "a\n\nb\n\nc", "x" * 30, ""]


@pytest.fixture(scope="module")
def tokenizer():
    return blockbatch.load_model("tiny", device="cpu").tokenizer


EOS = (1414,)


def told(tokenizer, tokens, steps, limit, stop=()):
    """An answer that is told of `tokens` bit by bit, and the pieces that it gave."""
    answer = Answer(tokenizer, limit, stop, EOS)
    pieces = []
    for end in sorted(steps):
        if answer.finish_reason is None:
            pieces.append(answer.push(tokens[:end]))
    if answer.finish_reason is None:
        pieces.append(answer.finish([*tokens, EOS[0]]))
    return answer, pieces


@given(
    text=st.sampled_from(TEXTS) | st.text(alphabet="ab\n é😀", max_size=20),
    steps=st.lists(st.integers(0, 40), max_size=8),
    limit=st.integers(1, 40),
    stop=st.lists(st.sampled_from(["\n\n", "b", "é", "a b", "😀", "ab\n"]), max_size=2),
)
def test_pieces_make_the_text_whatever_came_when(tokenizer, text, steps, limit, stop):
    tokens = tokenizer.encode(text)
    answer, pieces = told(tokenizer, tokens, steps, limit, stop)
    kept, expected, stopped = cut(tokenizer, tokens[:limit], stop, EOS)
    if limit < len(tokens) and not stopped:
        expected = expected.rstrip("\N{REPLACEMENT CHARACTER}")
    assert "".join(pieces) == answer.text == expected
    assert "\N{REPLACEMENT CHARACTER}" not in answer.text
    assert answer.tokens == kept and len(answer.tokens) <= limit
    assert answer.finish_reason == ("stop" if stopped or len(tokens) <= limit else "length")


def test_half_a_character_waits_and_is_left_out_at_the_limit(tokenizer):
    tokens = tokenizer.encode("a\U0001f600b")
    assert len(tokens) > 3
    answer = Answer(tokenizer, 100, (), EOS)
    assert [answer.push(tokens[:count]) for count in range(1, len(tokens))][0] == "a"
    assert answer.text == "a\U0001f600"
    short, pieces = told(tokenizer, tokens, [1, 2], 2)
    assert (short.text, short.finish_reason, "".join(pieces)) == ("a", "length", "a")


def test_what_may_become_a_stop_text_is_held_back_and_let_go(tokenizer):
    tokens = tokenizer.encode("one\ntwo")
    answer = Answer(tokenizer, 100, ("\n\n",), EOS)
    at = len(tokenizer.encode("one\n"))
    assert answer.push(tokens[:at]) == "one"
    assert answer.finish([*tokens[:at], EOS[0]]) == "\n" and answer.finish_reason == "stop"


def test_it_ends_at_the_limit_once_the_next_token_is_known(tokenizer):
    tokens = tokenizer.encode("a b c d e f")
    answer = Answer(tokenizer, 3, (), EOS)
    answer.push(tokens[:3])
    assert answer.finish_reason is None  # the next may be the end of the text
    answer.push(tokens[:4])
    assert answer.finish_reason == "length" and answer.tokens == tokens[:3]
    ended = Answer(tokenizer, 3, (), EOS)
    ended.push(tokens[:3])
    ended.finish([*tokens[:3], EOS[0]])
    assert ended.finish_reason == "stop"


def test_usage_adds_up():
    usage = Usage()
    usage.add(3, 8, {"init": 1, "block": 3, "refresh": 0}, 6)
    assert usage.json() == {
        "prompt_tokens": 3,
        "completion_tokens": 8,
        "total_tokens": 11,
        "blockbatch": {
            "nfe": {"init": 1, "block": 3, "refresh": 0, "total": 4},
            "branches": 6,
            "tokens_per_forward": 2.0,
        },
    }
    usage.add(1, 0, {"init": 1, "block": 0, "refresh": 0}, 1)
    assert usage.json()["blockbatch"]["branches"] == [6, 1] and usage.forwards == 5
    assert Usage().json()["blockbatch"]["tokens_per_forward"] is None


def test_shapes():
    chat, text = ChatShape("x", "m", True), CompletionShape("x", "m")
    assert chat.begin(0)["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chat.piece(1, "a")["choices"] == [
        {"index": 1, "delta": {"content": "a"}, "logprobs": None, "finish_reason": None}
    ]
    assert chat.end(0, "stop")["choices"][0]["delta"] == {} and chat.piece(0, "a")["usage"] is None
    assert text.begin(0) is None and "usage" not in text.piece(0, "a")
    assert text.end(0, "length")["choices"][0] == {
        "index": 0, "text": "", "logprobs": None, "finish_reason": "length",
    }  # fmt: skip
    assert chat.piece(0, "")["id"] == "chatcmpl-x" and text.piece(0, "")["id"] == "cmpl-x"
