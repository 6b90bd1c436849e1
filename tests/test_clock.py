"""bench/clock.py on the CPU: decodes are recorded, followed in another shape and compared."""

import pytest
import torch

from bench_scripts import ROOT, run, start

CLOCKED = ("dual_cache", "blockbatch", "dual_cache, generation", "dual_cache, generation, drafts 1-2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Decodes of a problem of each family by the settings above."""
    folder = tmp_path_factory.mktemp("clock")
    record = ("--record", "--problems", "1", "--traced", "1", "--folder", str(folder))
    start("clock.py", *record, "--settings", *CLOCKED)
    return folder


class TestClock:
    """Decodes are recorded, followed in another shape and compared; a trace that was changed is found out."""

    @pytest.fixture(autouse=True)
    def path(self, monkeypatch):
        monkeypatch.syspath_prepend(str(ROOT / "bench"))

    def test_followed(self, folder, tmp_path):
        pytest.importorskip("matplotlib")
        report = run(
            "clock.py", tmp_path / "clock.json", "--dtype", "float32", "--shapes", "small-llada",
            "small-dream", "--prompt-lengths", "16", "--folder", str(folder), "--settings", *CLOCKED,
        )  # fmt: skip
        assert (tmp_path / "clock.png").stat().st_size > 10_000
        answers = {line["setting"]: line for line in report["answers"]}
        assert tuple(answers) == CLOCKED
        assert all(line["problems"] == 3 and 0 <= line["right"] <= 3 for line in answers.values())
        # Drafts change nothing but the number of forwards.
        plain, drafted = (answers[label] for label in CLOCKED[2:])
        assert plain["right_by_family"] == drafted["right_by_family"] and plain["tokens"] == drafted["tokens"]
        assert drafted["nfe"]["block"] < plain["nfe"]["block"]
        assert drafted["nfe"]["refresh"] == plain["nfe"]["refresh"]
        assert [section["shape"] for section in report["sections"]] == ["small-llada", "small-dream"]
        for section in report["sections"]:
            lines = {line["setting"]: line for line in section["settings"]}
            assert tuple(lines) == CLOCKED
            for line in lines.values():
                low, high = line["decode_ms_95"]
                assert 0 < low <= line["decode_ms"] <= high
                shares = [line[f"share_{phase}"] for phase in ("init", "block", "refresh")]
                assert 0.9 < sum(shares) <= 1 and line["queries"]["init"] == 16 + 256
            drafts = lines[CLOCKED[3]]["times_as_fast_as"]
            assert set(drafts) == {"dual_cache", "dual_cache_generation", "without_drafts"}
            canvas, generation = (lines[label]["queries"]["refresh"] for label in ("dual_cache", CLOCKED[2]))
            assert generation < canvas

    def test_built_in_model(self, tmp_path):
        report = run(
            "clock.py", tmp_path / "clock_cpu.json", "--problems", "1", "--quick", "--settings", "dual_cache",
        )  # fmt: skip
        (line,) = report["settings"]
        assert line["times_as_fast_as_dual_cache"] == 1 and line["seconds_median"] > 0

    @pytest.fixture
    def trace(self, folder):
        from clock_record import load
        from clock_settings import BY_LABEL

        return load(BY_LABEL[CLOCKED[3]], folder)[1][0]

    @pytest.fixture
    def follower(self, trace):
        from random_models import random_model
        from traces import Follower, FollowingModel

        model = random_model("small-llada", torch.device("cpu"), torch.float32)
        return Follower(FollowingModel(model), trace, [1, 2, 3])

    def test_changed_traces(self, trace, follower):
        from dataclasses import replace

        from traces import Strayed

        assert follower.run(trace).nfe == trace.nfe

        def changed(number, **fields):
            turns = list(trace.turns)
            turns[number] = turns[number]._replace(**fields)
            return replace(trace, turns=turns)

        last = trace.turns[-1]
        canvas = trace.canvas.copy()
        canvas[0] += 1
        for other in (
            changed(-1, top_token=last.top_token + 1),
            changed(1, confidence=trace.turns[1].confidence * 0.5),
            changed(1, phase=2),
            replace(trace, turns=trace.turns[:-1]),
            replace(trace, turns=[*trace.turns, last]),
            replace(trace, canvas=canvas),
            replace(trace, nfe=(1, trace.nfe[1] + 1, trace.nfe[2])),
        ):
            with pytest.raises(Strayed):
                follower.run(other)
        assert follower.run(trace).nfe == trace.nfe

    def test_files_keep_traces(self, trace):
        from traces import packed, unpacked

        (again,) = unpacked(packed([trace]))
        assert again.config == trace.config and again.nfe == trace.nfe
        for before, after in zip(trace.turns, again.turns, strict=True):
            assert before[:3] == after[:3]
            assert all((a == b).all() for a, b in zip(before[3:], after[3:], strict=True))
