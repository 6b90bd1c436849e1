"""`blockbatch fill`, traces of fills and their pictures."""

import io
import json
import sys

import numpy as np
import pytest

import blockbatch
from blockbatch.cli import main
from blockbatch.pictures import replay as replay_page
from blockbatch.pictures.states import expand
from blockbatch.tracing import replay, save_trace, trace_header
from browser import CHROMIUM, Browser
from command_runs import write_model
from test_replay_page import CANVASES, move_slider

TEXT = "one two {12} three {5} four one"
MASK, EOS = 159, 158


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def model(folder):
    return blockbatch.load_model(folder, device="cpu")


def called(capsys, *arguments):
    assert main([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments):
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_the_whole_text_is_written(folder, model, capsys, tmp_path, monkeypatch):
    expected = blockbatch.fill(model, TEXT).text
    assert called(capsys, "fill", TEXT, "--model", folder) == expected + "\n"
    (tmp_path / "text.txt").write_text(TEXT + "\n")
    with_newline = blockbatch.fill(model, TEXT + "\n").text
    assert with_newline.endswith("four one\n")
    assert called(capsys, "fill", "--text-file", tmp_path / "text.txt", "--model", folder) == with_newline
    for source in (["-"], ["--text-file", "-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((TEXT + "\n").encode())))
        assert called(capsys, "fill", *source, "--model", folder) == with_newline


@pytest.mark.parametrize("method", blockbatch.METHODS)
def test_json(folder, model, method, capsys):
    report = json.loads(called(capsys, "fill", TEXT, "--model", folder, "--method", method, "--json"))
    expected = blockbatch.fill(model, TEXT, blockbatch.DecodeConfig(method))
    assert (report["text"], report["tokens"]) == (expected.text, expected.tokens)
    assert report["gaps"] == [vars(gap) for gap in expected.gaps]
    assert report["nfe"] == {**vars(expected.nfe), "total": expected.nfe.total}
    assert report["method"] == method and report["settings"]["eos_exit"] == "none"
    decoded = sum(len(gap.tokens) for gap in expected.gaps)
    assert report["tokens_per_second"] == pytest.approx(decoded / report["seconds"])
    ids = "0,1,159,159,2"
    report = json.loads(called(capsys, "fill", "--ids", ids, "--model", folder, "--json"))
    assert report["tokens"] == blockbatch.fill(model, [0, 1, MASK, MASK, 2]).tokens


def test_a_stop_text(folder, model, capsys):
    config = blockbatch.DecodeConfig("vanilla", stop="two")
    expected = blockbatch.fill(model, TEXT, config).text
    found = called(capsys, "fill", TEXT, "--model", folder, "--method", "vanilla", "--stop", "two")
    assert found == expected + "\n"


def test_what_is_refused(folder, capsys):
    command = ("fill", "--model", folder)
    assert "text: expected at least one gap" in refused(capsys, *command, "one two")
    assert "text: expected a gap such as" in refused(capsys, *command, "one {x}")
    assert "gaps that grow while they are decoded, as DreamOn's" in refused(capsys, *command, "one {}")
    assert "--chat: expected a text as it is" in refused(capsys, *command, "one {2}", "--chat")
    assert "--bos: expected a text, got --ids" in refused(capsys, *command, "--ids", "1,159", "--bos")
    assert "model: expected one of full attention" in refused(capsys, "fill", "a{2}", "--model", "tiny-block")
    missing = refused(capsys, *command, "one {2}", "--trace", "/nowhere/trace.json")
    assert "--trace: expected a file in an existing folder" in missing
    with pytest.raises(SystemExit):
        main(["fill"])
    with pytest.raises(SystemExit):
        main(["fill", "one", "two"])
    assert "a text of several words stands in quotes" in capsys.readouterr().err


def region_of(model):
    """The canvas of TEXT before the first forward."""
    ids = blockbatch.infill.read_text(model, TEXT).ids
    return ids[ids.index(MASK) :]


@pytest.mark.parametrize(
    "options",
    [("--method", method) for method in blockbatch.METHODS]
    + [("--preset", "fast"), ("--preset", "careful"), ("--block-sizes", "4,8,128")],
    ids=" ".join,
)
def test_a_trace_begins_with_what_was_given(folder, model, options, tmp_path, capsys):
    path = tmp_path / "trace.json"
    report = json.loads(called(capsys, "fill", TEXT, "--model", folder, *options, "--trace", path, "--json"))
    trace = blockbatch.load_trace(path)
    assert trace["given"] == region_of(model) and trace["gen_length"] == len(trace["given"])
    assert trace["prompt_tokens"] == [0, 1]
    sizes = trace["block_sizes"]
    canvases = replay(trace["trace"], len(sizes), trace["gen_length"], MASK, trace["given"])
    assert canvases[sizes.index(trace["winner_block_size"])] == trace["canvas"]
    assert len(trace["trace"]) == report["nfe"]["total"]
    states = expand(trace)
    given = np.array(trace["given"])
    assert (states.tokens[:, :, given != MASK] == given[given != MASK]).all()
    assert states.tokens[-1].tolist() == canvases and (states.since[:, :, given != MASK] == -1).all()
    if len(sizes) == 1:
        assert report["branches"][0]["committed"] == trace["given"].count(MASK) == states.decoded[-1, 0]


def test_traces_of_generations_have_nothing_given(folder, tmp_path, capsys):
    called(
        capsys, "generate", "one", "--gen-length", 8, "--model", folder, "--trace", tmp_path / "trace.json"
    )
    assert blockbatch.load_trace(tmp_path / "trace.json")["given"] is None
    content = json.loads((tmp_path / "trace.json").read_text())
    records = content.pop("trace")
    for given, message in ([1, 2], "given: 2 tokens, gen_length 8"), ("x", "given"), ([-1] * 8, "given"):
        save_trace(tmp_path / "bad.json", records, **{**content, "given": given})
        with pytest.raises(ValueError, match=message):
            blockbatch.load_trace(tmp_path / "bad.json")


@pytest.fixture(scope="module")
def trace(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    config = blockbatch.DecodeConfig(gen_length=64, block_sizes=(4, 8, 16), trace=True)
    result = blockbatch.fill(model, TEXT, config)
    save_trace(path, result.trace, **trace_header(model, [0, 1], config, result))
    return path


def test_pictures(trace, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for kind, suffix in (("consensus", "png"), ("replay", "html")):
        called(capsys, "picture", kind, trace, "--out", tmp_path / f"{kind}.{suffix}")
        assert (tmp_path / f"{kind}.{suffix}").stat().st_size > 2000


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_replay_page_shows_what_was_given(trace, model, tmp_path):
    loaded = blockbatch.load_trace(trace)
    path = replay_page.draw(loaded, tmp_path / "page.html")
    given = region_of(model)
    with Browser() as page:
        page.open(path.as_uri())
        move_slider(page, 0)
        assert page.run(CANVASES) == [given] * 3
        marked = "[...document.querySelectorAll('.branch .cell.given')].length"
        assert page.run(marked) == 3 * sum(token != MASK for token in given)
        assert f"0 of {given.count(MASK)}" in page.run("document.querySelector('.tally').textContent")
        for forwards in range(1, len(loaded["trace"]) + 1):
            move_slider(page, forwards)
            expected = replay(loaded["trace"][:forwards], 3, len(given), MASK, given)
            assert page.run(CANVASES) == expected
        assert page.problems == []
