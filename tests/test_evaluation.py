"""`blockbatch eval` on the built-in model: records that survive a kill, refusals, reports, pictures."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import blockbatch
from blockbatch import models
from blockbatch.cli import main
from blockbatch.evaluation import runner, statistics
from blockbatch.evaluation.records import read_run
from blockbatch.evaluation.settings import Setting, parse_setting, table_settings
from blockbatch.pictures import evaluation as picture
from blockbatch.tasks import Problem, load_task
from blockbatch.tracing import load_trace

ROOT = Path(__file__).resolve().parent.parent
LENGTH = 32
OPTIONS = [
    "--tasks",
    "symbolic,arithmetic",
    "--methods",
    "dual_cache,blockbatch",
    "--gen-length",
    str(LENGTH),
]
OPTIONS += ["--device", "cpu"]
COUNT = "2"  # problems of each task; with three settings 12 decodes
SETTINGS = ("dual_cache", "dual_cache +eos", "blockbatch")


@pytest.fixture(scope="module", autouse=True)
def model():
    """The built-in model; commands that run in this process take it, too, instead of loading it again."""
    loaded = blockbatch.load_model("tiny", device="cpu")
    load_model = models.load_model

    def load(name, **options):
        again = name != "tiny" or options["dtype"] is not None
        return load_model(name, **options) if again else loaded

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load_model", load)
        yield loaded


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The folder of an evaluation that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(["eval", *OPTIONS, "--limit", COUNT, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Drawing takes longer than decoding here; `whole` has its picture before this comes into force."""
    monkeypatch.setattr(picture, "draw", lambda *arguments, **options: None)


def environment():
    paths = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def settled(path):
    """The records of a file without what differs from run to run."""
    return [replace(found, seconds=0.0) for found in read_run(path).records]


def evaluate(*more):
    return main(["eval", *OPTIONS, *map(str, more)])


def test_every_decode_once_and_balanced(whole):
    run = read_run(whole / "results.jsonl")
    tasks = ("symbolic", "arithmetic")
    expected = [(task, f"test/0/{n}", label) for n in range(2) for task in tasks for label in SETTINGS]
    assert [found.key for found in run.records] == expected
    assert run.header["settings"]["dual_cache"]["eos_exit"] == "none"
    assert run.header["gen_length"] == LENGTH and run.header["command"].startswith("blockbatch eval --tasks")


def test_records_are_what_generate_gives(whole, model):
    run = read_run(whole / "results.jsonl")
    problem = load_task("symbolic", limit=1)[0]
    for found in run.records[:3]:
        options = dict(run.header["settings"][found.setting])
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
        result = blockbatch.generate(model, problem.prompt, blockbatch.DecodeConfig(**options))
        assert (found.text, found.tokens) == (result.text, len(result.tokens))
        assert found.nfe == {**vars(result.nfe), "total": result.nfe.total}
        assert (found.stop_reason, found.block_size) == (result.stop_reason, result.block_size)
        assert found.right == problem.is_right(result.text)


def test_killed_and_resumed(whole, tmp_path):
    path = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "blockbatch", "eval", *OPTIONS, "--limit", COUNT, "--out", str(tmp_path)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        for _ in range(6000):
            if path.exists() and path.read_bytes().count(b"\n") > 3:
                break
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = settled(path)
    assert 3 <= len(done) < 12  # else it was not killed in the middle
    with open(path, "ab") as file:
        file.write(b'{"task": "symb')  # as a kill within a write leaves it
    assert evaluate("--limit", COUNT, "--out", tmp_path) == 0
    assert settled(path) == settled(whole / "results.jsonl")
    assert settled(path)[: len(done)] == done


