"""Reports, pictures, settings and progress of evaluations whose numbers are known beforehand."""

import argparse

import pytest

import blockbatch
from blockbatch.cli import evaluate, main
from blockbatch.evaluation import report
from blockbatch.evaluation.markdown import markdown
from blockbatch.evaluation.presets import get_preset
from blockbatch.evaluation.progress import Clock, Progress, duration, progress_bar
from blockbatch.evaluation.records import Run, read_run
from blockbatch.evaluation.settings import parse_setting
from blockbatch.tasks import built_in
from test_statistics import record


def many(problems, label, nfe, seconds, right=lambda n: True, **more):
    return [record(n, label, right(n), nfe(n), seconds, **more) for n in problems]


HEADER = {
    "model": "m|<b>", "dtype": "float32", "backend": None, "device": "cpu", "threads": 1, "python": "3",
    "torch": "2", "batch_size": 1, "chat": False, "traced": True, "started": "now", "run_code": False,
}  # fmt: skip


def test_factors_exit_and_counts_of_a_known_run():
    every = range(40)
    records = many(every[:10], "vanilla", lambda n: 128, 8.0)
    records += many(every, "dual_cache", lambda n: 20, 2.0, lambda n: n > 3)
    records += many(every, "vanilla +eos", lambda n: 64, 4.0)
    records += many(every, "dual_cache +eos", lambda n: 15, 1.5, lambda n: n > 3)
    records += many(every, "blockbatch", lambda n: 10 + n % 2, 1.0, lambda n: n > 7)
    found = report.build_report(Run(HEADER, records))
    text = markdown(found)
    (line,) = (line for line in text.splitlines() if line.startswith("| blockbatch ") and "x," in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == ["8.00x, -91.8%", "2.00x, -47.5%", "4.00x, -83.6%", "1.50x, -30.0%"]
    assert "vanilla decoded 10 of the 40 problems" in text
    assert (
        "BlockBatch against dual_cache: -47.5% NFE as published on 40 problems; stopping with the text gives "
        "dual_cache itself -25.0%, and against that -30.0% remain (40 problems)." in text
    )
    assert "  - fewer forwards: -30.0% [" in text and "  - less time: -33.3% [-33.3, -33.3]" in text
    assert "fewer right: 0 problems only blockbatch solves, 8 only vanilla +eos, of 40, p = 0.008" in text
    assert "no difference shown: 0 problems only blockbatch solves, 4 only dual_cache +eos" in text
    assert "m\\|&lt;b>" in text and "Traces were recorded" in text
    assert [exit.same_text for exit in found.exits] == [10, 40]


def test_code_that_did_not_run_is_not_judged():
    records = many(range(3), "a", lambda n: 5, 1.0, lambda n: None, task="code")
    records += many(range(3), "a", lambda n: 5, 1.0)
    text = markdown(report.build_report(Run(HEADER, records)))
    assert "- code: 3 answers of a setting not judged (generated code runs only with --run-code)." in text
    assert "3/3" in text and "Nothing to compare: one setting alone." in text


def test_code_runs_only_by_request(tmp_path, monkeypatch):
    judged = []
    monkeypatch.setattr(built_in, "check", lambda problem, text: judged.append(text) or True)
    options = ["--tasks", "code", "--methods", "blockbatch", "--gen-length", "16", "--device", "cpu"]
    options += ["--set", "small:block_sizes=4", "--limit", "1"]
    for more, verdicts in (([], [None, None]), (["--run-code", "--accept-weaker-sandbox"], [True, True])):
        out = tmp_path / f"out{len(more)}"
        assert main(["eval", *options, *more, "--out", str(out)]) == 0
        assert [found.right for found in read_run(out / "results.jsonl").records] == verdicts
        assert len(judged) == len(more)
    assert main(["eval", *options, "--out", str(out)]) == 2  # judged and unjudged answers do not mix


def test_own_settings_have_a_yardstick_among_themselves():
    records = many(range(5), "a", lambda n: 5, 1.0) + many(range(5), "b", lambda n: 4, 1.0)
    verdicts = report.build_report(Run(HEADER, records)).verdicts
    assert [(found.setting, found.reference) for found in verdicts] == [("b", "a")]


def test_without_judged_answers_there_is_no_picture(tmp_path, capsys):
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "1 + 1 ="}\n')
    out = tmp_path / "out"
    options = ["--tasks", str(file), "--methods", "dual_cache", "--gen-length", "32", "--device", "cpu"]
    assert main(["eval", *options, "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["report.md", "results.jsonl", "summary.json"]
    assert (
        "1 answers of a setting not judged (their problems have no answer)" in (out / "report.md").read_text()
    )


def test_settings_of_ones_own():
    setting = parse_setting(
        "careful: method=blockbatch, threshold=0.95, block-sizes=4/8, sync_threshold=none", 32
    )
    config = setting.config
    assert (setting.label, config.threshold, config.block_sizes) == ("careful", 0.95, (4, 8))
    assert config.sync_threshold is None and config.gen_length == 32
    assert parse_setting("x:method=vanilla", 32).config.eos_exit == "prefix"
    assert parse_setting("x:method=vanilla,eos_exit=none", 32).config.eos_exit == "none"
    assert parse_setting("x:", 32).config == blockbatch.DecodeConfig(gen_length=32)


@pytest.mark.parametrize(
    "text, message",
    [
        ("threshold=0.9", "expected LABEL:name=value"),
        (":threshold=0.9", "expected LABEL:name=value"),
        ("x:threshold", "x: expected name=value, got 'threshold'"),
        ("x:thresold=1", "x: expected options among method"),
        ("x:trace=true", "x: expected options among method"),
        ("x:threshold=high", "x: threshold: expected numbers, got 'high'"),
        ("x:block_sizes=4/a", "x: block_sizes: expected integers"),
        ("x:threshold=2", "x: threshold: expected a value above 0"),
        ("x:method=best", "x: method: expected one of"),
    ],
)
def test_bad_settings_are_named(text, message):
    with pytest.raises(ValueError, match=f"^--set: {message}"):
        parse_setting(text, 32)


def test_presets_give_every_row_its_settings():
    preset = get_preset("gsm8k")
    options = argparse.Namespace(methods=("dual_cache", "blockbatch"), set=[], preset=[], vanilla_limit=4)
    rows = evaluate.plan_settings(options, preset.gen_length, preset)
    assert [row.label for row in rows] == ["dual_cache", "dual_cache +eos", "blockbatch"]
    assert [row.config for row in rows] == [
        preset.config("dual_cache"),
        preset.config("dual_cache", eos_exit="prefix"),
        preset.config(eos_exit="prefix"),
    ]  # fmt: skip


def test_fixed_blocks_are_rows_of_their_own():
    options = argparse.Namespace(
        methods=("blockbatch", "fixed-blocks"), set=["own:"], preset=[], vanilla_limit=4
    )
    rows = evaluate.plan_settings(options, 64, None)
    blocks = [f"block {size}" for size in (4, 8, 16, 32, 64)]
    assert [row.label for row in rows] == ["blockbatch", *blocks, "own"]
    options = argparse.Namespace(methods=("fixed-blocks",), set=[], preset=[], vanilla_limit=4)
    assert [row.label for row in evaluate.plan_settings(options, 64, None)] == blocks


def test_vanilla_as_published_is_limited_alone():
    options = argparse.Namespace(methods=None, set=["own:"], preset=[], vanilla_limit=4)
    rows = evaluate.plan_settings(options, 64, None)
    assert {row.label: row.limit for row in rows if row.limit is not None} == {"vanilla": 4}
    assert [row.label for row in rows][-2:] == ["blockbatch", "own"]
    options.vanilla_limit = 0
    assert "vanilla" not in [row.label for row in evaluate.plan_settings(options, 64, None)]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--methods", "best"], "--methods: expected some of"),
        (["--tasks", "poems"], "task: expected arithmetic"),
        (["--limit", "0"], "limit: expected a number of problems"),
        (["--preset", "best"], "preset: expected one of"),
        (["--preset", "math"], "--preset: expected --tasks with it"),
        (["--out", __file__], "--out: expected a folder"),
        (["--set", "blockbatch:threshold=0.8"], "settings: expected a name of its own"),
    ],
)
def test_bad_options_are_one_line(tmp_path, capsys, options, message):
    given = ["--methods", "blockbatch", "--gen-length", "32", "--device", "cpu", "--out", str(tmp_path / "o")]
    assert main(["eval", *given, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"blockbatch: error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_time_left():
    seen = []
    clock = Clock({"slow": 3, "fast": 2}, [("slow", 4.0), ("slow", 6.0)], seen.append)
    clock.tell("first")
    clock.add("fast", 1, 0.5)
    clock.tell("second")
    clock.add("slow", 2, 8.0)
    clock.tell("third")
    assert seen == [
        Progress(0, 5, "first", None), Progress(1, 5, "second", 15.5), Progress(3, 5, "third", 5.0)
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (41.6, 185, 7800)] == ["42 s", "3:05 min", "2:10 h"]


class Output:
    def __init__(self, terminal):
        self.text, self.terminal = "", terminal

    def isatty(self):
        return self.terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def fileno(self):
        raise OSError


def test_progress_on_a_terminal_and_elsewhere():
    terminal, file = Output(True), Output(False)
    for output in (terminal, file):
        with progress_bar(output) as show:
            show(Progress(1, 4, "t 1: blockbatch", 62.0))
            show(Progress(2, 4, "too soon to be shown", 40.0))
            show(Progress(4, 4, "the report", 0.0))
    assert "[######..................] 1/4, 1:02 min left  t 1: blockbatch" in terminal.text
    assert "too soon" not in terminal.text + file.text
    assert terminal.text.endswith("\r") and "\n" not in terminal.text
    assert (
        file.text == "eval: 1/4, 1:02 min left, next t 1: blockbatch\neval: 4/4, 0 s left, next the report\n"
    )
