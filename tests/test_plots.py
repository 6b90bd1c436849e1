"""Pictures of accuracy, K/V trajectories and agreement: their numbers on data made by hand, and real ones."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import blockbatch
from blockbatch.cli import main
from blockbatch.decoding.session import Step
from blockbatch.evaluation.records import Record, Run
from blockbatch.evaluation.settings import Setting, fixed_block_settings, settings_header
from blockbatch.evaluation.statistics import wilson
from blockbatch.generation import open_session
from blockbatch.kv_cache import KVCache
from blockbatch.pictures import agreement, decisions, frontier, style, trajectories
from blockbatch.pictures.token_categories import categories
from blockbatch.tracing import TraceRecorder, load_trace, open_recorder, save_trace, trace_header
from blockbatch.tracing.file import check_trace
from blockbatch.tracing.kv_states import SKETCH_SIZE, KVSketcher

PROMPT = "In the morning Ann has 7 eggs. Mia has 3 eggs fewer than Ann. How many eggs does Mia have?"
MASK, EOS = 99, 98


@pytest.fixture(scope="module")
def model():
    return blockbatch.load_model("tiny", device="cpu")


def save_decode(model, path, prompt=PROMPT, **options):
    config = blockbatch.DecodeConfig(gen_length=32, trace=True, **options)
    ids = model.tokenizer.encode(prompt)
    result = blockbatch.generate(model, ids, config)
    save_trace(path, result.trace, **trace_header(model, ids, config, result))
    return result


def colours(path):
    """How many colours a PNG holds; a blank one holds one."""
    from matplotlib.image import imread

    pixels = (imread(path)[..., :3] * 255).astype(int).reshape(-1, 3)
    assert len(pixels) > 200_000
    return len(np.unique(pixels @ (1 << 16, 1 << 8, 1)))


# Token categories


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["12", "+", "30", "\n", "total"], "digits punctuation digits whitespace words"),
        (["x1", " ", "3rd", " ", "_"], "words whitespace words whitespace words"),
        # A number with its point is one unit; a point that ends a sentence is not part of it.
        (["3", ".", "14", ".", " ", "1,000"], "digits digits digits punctuation whitespace digits"),
        # Mixed tokens go to the kind of most of their characters, words before digits before punctuation.
        (["):\n", " the", "=5", "(n", "==7"], "punctuation words digits words punctuation"),
        # Keywords only in code, whole words alone, also when cut in pieces.
        (["def", " f", "(", ")", ":"], "keywords words punctuation punctuation punctuation"),
        (["return", "ed", " if", "\n", "return"], "words words keywords whitespace keywords"),
        (["re", "turn", " ", "x"], "keywords keywords whitespace words"),
        (["it", " is", " not", " for"], "words words words words"),
        (['{"a":', " true", "}"], "punctuation keywords punctuation"),
        (["a", " true"], "words words"),
        (["", "\ufffd", "a"], "None None words"),
        ([], ""),
    ],
)
def test_categories(pieces, expected):
    assert " ".join(map(str, categories(pieces))) == expected


# Decisions and agreement


def commit(branch, positions, tokens):
    return {"branch": branch, "positions": positions, "tokens": tokens, "confidence": [0.9] * len(tokens)}


def record(kind="block", branches=3, commits=(), merges=(), syncs=()):
    return {
        "kind": kind,
        "rows": list(range(branches)),
        "windows": [[0, 6]] * branches,
        "commits": list(commits),
        "merges": [{"branch": b, "positions": p, "tokens": t} for b, p, t in merges],
        "syncs": [{"branch": b, "leader": leader} for b, leader in syncs],
    }


def hand_made(records, canvas, block_sizes=(1, 2, 3), **header):
    pieces = {str(token): text for token, text in {1: "1", 2: " two", 3: ".", 4: "\n", 5: "5"}.items()}
    canvas = [*canvas, *[EOS] * (6 - len(canvas))]
    sizes = {"gen_length": len(canvas), "block_sizes": list(block_sizes)}
    ids = {"mask_token_id": MASK, "eos_token_ids": [EOS], "canvas": canvas, "pieces": pieces}
    settings = {"model": "none", "settings": {"threshold": 0.9}}
    return check_trace({**settings, **sizes, **ids, "trace": records, **header})


def test_decisions_are_counted_as_defined():
    trace = hand_made(
        [
            # One computation: three branches that commit at init decide once.
            record("init", commits=[commit(b, [0], [1]) for b in range(3)]),
            # Two decide on position 1, on the same token; on position 2 on different ones.
            record(commits=[commit(0, [1, 2], [2, 3]), commit(1, [1, 2], [2, 5])]),
            record(commits=[commit(0, [3], [4])], merges=[(2, [1], [2])]),
            # Branch 1 decides on 3 itself before it follows branch 0; branch 2 takes 2 and 3 with the sync.
            record(commits=[commit(1, [3], [4])], syncs=[(1, 0), (2, 0)]),
            # Equal canvases at a refresh: branches 0 and 1 decide once.
            record("refresh", commits=[commit(b, [4], [5]) for b in range(2)]),
        ],
        [1, 2, 3, 4, 5, EOS],
    )
    found = decisions.positions(trace)
    assert [one.category for one in found] == ["digits", "words", "punctuation", "whitespace", "digits"]
    assert [one.decided_twice for one in found] == [False, True, True, True, False]
    assert [one.agreed for one in found] == [False, True, False, True, False]
    assert [one.when for one in found] == [None, 1 / 4, None, 3 / 4, None]
    own, merge, sync = ([one.origins[name] for one in found] for name in ("own", "merge", "sync"))
    assert (own, merge, sync) == ([3, 2, 1, 2, 2], [0, 1, 0, 0, 0], [0, 0, 2, 1, 0])


def test_branches_that_differ_decide_separately_at_a_refresh():
    commits = [commit(0, [1], [2]), commit(1, [1], [2])]
    trace = hand_made(
        [record("init", commits=[commit(0, [0], [1])]), record("refresh", commits=commits)], [1, 2]
    )
    assert [one.agreed for one in decisions.positions(trace)] == [False, True]


def test_table_of_several_texts():
    def text(*agreed):
        origins = {"own": 2, "merge": 1, "sync": 1}
        return [
            decisions.Position(i, "digits", True, same, 0.5 if same else None, origins)
            for i, same in enumerate(agreed)
        ]

    rows = decisions.table([text(True, True), text(True, False)])
    assert list(rows) == ["digits", "all"] and rows["digits"] == rows["all"]
    assert rows["all"].agreed.value == 0.75 and rows["all"].agreed.count == 4
    assert rows["all"].when == decisions.Share(0.5, (0.5, 0.5), 3)
    assert {name: one.value for name, one in rows["all"].origins.items()} == {
        "own": 0.5,
        "merge": 0.25,
        "sync": 0.25,
    }
    assert rows["all"].origins["own"].count == 16


def test_intervals_take_texts_as_clusters():
    assert decisions.share([(3, 4)]) == decisions.Share(0.75, wilson(3, 4), 4)
    # Each text is all or nothing: 40 positions are worth less than 4, for n / (n - 1) in the variance.
    clustered = decisions.share([(10, 10), (0, 10), (10, 10), (0, 10)])
    assert clustered.interval == pytest.approx(wilson(1.5, 3)) and clustered.count == 40
    # Texts that all vary alike tell nothing against independence; more than n positions there never are.
    assert decisions.share([(5, 10)] * 4).interval == wilson(20, 40)
    assert decisions.share([(10, 10)] * 4).interval == wilson(4, 4)
    assert decisions.share([(0, 0)]) is None and decisions.mean([[]]) is None
    spread = 1.96 * math.sqrt(2 * (0.5**2 + 0.5**2) / 2**2)
    assert decisions.mean([[1.0], [0.0]]).interval == (max(0, 0.5 - spread), min(1, 0.5 + spread))
    assert decisions.mean([[0.2, 0.4]]).value == pytest.approx(0.3)


def test_agreement_refuses_what_cannot_be_pooled():
    records, canvas = [record("init", commits=[commit(0, [0], [1])])], [1]
    good = hand_made(records, canvas)
    for bad, message in (
        ([], "several branches"),
        ([hand_made([record("init", 1)], canvas, [1])], "several branches"),
        ([good, hand_made(records, canvas, settings={"threshold": 0.8})], "threshold 0.8 besides 0.9"),
        ([good, hand_made(records, canvas, model="other")], "'other' besides 'none'"),
        ([good, hand_made(records, canvas, pieces={})], r"traces\[1\].*pieces"),
        ([hand_made(records, [EOS])], "empty"),
    ):
        with pytest.raises(ValueError, match=message):
            agreement.draw(bad, "never.png")


# The frontier


def decoded(problem, setting, right, nfe, size, task="sums"):
    forwards = {"init": 1, "block": nfe - 1, "refresh": 0, "total": nfe}
    return Record(task, str(problem), setting, "", 1, right, forwards, 0.1, "eos", size, "0")


def sized_run(rows, **more):
    """A run of {setting: [(right, nfe) of each problem]} with the settings of the picture."""
    every = [*fixed_block_settings(16), Setting("blockbatch", blockbatch.DecodeConfig(gen_length=16))]
    settings = [one for one in every if one.label in rows]
    sizes = {one.label: one.config.block_size or 8 for one in settings}
    records = [
        decoded(problem, label, right, nfe, sizes[label])
        for label, decodes in rows.items()
        for problem, (right, nfe) in enumerate(decodes)
    ]
    return Run({"model": "none", "settings": settings_header(settings), **more}, records)


def test_fixed_block_settings():
    settings = fixed_block_settings(256)
    assert [one.label for one in settings] == [f"block {2**n}" for n in range(2, 8)]
    assert [one.config.block_size for one in settings] == [4, 8, 16, 32, 64, 128]
    assert {(one.config.method, one.config.eos_exit) for one in settings} == {("dual_cache", "prefix")}
    assert [one.config.block_size for one in fixed_block_settings(24)] == [4, 8]


def test_oracle_takes_the_cheapest_right_answer_else_the_cheapest():
    run = sized_run(
        {
            "block 4": [(True, 9), (True, 8), (False, 9), (None, 1)],
            "block 8": [(True, 7), (False, 2), (False, 6), (None, 1)],
            "block 16": [(False, 3), (True, 9), (False, 8), (None, 1)],
            "blockbatch": [(True, 2), (False, 2), (True, 2), (None, 2)],
        }
    )
    (found,) = frontier.points(run).values()
    by_label = {point.label: point for point in found}
    assert list(by_label) == ["block 4", "block 8", "block 16", "blockbatch", "oracle"]
    best = by_label["oracle"]
    assert (best.count, best.accuracy, best.nfe) == (3, 2 / 3, (7 + 8 + 6) / 3)
    assert best.accuracy_95 == wilson(2, 3) and best.block_size is None
    assert (by_label["block 8"].accuracy, by_label["block 8"].nfe) == (1 / 3, 5)
    assert by_label["blockbatch"].nfe == 2
    low, high = by_label["block 8"].nfe_95
    assert 2 <= low < 5 < high <= 7


def test_frontier_counts_only_problems_that_all_settings_decoded():
    rows = {"block 4": [(True, 4)] * 3, "block 8": [(True, 3)] * 2, "blockbatch": [(False, 2)] * 3}
    run = sized_run(rows)
    more = [decoded(0, label, True, 9, 4, task="other") for label in rows]
    found = frontier.points(Run(run.header, run.records + more))
    assert list(found) == ["sums", "other", "all tasks"]
    assert [points[0].count for points in found.values()] == [2, 1, 3]
    for missing, message in (("block 8", "block_size alone"), ("blockbatch", "setting of blockbatch")):
        with pytest.raises(ValueError, match=message):
            frontier.points(sized_run({label: rows[label] for label in rows if label != missing}))
    with pytest.raises(ValueError, match="judged"):
        frontier.points(sized_run({label: [(None, 3)] for label in rows}))


def test_frontier_is_drawn_from_a_results_file(tmp_path, capsys):
    rows = {
        "block 4": [(True, 9), (False, 8)],
        "block 8": [(True, 5)] * 2,
        "blockbatch": [(False, 3), (True, 4)],
    }
    run = sized_run(rows, format=1)
    lines = [{"run": run.header}, *(one.__dict__ for one in run.records)]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["picture", "frontier", str(results)]) == 0
    drawn = tmp_path / "frontier.png"
    assert capsys.readouterr().out == f"{drawn}\n" and colours(drawn) > 50
    assert main(["picture", "frontier", str(results), "--out", str(tmp_path / "x.pdf")]) == 2
    assert ".png" in capsys.readouterr().err


# Trajectories


def test_a_translation_is_a_straight_line_of_equal_steps():
    anchor, step = np.zeros(16), np.zeros(16)
    anchor[0], step[1], step[5] = 4.0, 3.0, 4.0
    placed = trajectories.tangent_coordinates(anchor, anchor + np.arange(6)[:, None] * step)
    # 5 long, at right angles to an anchor of length 4: all of it is tangent, and on the first axis.
    assert placed.tangent == pytest.approx(np.column_stack((np.arange(6) * 5 / 4, np.zeros(6))))
    assert placed.axial == pytest.approx(np.zeros(6)) and placed.shares == pytest.approx((1.0, 0.0))


def test_what_lies_along_the_anchor_is_not_tangent():
    anchor = np.array([3.0, 4.0, 0.0])
    along = trajectories.tangent_coordinates(anchor, np.outer([1.0, 1.5, 0.5], anchor))
    assert along.axial == pytest.approx([0.0, 0.5, -0.5]) and along.tangent == pytest.approx(np.zeros((3, 2)))
    oblique = trajectories.tangent_coordinates(anchor, anchor + np.array([[0.0, 0.0, 0.0], [3.0, 4.0, 5.0]]))
    assert oblique.axial == pytest.approx([0, 1]) and oblique.tangent == pytest.approx(
        np.array([[0, 0], [1, 0]])
    )
    with pytest.raises(ValueError, match="zero"):
        trajectories.tangent_coordinates(np.zeros(3), np.ones((2, 3)))


def with_kv(kind, *groups, syncs=()):
    kv = [{"branches": branches, "state": [1.0, *state]} for branches, state in groups]
    return {**record(kind, 2, syncs=syncs), "kv": kv}


def test_trajectory_marks_where_refreshes_and_syncs_arrive():
    records = [
        with_kv("init", ([0, 1], [0.0, 0.0]), syncs=[(0, 1)]),
        with_kv("block", ([0], [0.1, 0.0]), ([1], [0.0, 0.2])),
        with_kv("block", ([1], [0.0, 0.3])),
        with_kv("refresh", ([0, 1], [0.5, 0.5])),
        with_kv("block", ([0], [9.0, 9.0]), ([0, 1], [0.6, 0.5]), syncs=[(0, 1)]),
    ]
    first, second = trajectories.trajectories(hand_made(records, [1], [2, 3]))
    assert (first.block_size, second.block_size) == (2, 3)
    assert first.forwards.tolist() == [0, 1, 3, 4] and second.forwards.tolist() == [0, 1, 2, 3, 4]
    assert np.flatnonzero(first.refreshed).tolist() == [2] and np.flatnonzero(second.refreshed).tolist() == [
        3
    ]
    assert np.flatnonzero(first.synced).tolist() == [3] and not second.synced.any()
    assert first.states[:, 1:].tolist() == [[0.0, 0.0], [0.1, 0.0], [0.5, 0.5], [0.6, 0.5]]


@pytest.mark.parametrize(
    "kv",
    [
        None,
        {},
        [3],
        [{"branches": [7], "state": [1.0]}],
        [{"branches": [0, 1], "state": []}],
        [{"branches": [0, 1], "state": [float("nan")]}],
        [{"branches": [0, 1], "state": ["1"]}],
        [{"branches": [0], "state": [1.0]}],
        [{"branches": [0], "state": [1.0]}, {"branches": [1], "state": [1.0, 2.0]}],
    ],
)
def test_bad_kv_is_refused(kv):
    trace = hand_made([{**record("init", 2), "kv": kv}], [1], [1, 2])
    with pytest.raises(ValueError, match="kv"):
        trajectories.trajectories(trace)


# What a trace keeps of the cache


def make_cache(rows=2, length=24, dtype=torch.float32):
    sizes = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 8, "dtype": dtype, "device": torch.device("cpu")}
    cache = KVCache(1, rows, length, page_size=8, **sizes)
    generator = torch.Generator().manual_seed(0)
    cache.kv.copy_(torch.randn(cache.kv.shape, generator=generator))
    cache.page_table.copy_(torch.arange(cache.page_table.numel()).view_as(cache.page_table))
    return cache


def test_sketch_depends_on_what_a_row_holds_alone():
    cache = make_cache(rows=3)
    cache.page_table[2] = cache.page_table[0]
    cache.kv[:, :, cache.page_table[1].long()] = cache.kv[:, :, cache.page_table[0].long()]
    cache.kv[:, :, cache.page_table[1, 2].long(), 4:] = 77.0  # behind a canvas of 20 tokens
    groups = KVSketcher(cache, [20]).states([0, 1, 2])
    assert [rows for rows, _ in groups] == [[0, 2], [1]] and groups[0][1] == groups[1][1]
    assert len(groups[0][1]) == SKETCH_SIZE
    cache.kv[2, 1, cache.page_table[1, 2].long(), 3] += 0.1
    assert KVSketcher(cache, [20]).states([1])[0][1] != groups[1][1]


def test_sketch_is_linear_and_keeps_lengths():
    cache = make_cache(rows=3)
    page = cache.page_table.long()
    cache.kv[:, :, page[2]] = cache.kv[:, :, page[0]] - 2 * cache.kv[:, :, page[1]]
    one, two, both = (np.array(state) for _, state in KVSketcher(cache, [24]).states([0, 1, 2]))
    assert both == pytest.approx(one - 2 * two, rel=1e-4, abs=1e-3)
    for row, sketch in enumerate((one, two, both)):
        length = float(torch.linalg.vector_norm(cache.kv[:, :, page[row]].float()))
        # The variance of a squared length is about 2 / SKETCH_SIZE: 25% are some four deviations of a length.
        assert np.linalg.norm(sketch) == pytest.approx(length, rel=0.25)
    assert abs(one @ two) < 0.4 * np.linalg.norm(one) * np.linalg.norm(two)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_traces_follow_the_cache_and_change_no_decode(device):
    model = blockbatch.load_model("tiny", device=device)
    options = {"gen_length": 32, "threshold": 0.97, "sync_threshold": 2}
    config = blockbatch.DecodeConfig(**options, trace=True, trace_kv=True)
    session = open_session(model, model.tokenizer.encode(PROMPT), config)
    recorder = open_recorder(session, config)
    sketcher = KVSketcher(session.cache, [len(model.tokenizer.encode(PROMPT)) + 32])
    held = {}
    while (step := session.step()) is not None:
        recorder.add(step)
        for entry in recorder.traces[0][-1]["kv"]:
            held.update(dict.fromkeys(entry["branches"], entry["state"]))
        rows = sketcher.states(list(range(session.state.num_branches)))
        assert {branch: state for branches, state in rows for branch in branches} == held
    plain = blockbatch.generate(model, PROMPT, blockbatch.DecodeConfig(**options))
    assert plain.canvas == session.state.tokens[session.state.winner[0]].tolist()
    kinds = [one["kind"] for one in recorder.traces[0]]
    assert kinds.count("block") > 3 and len(recorder.traces[0][0]["kv"]) == 1


def test_a_branch_that_only_follows_gets_its_new_state():
    cache = make_cache(rows=2)
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    state = SimpleNamespace(num_branches=2, num_requests=1, prompt_length=torch.tensor([20]), gen_length=4)
    state.top_token = state.confidence = torch.zeros(2, 4)
    recorder = TraceRecorder(state, cache)
    for source_row, sync_source, expected in (
        ([0, 0], [0, 1], [[0], [1]]),
        ([0, -1], [0, 1], [[0]]),
        ([0, -1], [0, 0], [[0, 1]]),
    ):
        cache.share(torch.tensor(sync_source, dtype=torch.int32))
        plan = SimpleNamespace(source_row=source_row, query_lengths=[4, 4])
        events = SimpleNamespace(committed=nothing, merged=nothing, sync_source=torch.tensor(sync_source))
        recorder.add(Step("block", plan, [(0, 4)] * 2, events, 0.0))
        assert [entry["branches"] for entry in recorder.traces[0][-1]["kv"]] == expected


def test_each_request_of_a_batch_has_the_states_that_it_has_alone(model):
    config = blockbatch.DecodeConfig(gen_length=16, trace=True, trace_kv=True)
    alone = blockbatch.generate(model, "1+2=", config)
    together = blockbatch.generate(model, [PROMPT, "1+2="], config)[1]
    for one, other in zip(alone.trace, together.trace, strict=True):
        for mine, theirs in zip(one["kv"], other["kv"], strict=True):
            assert mine["branches"] == theirs["branches"]
            assert mine["state"] == pytest.approx(theirs["state"], rel=1e-3, abs=1e-2)


def test_trace_kv_needs_a_trace(capsys):
    with pytest.raises(ValueError, match="trace_kv"):
        blockbatch.DecodeConfig(trace_kv=True)
    with pytest.raises(TypeError, match="trace_kv"):
        blockbatch.DecodeConfig(trace=True, trace_kv=1)
    assert main(["generate", "--prompt", "1", "--trace-kv"]) == 2
    assert "--trace-kv" in capsys.readouterr().err


# Real pictures


def test_trajectories_are_drawn_from_saved_traces(model, tmp_path, capsys):
    files = [tmp_path / name for name in ("all.json", "4.json", "16.json", "plain.json", "other.json")]
    save_decode(model, files[0], trace_kv=True, threshold=0.97, sync_threshold=2)
    for size, file in ((4, files[1]), (16, files[2])):
        save_decode(model, file, trace_kv=True, method="dual_cache", block_size=size)
    save_decode(model, files[3])
    save_decode(model, files[4], "1+2=", trace_kv=True)
    anchors = [trajectories.trajectories(load_trace(file))[0].states[0] for file in files[:3]]
    assert all(np.array_equal(anchor, anchors[0]) for anchor in anchors)

    out = tmp_path / "out.png"
    assert main(["picture", "trajectories", *map(str, files[:3]), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n" and colours(out) > 50
    assert main(["picture", "trajectories", str(files[0])]) == 0
    assert colours(tmp_path / "all.trajectories.png") > 50
    capsys.readouterr()
    for bad, message in (
        ([files[3]], "plain.json: expected a trace with K/V"),
        ([files[0], files[4]], "one prompt"),
    ):
        assert main(["picture", "trajectories", *map(str, bad), "--out", str(tmp_path / "no.png")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()


def test_agreement_is_drawn_from_a_folder_of_traces(model, tmp_path, capsys):
    folder = tmp_path / "traces"
    folder.mkdir()
    for index, prompt in enumerate((PROMPT, "Start with x=1. Replace x by 9*x+1 mod 5, 3 times.")):
        save_decode(model, folder / f"{index}.json", prompt, threshold=0.97)
    save_decode(model, folder / "single.json", method="dual_cache")
    out = tmp_path / "agreement.png"
    assert main(["picture", "agreement", str(folder), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n" and colours(out) > 50
    text = load_trace(folder / "0.json")
    assert len(decisions.positions(text)) == len(decisions._final_text(text))
    assert main(["picture", "agreement", str(folder), "--setting", "x", "--out", str(out)]) == 2
    assert "--setting" in capsys.readouterr().err


def test_block_sizes_look_different():
    assert len({style.block_size_look(size) for size in (4, 8, 16, 32, 64, 128)}) == 6