def test_interrupted_by_a_person(whole, tmp_path, monkeypatch, capsys):
    decode, calls = runner._decode, []

    def decode_three(*arguments, **options):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(arguments)
        return decode(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "_decode", decode_three)
        assert evaluate("--limit", 1, "--out", tmp_path) == 130
    assert "the same command goes on with it" in capsys.readouterr().err
    path = tmp_path / "results.jsonl"
    assert len(read_run(path).records) == 3
    assert evaluate("--limit", 1, "--out", tmp_path) == 0
    assert settled(path) == settled(whole / "results.jsonl")[:6]


@pytest.mark.parametrize("cut", [1, 30])
def test_a_cut_line_is_dropped_and_decoded_again(whole, tmp_path, cut):
    content = (whole / "results.jsonl").read_bytes()
    path = tmp_path / "results.jsonl"
    path.write_bytes(content[:-cut])
    assert len(read_run(path).records) == 11  # reading does not change the file
    assert path.read_bytes() == content[:-cut]
    assert evaluate("--limit", COUNT, "--out", tmp_path) == 0
    assert settled(path) == settled(whole / "results.jsonl")
    assert path.read_bytes().startswith(content[: content[:-1].rindex(b"\n") + 1])


def test_more_problems_go_on_where_fewer_ended(whole, tmp_path):
    path = tmp_path / "results.jsonl"
    assert evaluate("--limit", 1, "--out", tmp_path) == 0
    first = path.read_bytes()
    assert evaluate("--limit", COUNT, "--out", tmp_path) == 0
    assert path.read_bytes().startswith(first)
    assert settled(path) == settled(whole / "results.jsonl")
    # Fewer again: nothing is decoded, and the report is of these.
    assert evaluate("--limit", 1, "--out", tmp_path) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["problems"] == {"symbolic": 1, "arithmetic": 1} and len(settled(path)) == 12


