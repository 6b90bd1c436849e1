"""The decodes of the published implementations, reproduced through the public interface."""

import json
from pathlib import Path

import pytest

import blockbatch

DATA = Path(__file__).parent / "data" / "conformance"
RECORDS = json.loads((DATA / "trajectories.json").read_text())
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
