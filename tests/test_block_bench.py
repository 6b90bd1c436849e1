"""The benchmark of the built-in block diffusion model in its smallest form, and what its results hold."""

import json

from bench_scripts import ROOT, run

RULES = ["static", "published", "joined", "one_branch", "blockbatch"]


def test_block_decodes(tmp_path):
    report = run(
        "block_decodes.py", tmp_path / "block_decodes.json", "--count", "1", "--static-count", "1",
        "--held-out-count", "1", "--candidates", "1", "--timed-count", "1", "--texts", "1",
    )  # fmt: skip
    assert [line["setting"] for line in report["held_out"]["lines"]] == ["published", "blockbatch"]
    lines = {line["rule"]: line for line in report["problems"]["lines"]}
    assert list(lines) == RULES
    assert all(line["problems"] == 3 for line in lines.values())
    assert lines["joined"]["against_published"]["same_tokens"] == 3
    assert lines["static"]["nfe"]["total"] > lines["published"]["nfe"]["total"]
    steps = report["problems"]["steps"]
    assert steps[0]["nfe"] == lines["published"]["nfe"]["total"] > steps[1]["nfe"] > steps[2]["nfe"]
    saved = sum(step["saved_of_published"] for step in steps)
    assert abs(saved - (1 - steps[-1]["of_published"]["ratio"])) < 1e-3
    assert [line["rule"] for line in report["seconds"]["lines"]] == RULES[1:]
    assert all(len(line["right_by_place"]) == 12 for line in report["texts"]["lines"])
    # One rule anew: the others stay as they were.
    again = run(
        "block_decodes.py", tmp_path / "block_decodes.json", "--parts", "problems", "--rules", "blockbatch",
        "--count", "1",
    )  # fmt: skip
    records = [one["problems"]["records"] for one in (report, again)]
    assert list(records[1]) == RULES and records[0]["joined"] == records[1]["joined"]
    assert records[0]["blockbatch"]["ids"] == records[1]["blockbatch"]["ids"]


def test_the_results():
    report = json.loads((ROOT / "bench/results/block_decodes.json").read_text())
    assert report["held_out"]["to_take"] == "blockbatch"
    lines = {line["rule"]: line for line in report["problems"]["lines"]}
    assert lines["joined"]["against_published"]["same_tokens"] == lines["joined"]["problems"] == 600
    assert len(report["texts"]["lines"][0]["right_by_place"]) == 12
