"""Likelihoods of given texts inside lm-evaluation-harness, offline, against `Model.log_likelihood`."""

import json

import pytest

import blockbatch
from blockbatch.tiny import generate_problems

pytest.importorskip("lm_eval", reason="needs pip install 'blockbatch[lm-eval]'")

TASK = """
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: choices.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def tiny():
    return blockbatch.load_model("tiny", device="cpu")


@pytest.fixture(scope="module")
def problems(tiny):
    """Questions with what the model answers, and the same answer backwards."""
    config = blockbatch.DecodeConfig(gen_length=64)
    found = []
    for problem in generate_problems("symbolic", "test", 3, 0):
        text = blockbatch.generate(tiny, problem.prompt, config).text
        found.append((problem.prompt, [text[::-1], text]))
    return found


def make(**options):
    from blockbatch.evaluation.harness import BlockBatchLM

    return BlockBatchLM("tiny", device="cpu", gen_length=64, **options)


def instance(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0)


def test_multiple_choice(tmp_path, monkeypatch, problems):
    import lm_eval
    from lm_eval.tasks import TaskManager

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    lines = [{"question": question, "choices": choices, "label": 1} for question, choices in problems]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "choice.yaml").write_text(TASK)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = lm_eval.simple_evaluate(
        make(likelihood_samples=8), tasks=["local_choice"], task_manager=tasks, bootstrap_iters=0
    )
    assert results["results"]["local_choice"]["acc,none"] == 1.0


def test_values_are_those_of_the_model(tiny, problems):
    lm = make(likelihood_samples=6, likelihood_seed=3, check_greedy=True)
    question, (other, answer) = problems[0]
    requests = [instance("loglikelihood", question, text) for text in (other, answer)]
    found = lm.loglikelihood(requests, disable_tqdm=True)
    for (value, _), text in zip(found, (other, answer), strict=True):
        assert value == pytest.approx(tiny.log_likelihood(question, text, samples=6, seed=3).value)
    config = blockbatch.DecodeConfig("vanilla", gen_length=1, block_size=1)
    token = blockbatch.generate(tiny, question, config).canvas
    first = tiny.tokenizer.decode(token)
    assert found[0][1] is False
    assert lm.loglikelihood([instance("loglikelihood", question, first)], disable_tqdm=True)[0][1] is True


def test_texts_longer_than_the_model(tiny, problems):
    lm = make(likelihood_samples=1)
    text = problems[0][0]
    (short,) = lm.loglikelihood_rolling([instance("loglikelihood_rolling", text)], disable_tqdm=True)
    ids = tiny.tokenizer.encode(text)
    expected = tiny.log_likelihood([tiny.eos_token_ids[0]], ids, samples=1)
    assert short == pytest.approx(expected.value)
    long = text * (1 + 2 * tiny.spec.max_length // len(ids))
    (value,) = lm.loglikelihood_rolling([instance("loglikelihood_rolling", long)], disable_tqdm=True)
    assert value < 2 * short


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"likelihood_samples": 0}, ValueError, "likelihood_samples: expected at least 1, got 0"),
        ({"likelihood_seed": "x"}, TypeError, "likelihood_seed: expected an integer, got 'x'"),
        ({"check_greedy": 1}, TypeError, "check_greedy: expected true or false, got 1"),
    ],
)
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)
