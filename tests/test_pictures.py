"""Traces read back, the states worked out of them, and the pictures drawn of them."""

import json
import re

import numpy as np
import pytest

import blockbatch
import picture_traces
from blockbatch.cli import main
from blockbatch.pictures import consensus, replay, style
from blockbatch.pictures.states import COMMITTED, MASKED, MERGED, SYNCED, agreement, expand, nfe
from blockbatch.tracing import load_trace
from blockbatch.tracing import replay as replayed
from picture_traces import EOS, MASK, handmade, write


@pytest.fixture(scope="module")
def model():
    return blockbatch.load_model("tiny", device="cpu")


@pytest.fixture(scope="module")
def decodes(model):
    """Decodes with merges, syncs, refreshes and disagreement."""
    settings = (
        ("arithmetic", 4, {"gen_length": 64}),
        ("symbolic", 4, {"gen_length": 64, "sync_threshold": 2, "eos_exit": "window"}),
        ("symbolic", 3, {"gen_length": 32, "eos_exit": "none", "threshold": 0.6, "refresh_interval": 8}),
        ("arithmetic", 0, {"gen_length": 32, "method": "dual_cache"}),
    )
    return [
        picture_traces.decode(model, picture_traces.problem(family, index), **kwargs)
        for family, index, kwargs in settings
    ]


def test_states_of_real_decodes(decodes):
    seen = set()
    for trace, tokens, decoded in decodes:
        states, sizes = expand(trace), trace["block_sizes"]
        assert states.tokens.shape == (len(trace["trace"]), len(sizes), trace["gen_length"])
        for step in range(states.num_steps):
            part = trace["trace"][: step + 1]
            canvases = replayed(part, len(sizes), trace["gen_length"], trace["mask_token_id"])
            assert states.tokens[step].tolist() == canvases == tokens[step]
            assert states.decoded[step].tolist() == decoded[step]
            assert {leader for _, leader in states.syncs[step]} <= {states.leader[step]}
        assert (states.origin == MASKED).tolist() == (states.tokens == trace["mask_token_id"]).tolist()
        assert nfe(states)[-1].tolist() == [trace["nfe"][phase] for phase in ("init", "block", "refresh")]
        seen |= set(np.unique(states.change)) | set(states.phases)
    assert seen == {MASKED, COMMITTED, MERGED, SYNCED, "init", "block", "refresh"}


def test_states_made_by_hand():
    states = expand(handmade())
    m = MASK
    assert states.tokens.tolist() == [
        [[1, m, m, m], [1, 2, m, m], [1, m, m, m]],
        [[1, 3, m, m], [1, 2, 4, m], [1, 2, 4, 8]],
        [[1, 2, 4, 8], [1, 2, 4, 8], [1, 2, 4, 8]],
        [[1, 2, 4, 8], [1, 2, 4, 8], [1, 2, 4, 8]],
    ]
    c, g, s = COMMITTED, MERGED, SYNCED
    assert states.origin[2].tolist() == [[c, s, s, s], [c, c, c, c], [c, g, c, c]]
    assert states.change[1].tolist() == [[0, c, 0, 0], [0, 0, c, 0], [0, g, c, c]]
    assert states.change[2].tolist() == [[0, s, s, s], [0, 0, 0, c], [0, 0, 0, 0]]
    # What the third branch holds already stays its own when it is synced.
    assert not states.change[3].any()
    assert states.since[3].tolist() == [[0, 2, 2, 2], [0, 0, 1, 2], [0, 1, 1, 1]]
    assert states.decoded.tolist() == [[1, 2, 1], [2, 3, 3], [4, 4, 3], [4, 4, 4]]
    assert states.leader.tolist() == [1, 1, 1, 0]
    assert states.windows[3].tolist() == [[2, 3], [3, 4], [0, 4]]
    assert states.active[2].tolist() == [True, True, False]
    # A synced token brings the leader's confidence; that of a merged one is not recorded.
    assert states.confidence[2, 0].tolist() == pytest.approx([0.95, 0.97, 0.91, 0.9])
    assert np.isnan(states.confidence[1, 2, 1]) and np.isnan(states.confidence[0, 0, 1])


