"""The command line's help, prompts given without an option, and what a mistyped word was meant to be."""

import io
import json
import shlex
import sys

import pytest

from blockbatch.cli import main
from blockbatch.cli.help import leaves
from blockbatch.cli.parser import build_parser
from blockbatch.cli.suggest import advice, close
from command_runs import PROMPT, decode_prompt, generate_arguments, run, write_model

PARSERS = {parser.prog: parser for parser in (build_parser(), *leaves(build_parser()))}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def examples_of(parser):
    text = parser.format_help()
    return [line.strip() for line in text.split("Examples:\n")[1].splitlines()]


@pytest.mark.parametrize("name", PARSERS)
def test_every_help_ends_in_examples_that_the_parser_takes(name):
    found = examples_of(PARSERS[name])
    assert found and all(len(line) <= 80 for line in found)
    for line in found:
        words = shlex.split(line.split("|")[-1])
        assert words.pop(0) == "blockbatch"
        options = build_parser().parse_args(words)
        assert callable(options.run)
    assert any(line.split("|")[-1].strip().startswith(name) for line in found)


def test_help_keeps_its_tables_within_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    lines = PARSERS["blockbatch generate"].format_help().splitlines()
    (place,) = (number for number, line in enumerate(lines) if line.startswith("  dual_cache "))
    assert lines[place + 1].startswith(" " * len("  dual_cache  ")) and lines[place + 1].strip()
    # Only commands to copy stand on one line, however long.
    assert all(len(line) < 60 for line in lines if not line.startswith(("    blockbatch", "    echo")))
    assert "%%" not in "".join(parser.format_help() for parser in PARSERS.values())


def without_prompt(folder):
    arguments = generate_arguments(folder, "--json", "--seed")[:-1]
    place = arguments.index("--prompt")
    return arguments[:place] + arguments[place + 2 :]


@pytest.mark.parametrize("text", [PROMPT, PROMPT + "\n"])
def test_a_prompt_needs_no_option(model_folder, capsys, monkeypatch, text):
    expected = decode_prompt(model_folder)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    for prompt in ([PROMPT], ["-"], ["--prompt-file", "-"]):
        if prompt[-1] == "-":
            sys.stdin.seek(0)
        assert main([*without_prompt(model_folder), *prompt]) == 0
        assert json.loads(capsys.readouterr().out)["tokens"] == expected.tokens


def test_a_prompt_comes_through_a_pipe(model_folder):
    words = without_prompt(model_folder)
    words.remove("--json")
    done = run("generate", "-", *words[1:], input=(PROMPT + "\n").encode())
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == decode_prompt(model_folder).text.removesuffix("\n") + "\n"


def test_bad_prompts_name_their_argument(model_folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    for prompt, message in {"-": "PROMPT: expected UTF-8 text, got -", "\udcff": "PROMPT: expected"}.items():
        assert main([*without_prompt(model_folder), prompt]) == 2
        assert capsys.readouterr().err.startswith(f"blockbatch: error: {message}")


REFUSED = {
    ("generat", "x"): "COMMAND: expected one of generate, fill, compare, eval, ablate, picture, serve, "
    "dynamo, got 'generat'; did you mean generate?",
    ("picture", "replays", "x"): "got 'replays'; did you mean replay?",
    ("generate", "x", "--tresh", "0.9"): "unrecognized arguments: --tresh 0.9; did you mean --threshold?",
    ("generate", "x", "--block_sizes=4"): "--block_sizes=4; did you mean --block-sizes?",
    ("generate", "x", "-gen-length", "8"): "did you mean --gen-length?",
    # The unknown option is the cause, not what its value was taken for.
    ("generate", "--prompt", "x", "--gen", "8"): "unrecognized arguments: --gen; did you mean --gen-length?",
    ("generate", "--promt=x"): "unrecognized arguments: --promt; did you mean --prompt?",
    ("eval", "--method", "blockbatch", "--limits", "3"): "did you mean --methods, --limit?",
    ("generate", "two", "words"): "words; a prompt of several words stands in quotes",
    ("generate", "x", "--prompt", "y"): "argument --prompt: not allowed with argument PROMPT",
    ("compare", "words"): "unrecognized arguments: words",
    ("generate", "x", "--qqq"): "unrecognized arguments: --qqq",
}


@pytest.mark.parametrize("arguments", REFUSED, ids=" ".join)
def test_words_that_the_parser_refuses(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("blockbatch: error: ") and last.endswith(REFUSED[arguments])


VALUES = {
    ("generate", "x", "--method", "Dual-Cache"): "got 'Dual-Cache'; did you mean dual_cache?",
    ("generate", "x", "--preset", "fats"): "got 'fats'; did you mean fast?",
    ("generate", "x", "--eos-exit", "prefx"): "got 'prefx'; did you mean prefix?",
    ("generate", "x", "--query-span", "opne"): "got 'opne'; did you mean open?",
    ("generate", "x", "--dtype", "float23"): "got 'float23'; did you mean float32?",
    ("generate", "x", "--backend", "refrence"): "got 'refrence'; did you mean reference?",
    ("compare", "--family", "aritmetic"): "got 'aritmetic'; did you mean arithmetic?",
    ("compare", "--methods", "blockbach"): "got 'blockbach'; did you mean blockbatch?",
    ("ablate", "sync_treshold"): "got 'sync_treshold'; did you mean sync-threshold?",
    ("eval", "--set", "own:treshold=0.9"): "got 'treshold'; did you mean threshold?",
    ("eval", "--preset", "gsmk8"): "got 'gsmk8'; did you mean gsm8k?",
    # Nothing like it is there.
    ("generate", "x", "--method", "magic"): "got 'magic'",
    ("generate", "x", "--gen-length", "64", "--block-sizes", "7"): "gen_length = 64, got 7",
}


@pytest.mark.parametrize("arguments", VALUES, ids=" ".join)
def test_values_that_are_not_known(arguments, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.endswith(VALUES[arguments] + "\n") and error.count("\n") == 1


def test_only_names_are_suggested():
    assert advice("x: expected a value from 0.5 to 1, got 0.3") == ""
    assert advice("block_sizes: expected integers such as 4,8,16, got '88'") == ""
    assert advice("x: expected one of a, b or none, got 'nome'") == "; did you mean none?"
    assert advice("no such thing") == ""
    assert close("--ge", ["--gen-length", "--gentle-end"]) is None  # both begin like that
    assert close("fast", ["fast", "paper"]) is None  # it is known: something else is wrong
