"""The model "blockbatch" inside lm-evaluation-harness, offline, against `blockbatch.generate`."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import blockbatch
from blockbatch.models import CheckpointError
from plain_models import write_llada
from test_tokenizer import LLADA_SPECIAL, write_tokenizer

FOLDER = Path(__file__).parent / "data" / "lm_eval"
PROBLEMS = [json.loads(line) for line in (FOLDER / "problems.jsonl").read_text().splitlines()]
EXAMPLES = [json.loads(line) for line in (FOLDER / "examples.jsonl").read_text().splitlines()]
QUESTIONS = [problem["question"] for problem in PROBLEMS]
UNTIL = ("Question:", "</s>")
OPTIONS = {"gen_length": 64, "block_sizes": (4, 16, 64)}


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """The environment in which nothing is looked for elsewhere."""
    home = str(tmp_path_factory.mktemp("home"))
    return {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": home, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def lm_eval(offline):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in offline.items():
            patch.setenv(name, value)
        module = pytest.importorskip("lm_eval", reason="needs pip install 'blockbatch[lm-eval]'")
        pytest.importorskip("datasets")  # reads the environment when it is imported
    return module


@pytest.fixture(scope="module")
def make(lm_eval):
    from blockbatch.evaluation.harness import BlockBatchLM

    return lambda pretrained="tiny", **options: BlockBatchLM(pretrained, device="cpu", **options)


@pytest.fixture
def evaluate(lm_eval, monkeypatch):
    """Runs the local task; returns the texts, the prompts and the results."""
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(FOLDER)
    tasks = TaskManager(include_path=str(FOLDER), include_defaults=False)

    def run(lm, **options):
        results = lm_eval.simple_evaluate(
            lm, tasks=["local_arithmetic"], task_manager=tasks, bootstrap_iters=0, **options
        )
        samples = sorted(results["samples"]["local_arithmetic"], key=lambda sample: sample["doc_id"])
        prompts = [sample["arguments"][0][0] for sample in samples]
        return [sample["resps"][0][0] for sample in samples], prompts, results

    return run


@pytest.fixture
def request_of(lm_eval):
    from lm_eval.api.instance import Instance

    return lambda context, **gen_kwargs: Instance("generate_until", {}, (context, gen_kwargs), 0)


@pytest.fixture(scope="module")
def tiny():
    return blockbatch.load_model("tiny", device="cpu")


@pytest.fixture(scope="module")
def expected(tiny):
    config = blockbatch.DecodeConfig(**OPTIONS, stop=UNTIL)
    return blockbatch.generate(tiny, QUESTIONS, config)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_texts_and_scores_are_those_of_generate(make, evaluate, expected, batch_size):
    texts, prompts, results = evaluate(make(**OPTIONS, batch_size=batch_size))
    assert prompts == QUESTIONS
    assert texts == [result.text for result in expected]
    final = [text.split("#### ")[-1].split("\n")[0] for text in texts]
    right = [number == problem["answer"].split("#### ")[-1] for number, problem in zip(final, PROBLEMS)]
    assert any(right)
    assert results["results"]["local_arithmetic"]["exact_match,answer"] == sum(right) / len(right)
    decoded = results["config"]["decoded"]
    assert decoded["requests"] == len(PROBLEMS) and decoded["seconds"] > 0
    assert decoded["nfe"]["total"] == sum(result.nfe.total for result in expected) / len(expected)
    assert results["config"]["decoding"]["block_sizes"] == OPTIONS["block_sizes"]


def test_stop_sequences_end_decoding(make, evaluate, expected):
    """Or, asked not to, only the text."""
    first_lines = [result.text.split("\n")[0] for result in expected]
    nfe = {}
    for stop_early in (True, False):
        texts, _, results = evaluate(
            make(**OPTIONS, stop_early=stop_early, batch_size=2), gen_kwargs={"until": ["\n"]}
        )
        assert texts == first_lines
        nfe[stop_early] = results["config"]["decoded"]["nfe"]["total"]
    assert nfe[True] < nfe[False] == sum(result.nfe.total for result in expected) / len(expected)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """A random checkpoint with the tokens of LLaDA's chat format, a token a byte."""
    folder = tmp_path_factory.mktemp("chat")
    vocabulary = 256 + len(LLADA_SPECIAL)
    write_llada(folder, vocab_size=vocabulary, eos_token_id=257, max_sequence_length=2048, sharpness=4.0)
    write_tokenizer(folder)
    return folder