def test_a_sync_can_mask_again():
    commits = [(0, [2], [1], [0.9]), (1, [0, 1], [1, 1], [0.9, 0.9])]
    first = picture_traces.record("init", {0: (0, 4), 1: (0, 4), 2: (0, 4)}, commits=commits)
    second = picture_traces.record("block", {0: (0, 4)}, syncs=[(0, 1)])
    states = expand(handmade(trace=[first, second]))
    assert states.tokens[1, 0].tolist() == [1, 1, MASK, MASK]
    assert states.origin[1, 0].tolist() == states.change[1, 0].tolist() == [SYNCED, SYNCED, MASKED, MASKED]
    assert states.since[1, 0].tolist() == [1, 1, -1, -1] and np.isnan(states.confidence[1, 0, 2])


def test_agreement():
    found = agreement(expand(handmade()))
    assert found.token[1].tolist() == [1, 2, 4, EOS] and found.count[1].tolist() == [3, 2, 2, 1]
    assert found.distinct[1].tolist() == [1, 2, 1, 1]
    assert found.token[0].tolist() == [1, 2, MASK, MASK] and found.count[0].tolist() == [3, 1, 0, 0]
    # On a tie the lowest id stands for the position.
    tied = picture_traces.record(
        "init", {0: (0, 4), 1: (0, 4)}, commits=[(0, [0], [5], [0.9]), (1, [0], [3], [0.9])]
    )
    found = agreement(expand(handmade(trace=[tied])))
    assert (found.token[0, 0], found.count[0, 0], found.distinct[0, 0]) == (3, 1, 2)


def test_trace_file_keeps_everything(decodes, tmp_path):
    trace = decodes[0][0]
    loaded = load_trace(write(tmp_path / "trace.json", trace))
    assert loaded["trace"] == trace["trace"]
    assert {str(token): piece for token, piece in loaded.pop("pieces").items()} == trace.pop("pieces")
    assert {**loaded, "settings": None} == {**trace, "settings": None}
    trace["pieces"] = {str(k): v for k, v in load_trace(tmp_path / "trace.json")["pieces"].items()}
    used = {
        token
        for record in trace["trace"]
        for c in record["commits"] + record["merges"]
        for token in c["tokens"]
    }
    assert {str(token) for token in used} <= set(trace["pieces"])
    assert "".join(trace["pieces"][str(token)] for token in trace["prompt_tokens"]) == trace["prompt"]


def test_a_file_with_records_alone_is_enough(tmp_path):
    found = handmade()
    small = {name: found[name] for name in ("gen_length", "block_sizes", "mask_token_id", "trace")}
    path = tmp_path / "small.json"
    path.write_text(json.dumps(small))
    assert load_trace(path)["pieces"] == {}
    consensus.draw(load_trace(path), tmp_path / "small.png")
    replay.draw(load_trace(path), tmp_path / "small.html")


def broken(change):
    found = json.loads(json.dumps(handmade()))
    change(found)
    return json.dumps(found)


