"""`blockbatch ablate`: its settings, numbers, table and picture, and a run that was cut off."""

import json
import struct
import zlib

import pytest

from blockbatch.cli import main
from blockbatch.config import DecodeConfig
from blockbatch.evaluation import ablations
from blockbatch.evaluation.records import Record, Run
from blockbatch.pictures.ablation import draw_ablation


@pytest.mark.parametrize("kind", ablations.KINDS)
def test_settings_differ_and_hold_the_default(kind):
    settings, default = ablations.ablation_settings(kind, 256)
    configs = [setting.config for setting in settings]
    assert len(set(configs)) == len(configs) == len({setting.label for setting in settings}) >= 2
    (found,) = [setting.config for setting in settings if setting.label == default]
    assert found == DecodeConfig(gen_length=256, **ablations.ABLATIONS[kind].base)


def test_knobs_that_are_ours():
    def configs(kind):
        return [setting.config for setting in ablations.ablation_settings(kind, 64)[0]]

    spans = {(one.query_span, one.refresh_interval) for one in configs("query-span")}
    assert spans == {("window", 32), ("window", None), ("open", 32), ("open", None)}
    assert [one.refresh_scope for one in configs("refresh-scope")] == ["canvas", "generation"]
    drafted = configs("drafts")
    assert {(one.method, one.eos_exit) for one in drafted} == {("dual_cache", "prefix")}
    assert [one.drafts for one in drafted][:3] == [None, (1,), (1, 2)]


def test_knobs_of_the_paper():
    def values(kind, option):
        return [getattr(setting.config, option) for setting in ablations.ablation_settings(kind, 256)[0]]

    assert {4, 8, 16, 32, 64} <= set(values("sync-threshold", "sync_threshold"))
    assert {4, 8, 16, 32, 64, 128} <= set(values("refresh-interval", "refresh_interval"))
    off = ablations.ablation_settings("components", 256)[0]
    names = ("merge_threshold", "sync_threshold", "refresh_interval")
    switched = {tuple(name for name in names if getattr(s.config, name) is None) for s in off}
    assert {(), *((name,) for name in names), names} <= switched


def test_block_sizes_that_do_not_divide_the_length_are_left_out():
    settings, default = ablations.ablation_settings("block-sizes", 64)
    assert default == "4-64" and all(max(setting.config.block_sizes) <= 64 for setting in settings)
    with pytest.raises(ValueError, match="gen_length: expected a multiple of 128 for block-sizes, got 36"):
        ablations.ablation_settings("block-sizes", 36)


def test_drafts_that_a_block_has_no_room_for_are_left_out():
    settings, default = ablations.ablation_settings("drafts", 36)
    assert default == "off" and {setting.config.block_size for setting in settings} == {4}
    assert [setting.config.drafts for setting in settings] == [None, (1,), (1, 2), (1, 2, 3)]
    assert len(ablations.ablation_settings("drafts", 256)[0]) == 5


def record(task, problem, setting, right, block):
    nfe = {"init": 1, "block": block, "refresh": 1, "total": block + 2}
    return Record(task, str(problem), setting, "", 10, right, nfe, 0.5, "eos", 8, "")


def made_up_run():
    """8 at 4 right of 8 and 6 forwards; 4 solves two more with 3 forwards more; 16 is not judged."""
    records = []
    for problem in range(8):
        task = "even" if problem % 2 == 0 else "odd"
        records += [
            record(task, problem, "4", problem < 6, 7),
            record(task, problem, "8", problem < 4, 4),
            record(task, problem, "16", None, 3),
        ]
    return Run({"model": "made up"}, records)


def test_numbers_of_a_report():
    report = ablations.ablation_report("sync-threshold", made_up_run(), "8")
    json.dumps(report)
    four, default, unjudged = report["rows"]
    assert [row["setting"] for row in report["rows"]] == ["4", "8", "16"]
    assert four["options"] == {"sync_threshold": 4} and default["against_default"] is None
    assert four["summary"]["all"]["accuracy"] == 0.75 and four["summary"]["odd"]["count"] == 4
    against = four["against_default"]
    assert (against["only_setting"], against["only_reference"], against["p_value"]) == (2, 0, 0.5)
    assert against["nfe"]["ratio"] == 1.5 and against["nfe"]["interval_95"] == (1.5, 1.5)
    assert unjudged["summary"]["all"]["accuracy"] is None


def test_table_of_a_report():
    lines = ablations.ablation_table(
        ablations.ablation_report("sync-threshold", made_up_run(), "8")
    ).splitlines()
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")] for line in lines[2:5]}
    assert list(rows) == ["4", "8 (default)", "16"]
    assert rows["4"][2] == "75.0" and rows["4"][4:6] == ["9.00", "1.00 + 7.00 + 1.00"]
    assert rows["4"][7].startswith("+25.0 [") and rows["4"][7].endswith("p = 0.50")
    assert rows["4"][8] == "+50.0% [+50.0, +50.0]" and rows["16"][7] == "not judged"
    assert rows["8 (default)"][7:9] == ["-", "-"]
    assert "| 4 | 75.0; 9.00 | 75.0; 9.00 |" in lines  # by task


def png_pixels(path):
    """Width, height and the decompressed rows of a PNG."""
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    data, at = b"", 8
    while at < len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        if content[at + 4 : at + 8] == b"IDAT":
            data += content[at + 8 : at + 8 + size]
        at += 12 + size
    return width, height, zlib.decompress(data)


@pytest.mark.parametrize("kind, default", [("sync-threshold", "8"), ("components", "nothing")])
def test_picture_of_a_report(tmp_path, kind, default):
    pytest.importorskip("matplotlib")
    run = made_up_run()
    if kind == "components":
        names = {"4": "merge", "8": "nothing", "16": "merge and sync"}
        run = Run(run.header, [Record(**{**vars(r), "setting": names[r.setting]}) for r in run.records])
    path = tmp_path / "report.png"
    draw_ablation(ablations.ablation_report(kind, run, default), path)
    width, height, pixels = png_pixels(path)
    assert width > 900 and height > 300 and len(set(pixels)) > 50
    with pytest.raises(ValueError, match="ends in .png"):
        draw_ablation(ablations.ablation_report(kind, run, default), tmp_path / "report.pdf")


def lines_without_times(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines[1:]]


def test_command_line_goes_on_after_a_kill(tmp_path, capsys):
    out = tmp_path / "ablation"
    command = ["ablate", "commit", "--tasks", "symbolic", "--limit", "2", "--gen-length", "32"]
    command += ["--device", "cpu", "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "threshold (default)" in printed and "local_leap" in printed
    results = out / "results.jsonl"
    whole = lines_without_times(results)
    assert len(whole) == 4
    summary = json.loads((out / "summary.json").read_text())
    assert [row["setting"] for row in summary["rows"]] == ["threshold", "local_leap"]
    assert printed.splitlines()[0] in (out / "report.md").read_text()

    # Killed while it wrote the third record.
    text = results.read_text().splitlines(keepends=True)
    results.write_text("".join(text[:3]) + text[3][:20])
    assert main(command) == 0
    assert lines_without_times(results) == whole
    assert results.read_text().splitlines(keepends=True)[:3] == text[:3]  # kept, not decoded again


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["depth"], "kind: expected one of block-sizes"),
        (["commit", "--tasks", "chess"], "task: expected arithmetic"),
        (["commit", "--limit", "0"], "limit: expected a number of problems"),
        (["block-sizes", "--gen-length", "36"], "gen_length: expected a multiple of 128"),
    ],
)
def test_bad_input(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["ablate", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
