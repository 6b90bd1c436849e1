"""Inputs as users have them: ids of numpy and torch, one stop text, half characters, files from Windows."""

import json

import numpy as np
import pytest
import torch

import blockbatch
from blockbatch.cli import main
from blockbatch.evaluation import runner
from blockbatch.evaluation.settings import Setting
from blockbatch.tasks import Problem, load_task, parse_problems
from blockbatch.texts import decode_file
from plain_models import write_dream, write_llada
from test_generation import write_tokenizer

VOCABULARY = 40
CONFIG = blockbatch.DecodeConfig(gen_length=16, block_sizes=(4, 16))


@pytest.fixture(scope="module", params=["llada", "dream"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write = {"llada": write_llada, "dream": write_dream}[request.param]
    write(folder, vocab_size=VOCABULARY, sharpness=3.0)
    write_tokenizer(folder)
    return blockbatch.load_model(folder, device="cpu")


@pytest.fixture(scope="module")
def tiny():
    return blockbatch.load_model("tiny", device="cpu")


@pytest.mark.parametrize("nothing", [[], (), np.array([]), torch.tensor([])], ids=repr)
def test_no_prompts_give_no_results(model, nothing):
    assert blockbatch.generate(model, nothing, CONFIG) == []
    with pytest.raises(ValueError, match="prompt: expected one prompt, got a list of 0"):
        blockbatch.stream(model, nothing, CONFIG)


def test_an_empty_prompt_is_none_of_them(model):
    if model.spec.family == "llada":
        (result,) = blockbatch.generate(model, [[]], CONFIG)
        assert result.canvas == blockbatch.generate(model, "", CONFIG).canvas
    else:
        with pytest.raises(ValueError, match=r"prompt\[0\]: expected at least one token"):
            blockbatch.generate(model, [[]], CONFIG)


IDS = [1, 2, 3, 4]
SINGLE = [
    np.array(IDS),
    np.array(IDS, dtype=np.uint8),
    [np.int32(token) for token in IDS],
    [torch.tensor(token) for token in IDS],
    torch.tensor(IDS, dtype=torch.int16),
    range(1, 5),
]


@pytest.mark.parametrize("prompt", SINGLE, ids=repr)
def test_ids_of_numpy_and_torch(model, prompt):
    expected = blockbatch.generate(model, IDS, CONFIG).canvas
    assert blockbatch.generate(model, prompt, CONFIG).canvas == expected
    assert "".join(blockbatch.stream(model, prompt, CONFIG)) == model.tokenizer.decode(
        blockbatch.generate(model, IDS, CONFIG).tokens
    )
    several = blockbatch.generate(model, [prompt, IDS, "01"], CONFIG)
    assert [result.canvas for result in several[:2]] == [expected] * 2


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_a_matrix_of_ids_is_a_list_of_prompts(model, make):
    found = blockbatch.generate(model, make([IDS, IDS]), CONFIG)
    assert [result.canvas for result in found] == [blockbatch.generate(model, IDS, CONFIG).canvas] * 2
    texts = blockbatch.generate(model, np.array(["01", "12"]), CONFIG)
    assert len(texts) == 2


@pytest.mark.parametrize(
    "prompt, message",
    [
        (np.array(5), "prompt: expected text, token ids or a list of either, got ndarray"),
        (np.array([1.0, 2.0]), r"prompt\[0\]: expected text or token ids, got 1.0"),
        (torch.tensor([True]), r"prompt\[0\]: expected text or token ids, got True"),
        ([np.bool_(True)], r"prompt\[0\]: expected text or token ids"),
        (b"\x01\x02", "prompt: expected text, token ids or a list of either, got bytes"),
        ([1, "a"], r"prompt\[0\]: expected text or token ids, got 1"),
        ([b"a"], r"prompt\[0\]: expected text or token ids, got b'a'"),
        ({1: 2}, "prompt: expected text, token ids or a list of either, got dict"),
    ],
    ids=repr,
)
def test_what_is_no_prompt(model, prompt, message):
    with pytest.raises(TypeError, match=message):
        blockbatch.generate(model, prompt, CONFIG)


def test_numbers_of_numpy_and_torch_in_settings():
    config = blockbatch.DecodeConfig(
        gen_length=np.int64(64),
        block_sizes=np.array([32, 4]),
        threshold=np.float32(0.5),
        sync_threshold=torch.tensor(3),
        refresh_interval=np.uint8(16),
        eos_token_ids=torch.tensor([1, 2]),
        trace=np.bool_(True),
    )
    plain = blockbatch.DecodeConfig(
        gen_length=64,
        block_sizes=(4, 32),
        threshold=0.5,
        sync_threshold=3,
        refresh_interval=16,
        eos_token_ids=(1, 2),
        trace=True,
    )
    assert config == plain and hash(config) == hash(plain)
    assert json.dumps(vars(config)) == json.dumps(vars(plain))
    drafted = blockbatch.DecodeConfig("dual_cache", block_size=np.int16(16), drafts=np.array([1, 2]))
    assert (drafted.block_size, drafted.drafts) == (16, (1, 2))
    assert all(type(draft) is int for draft in drafted.drafts)
    for wrong in (np.float64(64.0), np.bool_(True), torch.tensor(64.0), np.array([64])):
        with pytest.raises(TypeError, match="gen_length: expected an integer"):
            blockbatch.DecodeConfig(gen_length=wrong)


def test_one_stop_text(tiny):
    config = blockbatch.DecodeConfig(gen_length=64, stop="\n")
    assert config == blockbatch.DecodeConfig(gen_length=64, stop=("\n",))
    result = blockbatch.generate(tiny, "a = 3\n", config)
    assert "\n" not in result.text
    with pytest.raises(ValueError, match="stop: expected texts of at least one character"):
        blockbatch.DecodeConfig(stop="")
    with pytest.raises(TypeError, match="stop: expected a sequence of texts, got b'a'"):
        blockbatch.DecodeConfig(stop=b"a")


HALF = "a\ud83db"
SAID = r"expected text of whole characters, got half of one \(the lone surrogate U\+D83D\) at position 1"


def test_half_a_character_is_refused_by_name(model):
    for call in (blockbatch.generate, blockbatch.stream):
        with pytest.raises(ValueError, match=f"prompt: {SAID}"):
            call(model, HALF, CONFIG)
    with pytest.raises(ValueError, match=rf"prompt\[2\]: {SAID}"):
        blockbatch.generate(model, ["0", [1], HALF], CONFIG)
    with pytest.raises(ValueError, match=f"stop: {SAID}"):
        blockbatch.DecodeConfig(stop=HALF)
    with pytest.raises(ValueError, match=rf"stop\[1\]: {SAID}"):
        blockbatch.DecodeConfig(stop=("a", HALF))
    with pytest.raises(ValueError, match=f"text: {SAID}"):
        model.tokenizer.encode(HALF)
    model.tokenizer.encode("\N{GRINNING FACE}")  # a whole one


def problems_file(tmp_path):
    path = tmp_path / "own.jsonl"
    lines = [{"prompt": "a = 3\n", "answer": 3}, {"prompt": HALF}, {"prompt": "b = 4\n", "id": "last"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.mark.parametrize("name", ["prompt", "answer", "id"])
def test_half_a_character_in_a_file_is_told_with_its_line(name):
    text = json.dumps({"prompt": "x"}) + "\n\n" + json.dumps({"prompt": "y", name: HALF})
    with pytest.raises(ValueError, match=f"own.jsonl, line 3: {name}: {SAID}"):
        parse_problems(text, task="own", where="own.jsonl")


def test_half_a_character_does_not_end_an_evaluation(tmp_path, tiny, caplog, monkeypatch, capsys):
    path = problems_file(tmp_path)
    with caplog.at_level("WARNING"):
        problems = load_task(str(path))
    assert [problem.id for problem in problems] == ["1", "last"]
    assert f"{path}, line 2: prompt: expected text of whole characters" in caplog.text

    caplog.clear()
    setting = Setting("short", blockbatch.DecodeConfig(gen_length=16))
    given = [*problems, Problem("own", "half", HALF, None, None)]
    with caplog.at_level("WARNING"):
        run = runner.run(tiny, given, [setting], tmp_path / "results.jsonl")
    assert [record.problem for record in run.records] == ["1", "last"]
    assert "problem own half: expected text of whole characters" in caplog.text
    with pytest.raises(ValueError, match="problems: expected at least one of whole characters, got none"):
        runner.run(tiny, given[-1:], [setting], tmp_path / "none.jsonl")

    monkeypatch.chdir(tmp_path)
    arguments = ["--device", "cpu", "--methods", "blockbatch", "--gen-length", "16"]
    assert main(["compare", "--prompt-file", str(path), *arguments]) == 2
    assert f"--prompt-file: {path}, line 2: prompt: expected text of whole" in capsys.readouterr().err


def windows(text, encoding):
    return text.replace("\n", "\r\n").encode(encoding)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_from_windows_are_the_same_text(encoding):
    text = "first\n\nzweite Zeile \N{EURO SIGN}\nx\ry\n"
    assert decode_file(windows(text, encoding)) == text
    lines = "\n".join(json.dumps({"prompt": prompt}) for prompt in ("a\nb", "c"))
    here, there = (
        [problem.prompt for problem in parse_problems(read, task="t", where="f")]
        for read in (lines, decode_file(windows(lines, encoding)))
    )
    assert here == there == ["a\nb", "c"]


def test_separators_inside_a_problem_end_no_line():
    line = json.dumps({"prompt": "a\u2028b\x85c\x1d"}, ensure_ascii=False)
    (problem,) = parse_problems("\ufeff" + line, task="t", where="f")
    assert problem.prompt == "a\u2028b\x85c\x1d"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_prompt_file_from_windows(tmp_path, capsys, encoding):
    texts = []
    for name, content in (("here", b"a = 3\nb = 4\n"), ("there", windows("a = 3\nb = 4\n", encoding))):
        (tmp_path / name).write_bytes(content)
        command = ["generate", "--device", "cpu", "--gen-length", "32", "--json", "--prompt-file"]
        assert main([*command, str(tmp_path / name)]) == 0
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1]


def test_a_model_folder_from_windows(tmp_path):
    write_llada(tmp_path, vocab_size=VOCABULARY, sharpness=3.0)
    write_tokenizer(tmp_path)
    here = blockbatch.load_model(tmp_path, device="cpu")
    for path in tmp_path.glob("*.json"):
        path.write_bytes(windows(path.read_text("utf-8"), "utf-8-sig"))
    there = blockbatch.load_model(tmp_path, device="cpu")
    assert there.spec == here.spec and there.tokenizer.encode("0123") == here.tokenizer.encode("0123")


def test_merges_from_windows(tmp_path):
    from blockbatch.models.tokenizer import Tokenizer

    found = []
    for encoding in ("utf-8", "utf-8-sig"):
        folder = tmp_path / encoding
        folder.mkdir()
        vocabulary = json.dumps({"a": 0, "b": 1, "ab": 2})
        (folder / "vocab.json").write_bytes(windows(vocabulary, encoding))
        (folder / "merges.txt").write_bytes(windows("#version: 0.2\na b\n", encoding))
        settings = json.dumps({"tokenizer_class": "DreamTokenizer"})
        (folder / "tokenizer_config.json").write_bytes(windows(settings, encoding))
        found.append(Tokenizer.from_folder(folder).encode("abba"))
    assert found == [[2, 1, 0]] * 2
