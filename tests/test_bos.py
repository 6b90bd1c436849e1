"""The token that begins a text: when prompts get it, in `generate`, in evaluations and in the harness."""

import json
import shlex

import pytest

import blockbatch
from blockbatch.cli import main
from blockbatch.evaluation import presets, runner
from blockbatch.evaluation.harness_options import decode_options
from blockbatch.evaluation.records import read_run
from blockbatch.evaluation.settings import Setting
from blockbatch.models import CheckpointError
from blockbatch.models.tokenizer import Tokenizer
from blockbatch.prompts import encode_prompt
from blockbatch.tasks import Problem
from plain_models import write_dream
from test_tokenizer import write_tokenizer

BOS = "<|beginoftext|>"
SPECIAL = (BOS, "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|mask|>")
BOS_ID = 256 + SPECIAL.index(BOS)
CONFIG = blockbatch.DecodeConfig(gen_length=16)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A random Dream with these settings of its tokenizer."""

    def write(**settings):
        folder = tmp_path_factory.mktemp("dream")
        # MASK is the last id, EOS the one before.
        write_dream(folder, vocab_size=256 + len(SPECIAL), sharpness=4.0)
        write_tokenizer(folder, SPECIAL, eos_token="<|endoftext|>", **settings)
        return str(folder)

    return write


@pytest.fixture(scope="module")
def begins(folder_of):
    return folder_of(bos_token=BOS, add_bos_token=True)


@pytest.fixture(scope="module")
def plain(folder_of):
    return folder_of(bos_token={"content": BOS}, add_bos_token=False)


def load(folder):
    return blockbatch.load_model(folder, device="cpu")


def test_the_settings_of_the_tokenizer(begins, plain, folder_of):
    for folder, wanted in ((begins, True), (plain, False), (folder_of(bos_token=BOS), False)):
        tokenizer = load(folder).tokenizer
        assert (tokenizer.bos_token_id, tokenizer.add_bos) == (BOS_ID, wanted)
        assert tokenizer.encode("ab") == load(plain).tokenizer.encode("ab"), "the text alone"
    assert load(folder_of()).tokenizer.bos_token_id is None
    for settings, message in (
        ({"add_bos_token": True}, "add_bos_token needs bos_token to be a known token, got None"),
        ({"add_bos_token": True, "bos_token": "<s>"}, "to be a known token, got '<s>'"),
        ({"add_bos_token": "yes"}, "add_bos_token must be true or false, got 'yes'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            Tokenizer.from_folder(folder_of(**settings))
    assert load(folder_of(bos_token="<s>")).tokenizer.bos_token_id is None


def test_generate_does_as_the_settings_say(begins, plain):
    with_bos, without = load(begins), load(plain)
    ids = without.tokenizer.encode("1+1=")
    expected = blockbatch.generate(without, [BOS_ID, *ids], CONFIG).canvas
    for prompt in ("1+1=", BOS + "1+1=", [BOS_ID, *ids]):  # once; ids stay as they are
        assert blockbatch.generate(with_bos, prompt, CONFIG).canvas == expected
    bare = blockbatch.generate(without, "1+1=", CONFIG).canvas
    assert blockbatch.generate(with_bos, ids, CONFIG).canvas == bare != expected
    assert encode_prompt(without, "1+1=", add_bos=True) == [BOS_ID, *ids]
    assert encode_prompt(with_bos, "1+1=", add_bos=False) == ids
    assert encode_prompt(with_bos, "") == [BOS_ID]


@pytest.mark.parametrize("chat", [False, True])
def test_evaluations_do_so_too_but_in_the_chat_format(begins, plain, tmp_path, chat):
    """There a prompt begins as the format says."""
    problem = Problem("own", "1", "1+1=", None, None)
    digests = []
    for number, (folder, prompt) in enumerate(((begins, "1+1="), (plain, "1+1="), (plain, BOS + "1+1="))):
        given = Problem("own", "1", prompt, None, None) if number else problem
        run = runner.run(
            load(folder), [given], [Setting("s", CONFIG)], tmp_path / f"{number}.jsonl", chat=chat
        )
        digests.append(run.records[0].prompt)
    assert digests[0] == digests[1 if chat else 2] != digests[2 if chat else 1]


@pytest.fixture(scope="module")
def make():
    pytest.importorskip("lm_eval", reason="needs pip install 'blockbatch[lm-eval]'")
    from blockbatch.evaluation.harness import BlockBatchLM

    return lambda folder, **options: BlockBatchLM(folder, device="cpu", gen_length=16, **options)


def ask(lm, *contexts, **gen_kwargs):
    from lm_eval.api.instance import Instance

    requests = [Instance("generate_until", {}, (context, gen_kwargs), 0) for context in contexts]
    return lm.generate_until(requests, disable_tqdm=True)


def test_model_args_count_more_than_the_tokenizers_settings(make, begins, plain):
    def text(folder, prompt):
        return blockbatch.generate(load(folder), prompt, CONFIG).text

    bare, begun = text(plain, "1+1="), text(begins, "1+1=")
    assert bare != begun
    for folder, options, expected in (
        (plain, {}, bare),
        (begins, {}, begun),
        (plain, {"add_bos_token": True}, begun),
        (begins, {"add_bos_token": False}, bare),
    ):
        lm = make(folder, **options)
        assert ask(lm, "1+1=", BOS + "1+1=") == [expected, begun]
        assert lm.get_model_info()["decoding"]["add_bos_token"] is (expected == begun)
    lm = make(begins)
    chat = lm.apply_chat_template([{"role": "user", "content": "hello"}])
    assert ask(lm, chat) == [text(plain, chat)]
    assert ask(make(begins, add_bos_token=True), chat) == [text(plain, BOS + chat)]


def test_a_prompt_that_does_not_fit_keeps_its_bos(make, plain, caplog):
    lm = make(plain, add_bos_token=True)
    long = "ab" * lm.max_length
    ids = load(plain).tokenizer.encode(long)
    room = lm.max_length - 16
    (text,) = ask(lm, long)
    expected = blockbatch.generate(load(plain), [BOS_ID, *ids[-(room - 1) :]], CONFIG)
    assert text == expected.text and "do not fit" in caplog.text


def test_escape_until(make, plain):
    whole = blockbatch.generate(load(plain), "1+1=", CONFIG)
    stop = whole.text[3:5]
    assert ask(make(plain), "1+1=", until=[stop]) == [whole.text.split(stop)[0]]
    lm = make(plain, escape_until=True)
    assert ask(lm, "1+1=", until=[stop]) == [whole.text]
    info = lm.get_model_info()
    assert info["decoding"]["escape_until"] is True
    assert info["decoded"]["nfe"]["total"] == whole.nfe.total, "nor does it end decoding"


def test_model_args_as_text(plain):
    pytest.importorskip("lm_eval")
    from blockbatch.evaluation.harness import BlockBatchLM

    arguments = f"pretrained={plain},add_bos_token=true,escape_until=true,eos_exit=none,device=cpu"
    info = BlockBatchLM.create_from_arg_string(arguments).get_model_info()["decoding"]
    assert (info["add_bos_token"], info["escape_until"], info["eos_exit"]) == (True, True, "none")


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"add_bos_token": "yes"}, TypeError, "add_bos_token: expected true or false, got 'yes'"),
        ({"escape_until": None}, TypeError, "escape_until: expected true or false, got None"),
        ({"escape_until": 1}, TypeError, "escape_until: expected true or false, got 1"),
    ],
)
def test_bad_model_args(make, plain, options, error, message):
    with pytest.raises(error, match=message):
        make(plain, **options)


def test_a_bos_that_is_not_there(make, folder_of):
    with pytest.raises(ValueError, match="add_bos_token: expected a tokenizer with a bos_token"):
        make(folder_of(), add_bos_token=True)


def test_half_a_character_does_not_end_a_run(make, plain, caplog):
    half = "a\ud83db"
    lm = make(plain, batch_size=2)
    texts = ask(lm, "1+1=", half, "2+2=", until=["\udc00", "\n\n"])
    expected = blockbatch.generate(
        load(plain), ["1+1=", "2+2="], blockbatch.DecodeConfig(gen_length=16, stop="\n\n")
    )
    assert texts == [expected[0].text, "", expected[1].text]
    assert "request[1]" in caplog.text and "expected text of whole characters" in caplog.text


def command(capsys, *arguments):
    """The model_args, the other options and the words of a printed command."""
    presets.main(list(arguments))
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if not line.startswith("#"))
    words = shlex.split(line)
    begin = words.index("--model_args")
    given = dict(part.split("=") for part in words[begin + 1].split(","))
    return given, words, printed


DREAM = presets.PAPER_MODELS[2]


@pytest.mark.parametrize("name", presets.PRESETS)
def test_commands_of_dream_are_those_of_its_authors(capsys, name):
    given, words, printed = command(capsys, name, "--model", DREAM)
    assert given["pretrained"] == "Dream-org/Dream-v0-Base-7B" and given["preset"] == name
    assert given["block_sizes"] == "4:8:16:32:64:128" and given["add_bos_token"] == "true"
    assert given["eos_exit"] == "none", "the canvas is filled"
    escapes = name != "math"
    assert (given.get("escape_until") == "true") is escapes is ("cut them before judging" in printed)
    assert "--apply_chat_template" not in words, "it is a base model"
    flags = ("pretrained", "preset", "add_bos_token", "escape_until")
    options = decode_options(name, {key: value for key, value in given.items() if key not in flags})
    config = blockbatch.DecodeConfig(**options)
    assert config == presets.get_preset(name).config(policy="dream_published", eos_exit="none")
    assert config.block_sizes == (4, 8, 16, 32, 64, 128) and config.gen_length == 256


def test_commands_of_dream_by_other_methods_and_of_other_models(capsys):
    given, _, _ = command(capsys, "gsm8k", "--model", "/models/Dream-v0-Base-7B/", "--method", "dual_cache")
    assert given["add_bos_token"] == given["escape_until"] == "true" and "block_sizes" not in given
    for model in (*presets.PAPER_MODELS[:2], "/home/dreamer/LLaDA"):
        given, _, printed = command(capsys, "gsm8k", "--model", model)
        assert set(given) == {"pretrained", "method", "preset"} and "#" not in printed


def test_the_option_of_the_commands(begins, plain, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def generate(folder, *options):
        command = ["generate", "--model", folder, "--device", "cpu", "--gen-length", "16", "--json"]
        assert main([*command, "--prompt", "1+1=", *options]) == 0
        return json.loads(capsys.readouterr().out)["tokens"]

    assert generate(plain, "--bos") == generate(begins) == generate(begins, "--bos") != generate(plain)
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "1+1="}))
    common = ["--device", "cpu", "--gen-length", "16", "--methods", "blockbatch"]
    found = {}
    for name, arguments in (("with", [plain, "--bos"]), ("set", [begins]), ("without", [plain])):
        evaluation = ["eval", "--tasks", "own.jsonl", "--out", name, *common, "--model", *arguments]
        assert main(evaluation) == 0
        found[name] = read_run(tmp_path / name / "results.jsonl")
        assert main(evaluation) == 0, "it goes on"
    digests = {name: {record.prompt for record in run.records} for name, run in found.items()}
    assert digests["with"] == digests["set"] != digests["without"]
    assert found["with"].header["bos"] is True and "bos" not in found["without"].header
    comparison = ["compare", "--prompt-file", "own.jsonl", *common, "--json", "-", "--model", plain]
    capsys.readouterr()
    texts = []
    for options in (["--bos"], []):
        assert main([*comparison, *options]) == 0
        texts.append(json.loads(capsys.readouterr().out)["rows"][0]["problems"][0]["text"])
    assert texts[0] != texts[1]
    assert main(["generate", "--prompt-ids", "1", "--bos"]) == 2
    assert "--bos: expected a prompt as text, got --prompt-ids" in capsys.readouterr().err
    for command in (["generate", "--prompt", "x"], ["compare"], ["eval"]):
        assert main([*command, "--model", plain, "--device", "cpu", "--bos", "--chat"]) == 2
        assert "--bos: expected only without --chat" in capsys.readouterr().err
