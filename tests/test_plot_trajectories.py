"""The plot of K/V trajectories: coordinates on data made by hand, and real ones."""

import numpy as np
import pytest

import blockbatch
from blockbatch.cli import main
from blockbatch.pictures import trajectories
from blockbatch.tracing import load_trace
from plot_traces import colours, hand_made, record, save_decode


@pytest.fixture(scope="module")
def model():
    return blockbatch.load_model("tiny", device="cpu")


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
