"""The command line: what it writes, and what it says about bad input."""

import json
import os
import re

import pytest
import tokenizers

import blockbatch
from blockbatch.cli import main
from blockbatch.tracing import replay
from command_runs import PROMPT, ROOT, decode_prompt, generate_arguments, run, write_model
from plain_models import write_llada


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model_folder):
    return decode_prompt(model_folder)


def test_generate_writes_the_text_alone_to_a_pipe(model_folder, expected):
    done = run(*generate_arguments(model_folder))
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == expected.text.removesuffix("\n") + "\n"


def test_generate_json_and_trace(model_folder, expected, tmp_path):
    trace = tmp_path / "trace.json"
    prompt_file = tmp_path / "prompt.txt"
    prompt_file.write_text(PROMPT + "\n")
    arguments = generate_arguments(model_folder, "--json", "--trace", str(trace))
    arguments[3:5] = ["--prompt-file", "-"]
    done = run(*arguments, stdin=prompt_file.open())
    assert (done.returncode, done.stderr) == (0, b"")
    report = json.loads(done.stdout)
    assert (report["text"], report["tokens"]) == (expected.text, expected.tokens)
    assert report["nfe"] == {**vars(expected.nfe), "total": expected.nfe.total}
    assert report["branches"] == [vars(branch) for branch in expected.branches]
    assert report["stop_reason"] == expected.stop_reason and report["block_size"] == expected.block_size
    assert report["tokens_per_second"] == pytest.approx(len(expected.tokens) / report["seconds"])
    assert report["method"] == "blockbatch"
    assert (
        report["settings"]["block_sizes"] == [4, 8, 16, 32, 64] and report["settings"]["eos_exit"] == "none"
    )

    saved = json.loads(trace.read_text())
    assert saved["prompt_tokens"] == [0, 1, 2] and saved["model"] == str(model_folder)
    sizes = saved["block_sizes"]
    canvases = replay(saved["trace"], len(sizes), saved["gen_length"], saved["mask_token_id"])
    assert canvases[sizes.index(saved["winner_block_size"])] == saved["canvas"] == expected.canvas
    assert sorted(os.listdir(tmp_path)) == ["prompt.txt", "trace.json"]


def test_only_given_options_reach_the_config(model_folder, capsys):
    options = ["--method", "dual_cache", "--threshold", "none", "--steps", "32", "--block-size", "16"]
    arguments = [
        "generate",
        "--model",
        str(model_folder),
        "--prompt-ids",
        "1,2",
        "--gen-length",
        "64",
        *options,
    ]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    config = blockbatch.DecodeConfig("dual_cache", gen_length=64, threshold=None, steps=32, block_size=16)
    result = blockbatch.generate(blockbatch.load_model(model_folder, device="cpu"), [1, 2], config)
    assert report["tokens"] == result.tokens and report["nfe"]["total"] == result.nfe.total == 32
    assert report["settings"] == {
        "gen_length": 64, "block_size": 16, "eos_exit": "none", "threshold": None, "steps": 32,
        "refresh_scope": "canvas", "query_span": "window", "drafts": None, "eos_token_ids": None, "stop": [],
    }  # fmt: skip


def test_compare_prints_a_row_for_each_method_and_end(model_folder, tmp_path):
    problems_file, figures = tmp_path / "problems.jsonl", tmp_path / "figures.json"
    problems_file.write_text('{"prompt": "one two", "answer": "no such answer"}\n\n{"prompt": "three"}\n')
    arguments = [
        "--model",
        str(model_folder),
        "--prompt-file",
        str(problems_file),
        "--gen-length",
        "32",
        "--show",
    ]
    done = run("compare", *arguments, "--json", str(figures))
    assert (done.returncode, done.stderr) == (0, b"")
    lines = done.stdout.decode().splitlines()
    baselines = ["vanilla", "prefix_cache", "dual_cache", "local_leap"]
    presets = ["fast", "careful"]
    labels = [*baselines, *(f"{name} +eos" for name in baselines), "blockbatch", *presets]
    table = {line[:17].strip(): line[17:].split() for line in lines[:18] if line[:17].strip() in labels}
    assert list(table) == labels
    rows = {row["label"]: row for row in json.loads(figures.read_text())["rows"]}
    model = blockbatch.load_model(model_folder, device="cpu")
    for label, row in rows.items():
        end = "prefix" if label.endswith("+eos") or label == "blockbatch" else "none"
        if label in presets:
            config = blockbatch.DecodeConfig.preset(label, gen_length=32)
        else:
            config = blockbatch.DecodeConfig(label.split()[0], gen_length=32, eos_exit=end)
        results = blockbatch.generate(model, ["one two", "three"], config)
        assert [problem["text"] for problem in row["problems"]] == [result.text for result in results]
        assert row["nfe"] == sum(result.nfe.total for result in results) / 2
        assert [problem["adopted"] for problem in row["problems"]] == [r.branches[0].adopted for r in results]
        tokens, seconds = (
            sum(problem[name] for problem in row["problems"]) for name in ("tokens", "seconds")
        )
        assert tokens == sum(len(result.tokens) for result in results)
        assert row["tokens_per_second"] == pytest.approx(tokens / seconds)
        right, nfe, seconds, *_, fewer = table[label]
        assert right == "0/1" and nfe == f"{row['nfe']:.1f}" and seconds == f"{row['seconds']:.2f}"
        assert fewer == f"{rows['vanilla +eos']['nfe'] / row['nfe']:.1f}x"
    assert table["vanilla"][4:6] == ["1.0x", "1.0x"]
    # The first line names the model, here a long path.
    assert [line for line in lines[1 : lines.index("Prompt")] if len(line) > 80] == []
    assert "  one two" in lines