@pytest.mark.parametrize(
    "options, field, there, here",
    [
        (["--gen-length", "64"], "gen_length", "32", "64"),
        (["--seed", "1"], "seed", "0", "1"),
        (["--dtype", "bfloat16"], "dtype", '"float32"', '"bfloat16"'),
        (["--split", "held_out"], "split", '"test"', '"held_out"'),
        (["--batch-size", "2"], "batch_size", "1", "2"),
        (["--methods", "blockbatch"], "settings.dual_cache", "", "nothing"),
        (["--set", "own:threshold=0.8"], "settings.own", "nothing", ""),
    ],
)
def test_results_of_another_run_are_refused(whole, capsys, options, field, there, here):
    before = (whole / "results.jsonl").read_bytes()
    assert evaluate("--limit", COUNT, "--out", whole, *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"got another {field}: {there}" in error and f", {here}" in error and "--fresh" in error
    assert (whole / "results.jsonl").read_bytes() == before


def test_fresh_starts_over(tmp_path, model):
    problems = load_task("symbolic", limit=2)
    for threshold in (0.9, 0.8):
        settings = [parse_setting(f"own:threshold={threshold}", LENGTH)]
        run = runner.run(model, problems, settings, tmp_path / "r.jsonl", fresh=True)
        assert len(run.records) == 2 == len(read_run(tmp_path / "r.jsonl").records)
        assert run.header["settings"]["own"]["threshold"] == threshold


def test_a_problem_with_another_prompt_is_refused(tmp_path, model):
    problem = Problem("own", "1", "1 + 1 =", "2", None)
    settings = [Setting("dual", blockbatch.DecodeConfig(method="dual_cache", gen_length=LENGTH))]
    runner.run(model, [problem], settings, tmp_path / "r.jsonl")
    changed = replace(problem, prompt="1 + 2 =")
    with pytest.raises(ValueError, match="expected the same own 1 as in the file"):
        runner.run(model, [changed], settings, tmp_path / "r.jsonl")


def test_bad_arguments_are_named_before_any_decode(tmp_path, model):
    problem = Problem("own", "1", "1 + 1 =", "2", None)
    setting = Setting("dual", blockbatch.DecodeConfig(method="dual_cache", gen_length=LENGTH))
    alike = [replace(problem, id="1:"), replace(problem, id="1;")]
    for problems, settings, options, message in (
        ([], [setting], {}, "problems: expected at least one"),
        ([problem] * 2, [setting], {}, "problems: expected a name of its own"),
        ([problem], [setting] * 2, {}, "settings: expected a name of its own"),
        ([problem], [setting], {"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ([replace(problem, prompt="x " * 9000)], [setting], {}, "own 1: expected prompt and gen_length"),
        (alike, [setting], {"traces": tmp_path}, "traces: expected names"),
    ):
        with pytest.raises(ValueError, match=message):
            runner.run(model, problems, settings, tmp_path / "r.jsonl", **options)
    assert not (tmp_path / "r.jsonl").exists()


def test_batches_traces_limits_and_progress(tmp_path, model, whole):
    problems = load_task("symbolic", limit=3)
    alone = {found.key: found for found in settled(whole / "results.jsonl")}
    settings = table_settings(("dual_cache", "blockbatch"), LENGTH)
    settings[0] = replace(settings[0], limit=1)
    seen = []
    run = runner.run(
        model, problems, settings, tmp_path / "r.jsonl", batch_size=2, traces=tmp_path / "traces",
        progress=seen.append,
    )  # fmt: skip
    counts = {label: summary.count for label, summary in statistics.summarize(run.records).items()}
    assert counts == {"dual_cache": 1, "dual_cache +eos": 3, "blockbatch": 3}
    assert all(replace(found, seconds=0.0) == alone[found.key] for found in run.records[:5])
    shares = [found.seconds for found in run.records if found.setting == "blockbatch"]
    assert shares[0] == shares[1] != shares[2]
    assert [at.done for at in seen][-2:] == [6, 7] and seen[-1].total == 7 and seen[-1].seconds_left == 0
    assert len(list((tmp_path / "traces").iterdir())) == 7
    trace = load_trace(tmp_path / "traces" / "symbolic_test-0-0_blockbatch.json")
    assert (trace["task"], trace["problem"], trace["setting"]) == ("symbolic", "test/0/0", "blockbatch")
    assert trace["text"] == run.records[2].text and len(trace["trace"]) == run.records[2].nfe["total"]


def test_the_report_holds_the_numbers(whole):
    text = (whole / "report.md").read_text()
    summary = json.loads((whole / "summary.json").read_text())
    records = read_run(whole / "results.jsonl").records
    assert (
        "4 problems (2 symbolic, 2 arithmetic)" in text and "## symbolic" in text and "## arithmetic" in text
    )
    for label in SETTINGS:
        mine = [found for found in records if found.setting == label]
        nfe = sum(found.nfe["total"] for found in mine) / 4
        assert summary["overall"][label]["nfe"]["total"] == pytest.approx(nfe)
        lines = [line for line in text.splitlines() if line.startswith(f"| {label} ".ljust(17))]
        assert f"| {nfe:.2f} [" in lines[0] and f" {sum(f.right for f in mine)}/4 |" in lines[0]
    verdicts = [
        line for line in text.splitlines() if line.startswith("- **blockbatch** against **dual_cache")
    ]
    assert len(verdicts) == 2 and "no difference shown" in text and "same text" in text
    assert "--limit 2" in text and "torch" in text and "(report.png)" in text
    image = (whole / "report.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_picture_is_not_blank(whole):
    image = pytest.importorskip("matplotlib.image").imread(whole / "report.png")[..., :3]
    inked = (image < 0.9).any(axis=-1)
    height, width = inked.shape
    assert width > 900 and height > 400
    # Something is drawn in every quarter, and most of the page is paper.
    quarters = [
        inked[y : y + height // 2, x : x + width // 2] for y in (0, height // 2) for x in (0, width // 2)
    ]
    assert all(quarter.mean() > 0.005 for quarter in quarters) and inked.mean() < 0.3