def test_chat_turns(make, evaluate, chat_folder):
    lm = make(str(chat_folder), gen_length=16, batch_size=6)
    turns = []
    for example in EXAMPLES:
        turns.append({"role": "user", "content": example["question"]})
        turns.append({"role": "assistant", "content": example["answer"]})
    tokenizer, system = lm.model.tokenizer, {"role": "system", "content": "Count."}
    options = {"num_fewshot": 2, "apply_chat_template": True, "system_instruction": "Count."}
    texts, prompts, _ = evaluate(lm, fewshot_as_multiturn=True, **options)
    assert prompts == [
        tokenizer.chat([system, *turns, {"role": "user", "content": question}], "llada")
        for question in QUESTIONS
    ]
    config = blockbatch.DecodeConfig(gen_length=16, stop=UNTIL)
    assert texts == [result.text for result in blockbatch.generate(lm.model, prompts, config)]
    _, (prompt, *_), _ = evaluate(lm, fewshot_as_multiturn=False, limit=1, **options)
    assert prompt.count("<|start_header_id|>user") == 1
    assert all(example["answer"] in prompt for example in EXAMPLES)

    begun = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because "}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == (
        tokenizer.chat("Why?", "llada") + "Because "
    )
    with pytest.raises(ValueError, match="chat_history: expected a last turn of the assistant, got 'user'"):
        lm.apply_chat_template(begun[:1], add_generation_prompt=False)
    assert lm.chat_template(False) == "" and "(user)<|eot_id|>" in lm.chat_template(True)
    with pytest.raises(ValueError, match="apply_chat_template: expected no name, .* got 'fancy'"):
        lm.chat_template("fancy")
    assert "/" not in lm.tokenizer_name and "llada" in lm.tokenizer_name


def test_a_model_without_chat_says_so(make, evaluate):
    with pytest.raises(CheckpointError, match="was not trained for chat"):
        evaluate(make(**OPTIONS), apply_chat_template=True)


def test_lengths_come_from_the_task_unless_they_are_fixed(make, tiny, request_of):
    """Rounded up for the block sizes, and the text cut where it is longer than asked for."""
    lm, (prompt, *_) = make(block_sizes="4:8"), QUESTIONS
    (text,) = lm.generate_until([request_of(prompt, max_gen_toks=13)], disable_tqdm=True)
    config = blockbatch.DecodeConfig(gen_length=16, block_sizes=(4, 8))
    whole = blockbatch.generate(tiny, prompt, config)
    assert len(whole.tokens) > 13
    assert text == tiny.tokenizer.decode(whole.tokens[:13])
    config = blockbatch.DecodeConfig(gen_length=16, block_sizes=(16,))
    # Two requests that must not share a batch, the second of them longer.
    requests = [request_of(prompt, max_gen_toks=1), request_of(prompt + "?", max_gen_toks=16, until="=")]
    texts = [
        tiny.tokenizer.decode(blockbatch.generate(tiny, prompt, config).tokens[:1]),
        blockbatch.generate(tiny, prompt + "?", config).text.split("=")[0],
    ]
    assert make(block_sizes=16, batch_size=2).generate_until(requests, disable_tqdm=True) == texts
    (text,) = make(**OPTIONS).generate_until([request_of(prompt, max_gen_toks=5)], disable_tqdm=True)
    assert len(tiny.tokenizer.encode(text)) > 5


def test_presets(make):
    lm = make(preset="gsm8k")
    assert lm.get_model_info()["decoding"]["gen_length"] == 256 and lm.stop_early
    lm = make(preset="gsm8k", method="dual_cache")
    assert not lm.stop_early, "its published forward counts include the whole canvas"
    assert make(preset="gsm8k", method="dual_cache", eos_exit="prefix").stop_early
    assert make(preset="gsm8k", method="dual_cache", stop_early=True).stop_early
    for options in ({"preset": "fast", "gen_length": 256}, {"preset": "gsm8k", "decode_preset": "fast"}):
        lm = make(**options)
        decoding = lm.get_model_info()["decoding"]
        assert decoding["gen_length"] == 256 and lm.stop_early
        fast = blockbatch.DecodeConfig.preset("fast", gen_length=256)
        assert (decoding["method"], decoding["query_span"]) == (fast.method, fast.query_span)
    with pytest.raises(ValueError, match="decode_preset: expected one of paper, fast"):
        make(decode_preset="quick")