BAD_FILES = {
    "a file that is not text": b"\xff\xfe\x00",
    "a file that is not JSON": "trace",
    "without a list named trace": '{"model": "tiny"}',
    r"\[1, 2\], without a list": "[1, 2]",
    "nested too deeply": "[" * 100_000,
    "no record": broken(lambda found: found.update(trace=[])),
    "gen_length: 'long'": broken(lambda found: found.update(gen_length="long")),
    "Infinity, which is no number of JSON": broken(lambda found: found.update(gen_length=float("inf"))),
    "canvas of 4 tokens, gen_length 8": broken(lambda found: found.update(gen_length=8)),
    "block_sizes: True": broken(lambda found: found.update(block_sizes=[True])),
    r"block_sizes: \[1, 2, 2\]": broken(lambda found: found.update(block_sizes=[1, 2, 2])),
    "winner_block_size: 3": broken(lambda found: found.update(winner_block_size=3)),
    "pieces: an object with x": broken(lambda found: found.update(pieces={"x": "y"})),
    "record 0: kind block": broken(lambda found: found["trace"].pop(0)),
    "record 1: kind: 'step'": broken(lambda found: found["trace"][1].update(kind="step")),
    "record 1: windows": broken(lambda found: found["trace"][1]["windows"].pop()),
    r"record 1: window: \[3, 1\]": broken(lambda found: found["trace"][1]["windows"].__setitem__(0, [3, 1])),
    "record 0: positions: 4 where": broken(
        lambda found: found["trace"][0]["commits"][0].update(positions=[4])
    ),
    "record 0: tokens: 2 for 1": broken(lambda found: found["trace"][0]["commits"][0].update(tokens=[1, 1])),
    "NaN, which is no number of JSON": broken(
        lambda found: found["trace"][0]["commits"][0].update(confidence=[float("nan")])
    ),
    r"record 0: confidence: \[7\]": broken(
        lambda found: found["trace"][0]["commits"][0].update(confidence=[7])
    ),
    "record 2: leader: 3 where": broken(lambda found: found["trace"][2]["syncs"][0].update(leader=3)),
    "record 2: syncs: nothing": broken(lambda found: found["trace"][2].pop("syncs")),
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_files_that_are_no_traces(message, tmp_path, capsys):
    path, content = tmp_path / "bad.json", BAD_FILES[message]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        load_trace(path)
    assert str(error.value).startswith(f"{path}: expected a trace")
    assert main(["picture", "replay", str(path)]) == 2
    assert re.fullmatch(r"blockbatch: error: .*\n", capsys.readouterr().err)
    assert [file.name for file in tmp_path.iterdir()] == ["bad.json"]


def pixels(path):
    from matplotlib import image

    return (image.imread(path)[..., :3] * 255).round().astype(int)


def share_of(found, color):
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return (abs(found - wanted).max(-1) <= 3).mean()


def test_consensus(decodes, tmp_path):
    trace = decodes[0][0]
    states = expand(trace)
    assert agreement(states).distinct.max() > 1 and "refresh" in states.phases
    path = consensus.draw(load_trace(write(tmp_path / "trace.json", trace)), tmp_path / "map.png")
    found = pixels(path)
    assert found.shape[1] == round(style.PAGE_WIDTH * style.DPI) and found.std() > 30
    shades = ["#" + "".join(f"{round(255 * part):02x}" for part in shade) for shade in style.shades(5)]
    for color in (style.VERMILLION, style.PURPLE, shades[0], shades[-1]):
        assert share_of(found, color) > 0.0005, color
    # Without the bifurcations only the key shows their colour, and other positions add to the map.
    agreed = json.loads(json.dumps(trace))
    agreed["trace"] = agreed["trace"][:1]
    other = pixels(consensus.draw(load_trace(write(tmp_path / "one.json", agreed)), tmp_path / "one.png"))
    assert share_of(other, style.VERMILLION) * other.size < share_of(found, style.VERMILLION) * found.size
    whole = consensus.draw(load_trace(tmp_path / "trace.json"), tmp_path / "whole.png", whole=True)
    assert consensus.shown_positions(trace, states) < 64 and pixels(whole).shape[1] == found.shape[1]


def test_consensus_marks_what_is_computed_again(model, tmp_path):
    options = {"gen_length": 32, "query_span": "open", "refresh_interval": None}
    trace = picture_traces.decode(model, picture_traces.problem("symbolic", 4), **options)[0]
    assert any(any(stale) for one in trace["trace"] for stale in one.get("query_stale", []))
    marked = pixels(consensus.draw(load_trace(write(tmp_path / "a.json", trace)), tmp_path / "a.png"))
    for one in trace["trace"]:
        one.pop("query_stale", None)
    plain = pixels(consensus.draw(load_trace(write(tmp_path / "b.json", trace)), tmp_path / "b.png"))
    # Without a refresh its sign in the key is the only other purple.
    assert share_of(marked, style.PURPLE) > 1.2 * share_of(plain, style.PURPLE) > 0


def test_consensus_draws_what_texts_hold(tmp_path):
    # Mathematics marks, wide characters and ones that no font has are text like any other.
    pieces = {1: "$x_{$", 2: "漢", 3: "\ud800", 4: "\x1b[31m" + "long" * 20, 8: "e", 9: ""}
    found = pixels(
        consensus.draw(handmade(pieces={str(k): v for k, v in pieces.items()}), tmp_path / "a.png")
    )
    assert found.std() > 30


def test_consensus_needs_branches(decodes, tmp_path):
    with pytest.raises(ValueError, match="several branches"):
        consensus.draw(decodes[3][0], tmp_path / "map.png")
    with pytest.raises(ValueError, match=r"path: expected a name that ends in \.png"):
        consensus.draw(decodes[0][0], tmp_path / "map.pdf")
    assert not list(tmp_path.iterdir())


def test_page_holds_the_trace_and_nothing_breaks_out(tmp_path):
    attack = "</script><script>alert(1)</script><!-- @TITLE@ @SCRIPT@ \u2028 & \ud800"
    found = handmade(text=attack, prompt=attack, model=attack, pieces={"1": attack})
    page = replay.draw(found, tmp_path / "a.html").read_text(encoding="utf-8")
    content = re.search(r'<script type="application/json" id="decode">(.*?)</script>', page, re.S)[1]
    held = json.loads(content)
    assert held["text"] == held["prompt"] == held["pieces"]["1"] == attack and len(held["records"]) == 4
    assert content.isascii() and not set("<>&") & set(content)
    # The two scripts of the page, and no third.
    assert len(re.findall("<script", page)) == len(re.findall("</script", page)) == 2
    assert "<title>Replay: &lt;/script&gt;" in page
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?:", page)
    assert [file.name for file in tmp_path.iterdir()] == ["a.html"]


def test_page_tells_the_options_that_are_ours(model, tmp_path):
    problem = picture_traces.problem("symbolic", 4)
    for options, shown in (
        ({"method": "dual_cache", "drafts": (1, 2), "refresh_scope": "generation"}, {"drafts": [1, 2]}),
        ({"max_step_tokens": 30, "query_span": "open"}, {"max_step_tokens": 30, "block_sizes": [4, 8, 16]}),
    ):
        trace = picture_traces.decode(model, problem, gen_length=32, **options)[0]
        for found in (trace, load_trace(write(tmp_path / "trace.json", trace))):
            content = re.search(r'id="decode">(.*?)</script>', replay.page(found), re.S)[1]
            settings = json.loads(content)["settings"]
            named = {name: value for name, value in options.items() if name != "method" and name not in shown}
            assert settings == settings | shown | named
        records = json.loads(content)["records"][1:]
        if "drafts" in options:
            assert all(len(record["drafts"]) <= 2 for record in records)
            assert sum(record["adopted"] for record in records) == trace["adopted"]
        else:
            assert trace["block_sizes"] == [4, 8, 16] and all(record["positions"] for record in records)


def test_picture_command(decodes, tmp_path, capsys):
    folder = tmp_path / "traces"
    folder.mkdir()
    write(folder / "one.json", decodes[0][0])
    write(folder / "two.json", decodes[1][0])
    one = str(folder / "one.json")
    assert main(["picture", "replay", one, "--out", str(tmp_path / "x.html")]) == 0
    assert main(["picture", "consensus", one]) == 0
    assert main(["picture", "replay", str(folder), "--out", str(tmp_path)]) == 0
    named = [tmp_path / "x.html", folder / "one.consensus.png"]
    named += [tmp_path / "one.replay.html", tmp_path / "two.replay.html"]
    assert capsys.readouterr().out.split() == [str(path) for path in named]
    assert all(path.stat().st_size > 5000 for path in named)


def test_picture_command_errors(decodes, tmp_path, capsys):
    one, single = write(tmp_path / "one.json", decodes[0][0]), write(tmp_path / "single.json", decodes[3][0])
    empty = tmp_path / "empty"
    empty.mkdir()
    before = sorted(tmp_path.iterdir())
    for message, arguments in {
        "--out: expected a name that ends in .png": ["consensus", one, "--out", tmp_path / "x.html"],
        "--out: expected an existing folder for 2": ["replay", one, single, "--out", tmp_path / "x.html"],
        "--out: expected a file in an existing folder": ["replay", one, "--out", tmp_path / "no" / "x.html"],
        "TRACE: expected a folder with *.json files": ["replay", empty],
        "TRACE: expected files of different names": ["replay", one, one],
        "No such file": ["replay", tmp_path / "none.json"],
        "single.json: consensus: expected a trace of several branches": ["consensus", single],
    }.items():
        assert main(["picture", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(SystemExit):
        main(["picture", "portrait", str(one)])


def test_missing_matplotlib_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match=r"pip install 'blockbatch\[plots\]'"):
        consensus.draw(handmade(), tmp_path / "a.png")
    replay.draw(handmade(), tmp_path / "a.html")  # a page needs no matplotlib


def test_looks_are_fixed_and_different():
    methods = [style.method_look(method) for method in blockbatch.METHODS]
    sizes = [style.block_size_look(size) for size in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    for looks in (methods, sizes):
        for field in zip(*looks):
            assert len(set(field)) == len(field)
    assert style.block_size_look(24) == style.block_size_look(16)
    assert style.method_look("another").color == style.GREY