def test_compare_judges_the_built_in_problems(tmp_path, monkeypatch, model_folder, capsys):
    monkeypatch.setattr("blockbatch.tasks.built_in.check", lambda problem, text: problem.family == "code")
    tokenizer = tokenizers.Tokenizer.from_file(str(ROOT / "python/blockbatch/tiny/checkpoint/tokenizer.json"))
    write_llada(
        tmp_path, vocab_size=tokenizer.get_vocab_size(), d_model=16, n_layers=1, max_sequence_length=512
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    arguments = [
        "--count",
        "4",
        "--family",
        "code",
        "--family",
        "symbolic",
        "--methods",
        "blockbatch,dual_cache",
    ]
    assert main(["compare", "--model", str(tmp_path), "--gen-length", "32", *arguments]) == 0
    text = capsys.readouterr().out
    assert "8 problems (4 code, 4 symbolic)" in text and "vs vanilla" not in text
    assert re.search(r"^right +code +symbolic$", text, re.M)
    assert re.findall(r"^(\w+(?: \+eos)?) +4/8 ", text, re.M) == [
        "dual_cache",
        "blockbatch",
        "dual_cache +eos",
    ]
    assert len(re.findall(r"4/4 +0/4$", text, re.M)) == 3


BAD_INPUT = {
    "block_sizes: expected divisors of gen_length = 64, got 7": ["--block-sizes", "7"],
    "merge_threshold: expected a value from 0.5 to 1, got 0.3": ["--merge-threshold", "0.3"],
    "method: expected one of blockbatch, vanilla": ["--method", "magic"],
    "steps: not an option of blockbatch": ["--steps", "8"],
    "--trace: expected a file in an existing folder": ["--trace", "no/such/folder/trace.json"],
    "model: expected an existing folder": ["--model", "no such folder"],
    "dtype: expected one of float32": ["--dtype", "int8"],
    "backend: expected None, 'reference'": ["--backend", "magic"],
    "prompt: expected prompt and gen_length to fit in 512": ["--gen-length", "512"],
}


@pytest.mark.parametrize("message", BAD_INPUT)
def test_bad_input_is_one_line_and_status_2(model_folder, capsys, message):
    assert main([*generate_arguments(model_folder), *BAD_INPUT[message]]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"blockbatch: error: {message}")
    assert printed.err.count("\n") == 1


def test_bad_prompts(model_folder, tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "lines.jsonl").write_text('{"prompt": "one"}\n{"prompt": 3}\n')
    generate, compare = ["generate", "--model", str(model_folder)], ["compare", "--model", str(model_folder)]
    cases = {
        "--prompt-file: expected UTF-8": [*generate, "--prompt-file", str(tmp_path / "latin.txt")],
        f"{tmp_path}/none: No such file": [*generate, "--prompt-file", str(tmp_path / "none")],
        "--prompt: expected UTF-8 text": [*generate, "--prompt", "\udcff"],
        "prompt: expected no MASK token (id 159)": [*generate, "--prompt-ids", "1,159"],
        "prompt: expected ids from 0 to 159, got 160": [*generate, "--prompt-ids", "160"],
        "--chat: expected a prompt as text": [*generate, "--prompt-ids", "1", "--chat"],
        "tokenizer: the chat format": [*generate, "--prompt", "one", "--chat"],
        f"--prompt-file: {tmp_path}/lines.jsonl, line 2": [
            *compare,
            "--prompt-file",
            str(tmp_path / "lines.jsonl"),
        ],
        "--family: expected one of": [*compare, "--family", "poetry"],
        "--count: expected at least 1": [*compare, "--count", "0"],
        "--methods: expected some of": [*compare, "--methods", "magic"],
    }
    for message, arguments in cases.items():
        assert main(arguments) == 2, message
        error = capsys.readouterr().err
        assert error.startswith(f"blockbatch: error: {message}") and error.count("\n") == 1


def test_arguments_that_argparse_refuses(capsys):
    for arguments, message in {
        (): "the following arguments are required: COMMAND",
        ("generate",): "one of the arguments PROMPT --prompt --prompt-file --prompt-ids is required",
        ("generate", "--prompt", "x", "--threshold", "high"): "expected a number or none, got 'high'",
        ("generate", "--prompt", "x", "--gen", "8"): "--gen; did you mean --gen-length?",
    }.items():
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2
        error = capsys.readouterr().err
        assert "\nblockbatch: error: " in error and message in error


def test_version_and_help_name_what_there_is(capsys):
    for arguments in (["--version"], ["generate", "--help"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"blockbatch {blockbatch.__version__}\n")
    assert all(method in text for method in blockbatch.METHODS)
