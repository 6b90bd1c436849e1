"""The Monte Carlo bound of a given answer against its plain computation over all maskings."""

import itertools
import math

import pytest
import torch

import blockbatch
from blockbatch.models.likelihood import encode_pair, maskings
from blockbatch.tiny import generate_problems
from plain_models import PlainModel, write_dream, write_llada

WRITERS = {"llada": write_llada, "dream": write_dream}
PROMPT, ANSWER = [3, 9, 4, 11], [5, 17, 2]


@pytest.fixture(params=WRITERS)
def folder(request, tmp_path):
    WRITERS[request.param](tmp_path)
    return tmp_path


def plain_estimate(plain, prompt, answer, masked, vocab_size):
    """What one masking says: the masked tokens' log-probabilities, weighed with l / l'."""
    ids = prompt + [plain.mask_token_id if hidden else token for token, hidden in zip(answer, masked)]
    (logits,) = plain.logits([ids])
    logs = logits[:, :vocab_size].log_softmax(-1)
    total = 0.0
    for place, (token, hidden) in enumerate(zip(answer, masked)):
        if hidden:
            total += float(logs[len(prompt) + place - plain.prediction_offset, token])
    return total * len(answer) / sum(masked)


def exact_bound(plain, prompt, answer, vocab_size):
    """The mean over all numbers of masked tokens, and over all their places."""
    by_count = []
    for count in range(1, len(answer) + 1):
        places = list(itertools.combinations(range(len(answer)), count))
        values = [
            plain_estimate(plain, prompt, answer, [i in chosen for i in range(len(answer))], vocab_size)
            for chosen in places
        ]
        by_count.append(sum(values) / len(values))
    return sum(by_count) / len(by_count)


def test_every_sample_is_the_plain_computation(folder):
    model, plain = blockbatch.load_model(folder, device="cpu"), PlainModel(folder, torch.float64)
    drawn = maskings(len(ANSWER), 12, seed=5)
    values = [plain_estimate(plain, PROMPT, ANSWER, row, model.spec.vocab_size) for row in drawn.tolist()]
    for rows in (1, 5, 32):
        found = model.log_likelihood(PROMPT, ANSWER, samples=12, seed=5, rows=rows)
        assert found.value == pytest.approx(sum(values) / 12, rel=1e-4)
        assert found.samples == 12
        error = torch.tensor(values, dtype=torch.float64).std() / math.sqrt(12)
        assert found.standard_error == pytest.approx(float(error), rel=1e-3)


def test_more_samples_come_closer(folder):
    model, plain = blockbatch.load_model(folder, device="cpu"), PlainModel(folder, torch.float64)
    truth = exact_bound(plain, PROMPT, ANSWER, model.spec.vocab_size)

    def errors(samples):
        found = [model.log_likelihood(PROMPT, ANSWER, samples=samples, seed=seed) for seed in range(12)]
        assert len({one.value for one in found}) > 1, "seeds draw different maskings"
        return [one.value - truth for one in found]

    few, many = errors(3), errors(192)
    spread = [math.sqrt(sum(error**2 for error in each) / len(each)) for each in (few, many)]
    assert spread[1] < spread[0] / 3
    assert abs(sum(many) / len(many)) < 3 * spread[1] / math.sqrt(len(many)) + 1e-6


@pytest.mark.parametrize("length, samples", [(1, 4), (5, 5), (5, 20), (7, 3), (300, 128)])
def test_maskings(length, samples):
    drawn = maskings(length, samples, seed=1)
    counts = drawn.sum(1)
    assert drawn.shape == (samples, length) and counts.min() >= 1
    assert len(set(counts.tolist())) == min(samples, length), "as different as there is room for"
    if samples % length == 0:
        assert torch.bincount(counts, minlength=length + 1)[1:].tolist() == [samples // length] * length
    assert not torch.equal(drawn, maskings(length, samples, seed=2)) or length == 1
    assert torch.equal(drawn, maskings(length, samples, seed=1))


def test_the_right_answer_is_likelier_than_another():
    model = blockbatch.load_model("tiny", device="cpu")
    problem = generate_problems("symbolic", "test", 1, 0)[0]
    config = blockbatch.DecodeConfig(gen_length=64)
    right = blockbatch.generate(model, problem.prompt, config).text
    other = right[::-1]
    values = [model.log_likelihood(problem.prompt, text, samples=16).value for text in (right, other)]
    assert values[1] < values[0] < 0


def test_texts_are_cut_together():
    model = blockbatch.load_model("tiny", device="cpu")
    before, tokens = encode_pair(model, "a = 3 ", "b = 4")
    assert before + tokens == model.tokenizer.encode("a = 3 b = 4")
    assert before == model.tokenizer.encode("a = 3")


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"answer": []}, ValueError, "answer: expected at least one token, got none"),
        ({"answer": "text"}, TypeError, "answer: expected token ids as the prompt is, got str"),
        ({"prompt": "text"}, TypeError, "answer: expected a text as the prompt is, got list"),
        ({"prompt": "a", "answer": "b"}, ValueError, "prompt: expected token ids, since the model has no"),
        ({"answer": [10**6]}, ValueError, "answer: expected ids from 0 to"),
        ({"samples": 0}, ValueError, "samples: expected at least 1, got 0"),
        ({"rows": 1.5}, TypeError, "rows: expected an integer, got 1.5"),
        ({"seed": -1}, ValueError, "seed: expected at least 0, got -1"),
        ({"prompt": [1] * 100_000}, ValueError, "prompt, answer: expected at most"),
    ],
)
def test_bad_input(tmp_path, changes, error, message):
    write_llada(tmp_path)
    model = blockbatch.load_model(tmp_path, device="cpu")
    with pytest.raises(error, match=message):
        model.log_likelihood(**{"prompt": PROMPT, "answer": ANSWER} | changes)


def test_dream_needs_a_token_in_front(tmp_path):
    write_dream(tmp_path)
    model = blockbatch.load_model(tmp_path, device="cpu")
    with pytest.raises(ValueError, match="prompt: expected at least one token, since dream predicts"):
        model.log_likelihood([], ANSWER)


def test_a_block_diffusion_model_has_another_bound():
    model = blockbatch.load_model("tiny-block", device="cpu")
    with pytest.raises(ValueError, match="model: expected one of full attention, .*, got sdar"):
        model.log_likelihood([1], ANSWER)