def test_adopted_drafts_are_told(make, tiny, request_of):
    lm, prompt = make(preset="careful", gen_length=64, threshold=0.99), QUESTIONS[0]
    lm.generate_until([request_of(prompt)], disable_tqdm=True)
    config = blockbatch.DecodeConfig.preset("careful", gen_length=64, threshold=0.99)
    assert lm.get_model_info()["decoded"]["adopted"] == blockbatch.generate(tiny, prompt, config).adopted > 0


def test_a_prompt_that_does_not_fit_loses_its_beginning(make, tiny, request_of, caplog):
    lm, room = make(**OPTIONS), tiny.spec.max_length - OPTIONS["gen_length"]
    ids = tiny.tokenizer.encode("word " * room)
    (text,) = lm.generate_until([request_of("word " * room)], disable_tqdm=True)
    config = blockbatch.DecodeConfig(**OPTIONS)
    assert text == blockbatch.generate(tiny, ids[-room:], config).text
    assert f"a prompt of {len(ids)} tokens and gen_length = 64 do not fit" in caplog.text
    with pytest.raises(ValueError, match=f"gen_length: expected less than the {lm.max_length} positions"):
        make(gen_length=2048).generate_until([request_of("word")], disable_tqdm=True)


def test_answers_are_kept(make, evaluate, tmp_path, monkeypatch):
    cache = str(tmp_path / "answers")
    texts, _, _ = evaluate(make(**OPTIONS), use_cache=cache, limit=2)
    monkeypatch.setattr("blockbatch.evaluation.harness.decode", None)
    again, _, _ = evaluate(make(**OPTIONS), use_cache=cache, limit=2)
    assert again == texts


def test_what_is_not_offered(make, request_of):
    lm = make(**OPTIONS)
    decoded = lm.get_model_info()["decoded"]["requests"]
    with pytest.raises(ValueError, match="gen_kwargs: expected greedy decoding"):
        lm.generate_until([request_of("a"), request_of("b", do_sample=True)], disable_tqdm=True)
    assert lm.get_model_info()["decoded"]["requests"] == decoded == 0, "refused before any work"


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"method": "fast"}, ValueError, "method: expected one of"),
        (
            {"block_sizes": "4:8", "gen_length": 12},
            ValueError,
            "block_sizes: expected divisors of gen_length",
        ),
        ({"stop_early": "yes"}, TypeError, "stop_early: expected true or false, got 'yes'"),
        ({"batch_size": "auto"}, ValueError, "batch_size: expected an integer of at least 1, got 'auto'"),
        ({"pretrained": "no/such/folder"}, OSError, "no/such/folder"),
    ],
)
def test_bad_arguments(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_model_args_count_more_than_the_command_line(make):
    from blockbatch.evaluation.harness import BlockBatchLM

    command_line = {"device": "cuda:7", "batch_size": 2, "max_batch_size": None}
    lm = BlockBatchLM.create_from_arg_string(
        "pretrained=tiny,device=cpu,block_sizes=4:8,eos_exit=none", command_line
    )
    assert (lm.device.type, lm.batch_size) == ("cpu", 2)
    decoding = lm.get_model_info()["decoding"]
    assert (decoding["block_sizes"], decoding["eos_exit"]) == ((4, 8), "none")


def test_a_model_without_a_tokenizer(make, tmp_path):
    write_llada(tmp_path)
    with pytest.raises(ValueError, match="pretrained: expected a model with a tokenizer"):
        make(str(tmp_path))


def test_the_command(lm_eval, offline, expected, tmp_path):
    """`lm_eval --model blockbatch` where the package is installed, else through its launcher."""
    hooks = metadata.entry_points(group="torch.backends")
    installed = any(hook.name == "blockbatch_lm_eval" for hook in hooks)
    module = "lm_eval" if installed else "blockbatch.evaluation.registration"
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
    command = [sys.executable, "-m", module, "--model", "blockbatch", "--batch_size", "3", "--log_samples"]
    command += ["--model_args", "pretrained=tiny,gen_length=64,block_sizes=[4,16,64]"]
    command += ["--tasks", "local_arithmetic", "--include_path", ".", "--output_path", str(tmp_path)]
    done = subprocess.run(
        command,
        env={**os.environ, **offline, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
        cwd=FOLDER,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|local_arithmetic|" in done.stdout
    (samples,) = tmp_path.rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    texts = {row["doc_id"]: row["resps"][0][0] for row in rows}
    assert [texts[index] for index in range(len(PROBLEMS))] == [result.text for result in expected]
