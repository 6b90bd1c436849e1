"""The oracle of Dream's published rule against the decodes of its authors' code."""

import json
from pathlib import Path

import pytest

from oracle.dream_decoder import DreamConfig, decode
from plain_models import PlainModel

DATA = Path(__file__).parent / "data" / "conformance_dream"
RECORDS = json.loads((DATA / "trajectories.json").read_text())
REASONS = {"eos_ready": "eos", "branch_complete": "length"}


def settings_of(record):
    """The settings of a record under their public names."""
    names = ("gen_length", "threshold", "sync_threshold")
    return {name: record[name] for name in names} | {
        "block_sizes": tuple(record["block_sizes"]),
        "refresh_interval": record["refresh_block_size"],
        "eos_exit": "prefix" if record["stop_on_eos"] else "none",
    }


@pytest.fixture(scope="module")
def model():
    return PlainModel(DATA)


@pytest.mark.parametrize("record", RECORDS, ids=range(len(RECORDS)))
def test_record(model, record):
    result = decode(model, record["prompt"], DreamConfig(**settings_of(record)))
    assert result.events == record["events"]
    assert result.canvas == record["canvas"]
    nfe = result.nfe_init, result.nfe_block, result.nfe_refresh
    assert nfe == (record["nfe_init"], record["nfe_block"], record["nfe_refresh"])
    assert result.winner_block_size == record["winner_block_size"]
    assert result.stop_reason == REASONS[record["exit_reason"]]
    for name in ("merged", "synced"):
        assert {str(b["block_size"]): b[name] for b in result.branches} == record[name]
    assert sum(b["committed"] for b in result.branches) == record["committed"]
