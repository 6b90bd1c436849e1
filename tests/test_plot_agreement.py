"""The plot of agreement: token categories, decisions and intervals on data made by hand, and a real one."""

import math

import pytest

import blockbatch
from blockbatch.cli import main
from blockbatch.evaluation.statistics import wilson
from blockbatch.pictures import agreement, decisions
from blockbatch.pictures.token_categories import categories
from blockbatch.tracing import load_trace
from plot_traces import EOS, PROMPT, colours, commit, hand_made, record, save_decode


@pytest.fixture(scope="module")
def model():
    return blockbatch.load_model("tiny", device="cpu")


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
