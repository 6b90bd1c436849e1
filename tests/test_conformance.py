"""Recorded decodes, most of them of the published implementations, through the public interface."""

import json
from pathlib import Path

import pytest

import blockbatch
from blockbatch.generation import build_result, open_session

DATA = Path(__file__).parent / "data" / "conformance"
RECORDS = json.loads((DATA / "trajectories.json").read_text())
OPEN_RECORDS = json.loads((DATA / "open_queries.json").read_text())
OPTIONS = ("method", "gen_length", "block_sizes", "block_size", "steps", "threshold", "merge_threshold")
OPTIONS += ("sync_threshold", "refresh_interval", "eos_exit")


@pytest.fixture(scope="module")
def model():
    return blockbatch.load_model(DATA, device="cpu")


def test_there_are_74_records():
    assert len(RECORDS) == 74


@pytest.mark.parametrize("record", RECORDS, ids=[f"{i}-{r['method']}" for i, r in enumerate(RECORDS)])
def test_record(model, record):
    config = blockbatch.DecodeConfig(**{name: record[name] for name in OPTIONS if name in record})
    result = blockbatch.generate(model, record["prompt"], config)
    assert result.canvas == record["canvas"]
    if record["method"] != "blockbatch":
        assert result.nfe.total == record["nfe"]
        return
    nfe = (result.nfe.init, result.nfe.block, result.nfe.refresh)
    assert nfe == (record["nfe_init"], record["nfe_block"], record["nfe_refresh"])
    assert result.block_size == record["winner_block_size"]
    assert {str(branch.block_size): branch.merged for branch in result.branches} == record["merged"]


def test_there_are_60_records_of_cheaper_forwards():
    kinds = {(r["options"]["method"], r["query_span"], r["refresh_scope"]) for r in OPEN_RECORDS}
    assert len(OPEN_RECORDS) == 60 and len(kinds) == 9


@pytest.mark.parametrize(
    "record", OPEN_RECORDS, ids=[f"{i}-{r['options']['method']}" for i, r in enumerate(OPEN_RECORDS)]
)
def test_record_of_cheaper_forwards(model, record):
    cheaper = {name: record[name] for name in ("query_span", "refresh_scope")}
    config = blockbatch.DecodeConfig(**record["options"], **cheaper)
    session = open_session(model, record["prompt"], config)
    queries = []
    while (step := session.step()) is not None:
        queries.append([step.phase, step.plan.query_lengths])
    result = build_result(model, session, 0)
    assert queries == record["query_tokens"]
    assert result.canvas == record["canvas"]
    assert [result.nfe.init, result.nfe.block, result.nfe.refresh] == record["nfe"]
    assert result.block_size == record["winner_block_size"]
