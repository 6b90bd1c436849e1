"""The plot of accuracy against forwards: its points on data made by hand."""

import json

import pytest

import blockbatch
from blockbatch.cli import main
from blockbatch.evaluation.records import Record, Run
from blockbatch.evaluation.settings import Setting, fixed_block_settings, settings_header
from blockbatch.evaluation.statistics import wilson
from blockbatch.pictures import frontier, style
from plot_traces import colours


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


def test_block_sizes_look_different():
    assert len({style.block_size_look(size) for size in (4, 8, 16, 32, 64, 128)}) == 6
