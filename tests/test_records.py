"""The file of records: what is whole counts, what is cut off is dropped, what is not ours is left alone."""

import pytest

from blockbatch.evaluation.records import RecordFile, Run, read_run
from test_statistics import record


def test_a_header_that_was_cut_counts_as_nothing(tmp_path):
    header = b'{"run": {"format": 1, "model": "another"}}'
    for length in (0, 3, len(header)):
        path = tmp_path / "results.jsonl"
        path.write_bytes(header[:length])
        with RecordFile(path, {"model": "m"}) as file:
            assert file.run == Run({"format": 1, "model": "m"}, [])
        assert read_run(path).header["model"] == "m"


def test_a_changed_setting_is_named(tmp_path):
    header = {"settings": {"own": {"threshold": 0.9, "steps": None}}}
    RecordFile(tmp_path / "r.jsonl", header).__exit__()
    changed = {"settings": {"own": {"threshold": 0.8, "steps": None}}}
    with pytest.raises(ValueError, match=r"another settings\.own\.threshold: 0\.9 there, 0\.8 now"):
        RecordFile(tmp_path / "r.jsonl", changed)


def test_files_that_are_not_ours(tmp_path):
    path = tmp_path / "results.jsonl"
    with RecordFile(path, {"model": "tiny"}) as file:
        file.append([record(1, "a"), record(2, "a", right=None)])
    lines = path.read_text().splitlines()
    assert read_run(path).records == [record(1, "a"), record(2, "a", right=None)]
    for text, message in (
        ("my notes", "expected results of an evaluation"),
        ("my notes\n", "expected results of an evaluation"),
        (f"{lines[0]}\nbroken\n{lines[1]}\n", "line 2: expected a JSON object"),
        (f"{lines[0]}\n{{}}\n", "line 2: expected a record with task"),
        (f"{lines[0]}\n{lines[1]}\n{lines[1]}\n", "line 3: expected each decode once"),
        (lines[0].replace('"format": 1', '"format": 9') + "\n", "line 1: expected the header"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            RecordFile(path, {"model": "tiny"})
        assert path.read_text() == text
    with pytest.raises(ValueError, match="without a whole line"):
        path.write_text("")
        read_run(path)


def test_two_processes_do_not_write_one_file(tmp_path):
    path = tmp_path / "r.jsonl"
    with RecordFile(path, {}), pytest.raises(OSError, match="got one in use"):
        RecordFile(path, {}, fresh=True)
    RecordFile(path, {}).__exit__()
