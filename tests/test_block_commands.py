"""The command line, tables, pictures and lm-evaluation-harness with block-causal models."""

import json

import pytest

import block_models
import blockbatch
from blockbatch import generation
from blockbatch.cli import canvas, main
from blockbatch.evaluation import runner
from blockbatch.evaluation.settings import Setting
from blockbatch.tasks import load_task
from blockbatch.tracing import replay
from test_tokenizer import write_tokenizer

VOCABULARY = 260
CHAT = ("<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module", params=["sdar", "fast_dllm_v2"])
def folder(request, tmp_path_factory):
    """A random model over bytes, with a chat format."""
    target = tmp_path_factory.mktemp("models") / request.param
    block_models.write(target, request.param, seed=8, block_size=16, vocab_size=VOCABULARY)
    write_tokenizer(target, CHAT)
    return target


@pytest.fixture(scope="module")
def model(folder):
    return blockbatch.load_model(folder, device="cpu")


def called(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    written = capsys.readouterr()
    assert not code, written.err
    return written.out


def saved_trace(folder, method, path, capsys):
    command = ("generate", "--model", folder, "--prompt", "Why?", "--chat", "--gen-length", 32, "--json")
    out = called(capsys, *command, "--method", method, "--threshold", 0.3, "--trace", path)
    return json.loads(out), blockbatch.load_trace(path)


@pytest.mark.parametrize("method", ["block_diffusion", "blockbatch"])
def test_generate_and_its_trace(folder, model, method, tmp_path, capsys):
    report, trace = saved_trace(folder, method, tmp_path / "trace.json", capsys)
    config = blockbatch.DecodeConfig(method=method, gen_length=32, threshold=0.3)
    prompt = model.tokenizer.chat("Why?", model.spec.family)
    expected = blockbatch.generate(model, prompt, config)
    assert (report["text"], report["tokens"]) == (expected.text, expected.tokens)
    assert report["nfe"] == {**vars(expected.nfe), "total": expected.nfe.total}
    assert len(trace["trace"]) == expected.nfe.total
    sizes = trace["block_sizes"]
    canvases = replay(trace["trace"], len(sizes), trace["gen_length"], trace["mask_token_id"])
    held = canvases[sizes.index(trace["winner_block_size"])]
    assert held == trace["canvas"] and held[: len(expected.canvas)] == expected.canvas


@pytest.mark.parametrize("method", ["block_diffusion", "blockbatch"])
def test_pictures_and_the_replay_page(folder, method, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    saved_trace(folder, method, tmp_path / "trace.json", capsys)
    for kind in ("replay", "consensus") if method == "blockbatch" else ("replay",):
        target = tmp_path / f"{kind}.{'html' if kind == 'replay' else 'png'}"
        called(capsys, "picture", kind, tmp_path / "trace.json", "--out", target)
        assert target.stat().st_size > 2000


def test_the_canvas_of_a_terminal(model):
    for method in ("block_diffusion", "blockbatch"):
        config = blockbatch.DecodeConfig(method=method, gen_length=48, threshold=0.3, eos_token_ids=())
        session = generation.open_session(model, [1, 2, 3], config)
        pieces = canvas.token_pieces(model.tokenizer)
        while session.step() is not None:
            view = canvas.read_view(session)
            held = [sum(token != view.mask_token_id for token in tokens) for tokens in view.tokens]
            assert 0 <= view.window[0] <= view.window[1] and held[view.leader] == max(held)
            assert canvas.frame(view, pieces, canvas.ASCII, "title", 1.0, 80, 24)
        result = generation.build_result(model, session, 0)
        assert view.nfe == result.nfe.total
        assert canvas.read_view(session).tokens[0][: len(result.canvas)] == result.canvas


def test_compare_runs_what_the_model_has(folder, capsys):
    out = called(capsys, "compare", "--model", folder, "--gen-length", 32, "--count", 2)
    assert "block_diffusion" in out and "blockbatch" in out and "vanilla" not in out


def test_an_evaluation(folder, tmp_path, capsys):
    out = called(
        capsys, "eval", "--model", folder, "--tasks", "arithmetic", "--limit", 2, "--gen-length", 32,
        "--out", tmp_path / "run", "--traces", tmp_path / "traces",
        "--set", "static:method=block_diffusion,threshold=1.0,prefix_cache=true",
    )  # fmt: skip
    assert "block_diffusion" in out and "static" in out
    # The notes below the table speak of these models' forwards, not of those of full attention.
    assert "those that denoise a block" in out and "refreshes" not in out and "+eos" not in out
    records = [json.loads(line) for line in (tmp_path / "run/results.jsonl").read_text().splitlines()[1:]]
    assert len(records) == 6
    assert all(set(record["nfe"]) == {"prefill", "denoise", "store", "total"} for record in records)
    traces = sorted((tmp_path / "traces").iterdir())
    assert len(traces) == 6 and all(blockbatch.load_trace(path) for path in traces)


def test_a_method_of_other_models_is_refused_before_any_decode(model, tmp_path):
    problems = load_task("arithmetic", limit=1)
    for config in (blockbatch.DecodeConfig(method="vanilla"), blockbatch.DecodeConfig(block_sizes=(128,))):
        with pytest.raises(ValueError, match="method: expected|block_sizes: expected"):
            runner.run(model, problems, [Setting("a", config)], tmp_path / "results.jsonl")
    tiny = blockbatch.load_model("tiny", device="cpu")
    with pytest.raises(
        ValueError, match="method: expected blockbatch or vanilla .* for llada, .* is full, got"
    ):
        blockbatch.generate(tiny, [1], blockbatch.DecodeConfig(method="block_diffusion"))


def test_lm_evaluation_harness(folder, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from blockbatch.evaluation.harness import BlockBatchLM

    lm = BlockBatchLM.create_from_arg_string(
        f"pretrained={folder},method=block_diffusion,threshold=0.3,prefix_cache=true,gen_length=32,device=cpu"
    )
    requests = [
        lm_eval.api.instance.Instance("generate_until", {}, (text, {"until": ["\n\n"]}), 0)
        for text in ("Question: one?", "Question: two?", "x" * 3000)
    ]
    texts = lm.generate_until(requests, disable_tqdm=True)
    config = blockbatch.DecodeConfig(method="block_diffusion", gen_length=32, threshold=0.3, stop=("\n\n",))
    expected = [
        blockbatch.generate(lm.model, text, config).text for text in ("Question: one?", "Question: two?")
    ]
    assert texts[:2] == expected
    info = lm.get_model_info()
    assert info["decoded"]["requests"] == 3
    assert set(info["decoded"]["nfe"]) == {"prefill", "denoise", "store", "total"}


def test_an_empty_think_block_by_command(monkeypatch, capsys):
    # The built-in model has no chat tokens: what is asked of the tokenizer is enough.
    asked = []

    def chat(messages, family, enable_thinking=None):
        asked.append(enable_thinking)
        return "3 + 4 ="

    model = blockbatch.load_model("tiny-block", device="cpu")
    monkeypatch.setattr(type(model.tokenizer), "chat", lambda self, *given, **named: chat(*given, **named))
    for options, expected in ((["--chat"], None), (["--chat", "--no-thinking"], False)):
        command = ["generate", "3 + 4 =", "--model", "tiny-block", "--device", "cpu", "--gen-length", "32"]
        assert main([*command, *options]) == 0
        assert asked.pop() is expected
    for command in ("generate", "compare"):
        wrong = [command, "--model", "tiny-block", "--device", "cpu", "--no-thinking"]
        wrong += ["3 + 4 ="] if command == "generate" else ["--count", "1"]
        assert main(wrong) == 2
        assert "--no-thinking: expected it beside --chat" in capsys.readouterr().err
    assert main(["generate", "a", "--device", "cpu", "--chat", "--no-thinking"]) == 2
    assert "--no-thinking: expected a model of the family sdar, got llada" in capsys.readouterr().err
