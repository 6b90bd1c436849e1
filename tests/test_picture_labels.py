"""No text of a picture covers another or is cut off, in pictures of real results and of crowded ones."""

import json
import sys

import pytest

import blockbatch
import picture_traces
from blockbatch.cli import main
from blockbatch.evaluation.knobs import ABLATIONS, KINDS
from blockbatch.evaluation.markdown import heading
from blockbatch.evaluation.records import Run, read_run
from blockbatch.evaluation.report import build_report
from blockbatch.pictures import (
    ablation,
    agreement,
    consensus,
    evaluation,
    frontier,
    labels,
    style,
    trajectories,
)
from blockbatch.tracing import load_trace
from command_runs import ROOT
from label_boxes import boxes, checked, collisions
from plot_traces import save_decode
from test_evaluation_report import HEADER, many
from test_plot_frontier import sized_run

pytest.importorskip("matplotlib")
RESULTS = ROOT / "bench" / "results"
STORED = sorted((RESULTS / "ablations").glob("*/summary.json"))


@pytest.fixture(scope="module")
def model():
    return blockbatch.load_model("tiny", device="cpu")


@pytest.fixture
def bench(monkeypatch):
    """Imports a script of bench/."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    yield __import__
    for name in ("plots", "clock_plot", "clock_settings", "frontier_plot"):
        sys.modules.pop(name, None)


def test_the_check_sees_what_collides():
    with style.figure(height=2) as figure:
        axis = figure.subplots()
        axis.text(0.5, 0.5, "one")
        axis.text(0.52, 0.5, "two")
        axis.text(0.5, 0.2, "upright", rotation=90)
        assert collisions(figure) == ["'two' and 'one'"]
        axis.text(1.4, 0.5, "outside", clip_on=False)
        figure.set_layout_engine("none")
        assert "'outside' is cut off" in collisions(figure)
        # Slanted boxes beside each other share their upright frames and nothing else.
        axis.texts[0].set(rotation=45, position=(0.5, 0.5))
        axis.texts[1].set(rotation=45, position=(0.6, 0.5))
        assert "'two' and 'one'" not in collisions(figure)


@pytest.mark.parametrize("crowd", [1, 2, 8, 14])
def test_names_of_marks_that_coincide_stand_apart(crowd):
    with style.figure(height=3) as figure:
        axis = figure.subplots()
        axis.plot([0, 4], [0, 4], ".")
        names = [labels.Name(2 + 0.01 * (n % 3), 2, f"setting {n}" * (1 + n % 2)) for n in range(crowd)]
        figure.draw_without_rendering()
        labels.place(axis, names, avoid=[(x / 10, x / 10) for x in range(40)])
        figure.set_layout_engine("none")
        assert collisions(figure) == []
        assert sum(box.text.startswith("setting") for box in boxes(figure)) == crowd


def test_frontier(tmp_path, monkeypatch):
    with checked(monkeypatch):
        frontier.draw(read_run(RESULTS / "block_sizes" / "results.jsonl"), tmp_path / "a.png")
        # All in one place.
        every = {f"block {size}": [(True, 5), (False, 4)] for size in (4, 8, 16)}
        frontier.draw(sized_run({**every, "blockbatch": [(True, 5), (False, 4)]}), tmp_path / "b.png")


def test_evaluation(tmp_path, monkeypatch):
    run = read_run(RESULTS / "eval" / "results.jsonl")
    report = build_report(run)
    methods = {label: options["method"] for label, options in run.header["settings"].items()}
    with checked(monkeypatch):
        evaluation.draw(report.overall, methods, tmp_path / "a.png", title=heading(report))


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.parent.name)
def test_ablation(path, tmp_path, monkeypatch):
    with checked(monkeypatch):
        ablation.draw_ablation(json.loads(path.read_text()), tmp_path / "a.png")


@pytest.mark.parametrize("kind", KINDS)
def test_ablation_of_every_knob(kind, tmp_path, monkeypatch):
    report = json.loads((RESULTS / "ablations" / "components" / "summary.json").read_text())
    row = report["rows"][0]
    names = ABLATIONS[kind].variants
    report |= {"kind": kind, "title": ABLATIONS[kind].title, "default": next(iter(names))}
    report["rows"] = [{**row, "setting": name} for name in names]
    with checked(monkeypatch):
        ablation.draw_ablation(report, tmp_path / "a.png")


def test_long_names_of_settings_are_not_cut_off(tmp_path, monkeypatch):
    names = [f"a setting with a name of its own, number {number}" for number in range(7)]
    records = [one for name in names for one in many(range(5), name, lambda n: 5 + n, 1.0, lambda n: n > 2)]
    report = build_report(Run(HEADER, records))
    with checked(monkeypatch):
        evaluation.draw(report.overall, dict.fromkeys(names, "blockbatch"), tmp_path / "a.png", title="t")


@pytest.mark.parametrize("name", ["step_latency", "refresh", "clock", "frontier"])
def test_bench_plots(name, tmp_path, monkeypatch, bench):
    report = json.loads((RESULTS / f"{name}.json").read_text())
    with checked(monkeypatch):
        bench("plots").DRAWN[name](report, tmp_path / "a.png")


def test_what_parts_of_a_step_mean_stands_in_the_picture(tmp_path, bench, monkeypatch):
    report = json.loads((RESULTS / "step_latency.json").read_text())
    texts = []
    monkeypatch.setattr(style, "save_png", lambda figure, path: texts.extend(boxes(figure)))
    bench("plots").step_latency(report, tmp_path / "a.png")
    told = " ".join(box.text for box in texts)
    assert "Around the model: " in told and "Gaps: " in told
    # As the key calls them.
    assert {"around the model", "gaps"} <= {box.text for box in texts}


DECODES = {
    "wide": {"gen_length": 128},
    "open": {"gen_length": 64, "query_span": "open", "refresh_interval": None},
    "budget": {"gen_length": 64, "max_step_tokens": 64},
    "many": {"gen_length": 32, "block_sizes": (1, 2, 4, 8, 16, 32), "threshold": 1.0},
}


@pytest.mark.parametrize("name", DECODES)
@pytest.mark.parametrize("whole", [False, True])
def test_consensus(name, whole, model, tmp_path, monkeypatch):
    trace = picture_traces.decode(model, picture_traces.problem("symbolic", 4), **DECODES[name])[0]
    with checked(monkeypatch):
        consensus.draw(trace, tmp_path / "a.png", whole=whole)


def test_trajectories_and_agreement(model, tmp_path, monkeypatch):
    options = [{}, {"method": "dual_cache", "block_size": 8}, {"method": "dual_cache", "drafts": (1, 2)}]
    traces = []
    for number, more in enumerate(options):
        path = tmp_path / f"{number}.json"
        save_decode(model, path, trace_kv=True, **more)
        traces.append(load_trace(path))
    with checked(monkeypatch):
        trajectories.draw(traces, tmp_path / "a.png")
        trajectories.draw(traces[:1], tmp_path / "b.png")
        agreement.draw(traces[:1], tmp_path / "c.png")


def test_the_command_draws_what_was_checked(model, tmp_path, monkeypatch):
    save_decode(model, tmp_path / "trace.json", query_span="open")
    with checked(monkeypatch) as figures:
        assert main(["picture", "consensus", str(tmp_path / "trace.json")]) == 0
    assert [path.name for path, *_ in figures] == ["trace.consensus.png"]
