"""The operators alone carry a decoder: `examples/standalone_dual_cache.py` gives the published decodes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from standalone_dual_cache import Transformer, decode

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
DATA = HERE / "data" / "conformance"
RECORDS = [
    record
    for record in json.loads((DATA / "trajectories.json").read_text())
    if record["method"] == "dual_cache"
]


@pytest.fixture(scope="module")
def models():
    """Device -> model, each loaded once."""
    loaded = {}

    def load(device):
        if device not in loaded:
            loaded[device] = Transformer(DATA, device)
        return loaded[device]

    return load


def test_there_are_16_records():
    assert len(RECORDS) == 16


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("record", RECORDS, ids=range(16))
def test_published_decodes(models, record, device):
    canvas, nfe = decode(
        models(device),
        record["prompt"],
        record["gen_length"],
        block_size=record["block_size"],
        threshold=record["threshold"],
        steps=record["steps"],
    )
    assert (canvas, nfe) == (record["canvas"], record["nfe"])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_pages_of_another_allocator(models, device):
    record = RECORDS[0]
    length = len(record["prompt"]) + record["gen_length"]
    options = {name: record[name] for name in ("block_size", "threshold", "steps")}
    page_ids = list(range(2, 3 * length, 3))[::-1]
    decoded = decode(models(device), record["prompt"], record["gen_length"], page_ids=page_ids, **options)
    assert decoded == (record["canvas"], record["nfe"])
    with pytest.raises(RuntimeError, match="expected a free page for every write, .* were missing among 1"):
        decode(models(device), record["prompt"], record["gen_length"], page_ids=[5], **options)


def test_it_needs_nothing_of_blockbatch():
    """In a process where importing `blockbatch` fails, from the command line to the last token."""
    record = RECORDS[0]
    arguments = ["standalone_dual_cache", str(DATA), "--device", "cpu", "--prompt"]
    arguments += [str(token) for token in record["prompt"]]
    code = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "blockbatch":
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Blocker())
sys.path.insert(0, {str(EXAMPLES)!r})
try:
    import blockbatch
except ImportError as error:
    assert str(error) == "blocked: blockbatch"
else:
    raise AssertionError("the blocker lets blockbatch through")
sys.argv = {arguments!r}
import standalone_dual_cache
standalone_dual_cache.main()
assert not any(name.split(".")[0] == "blockbatch" for name in sys.modules)
"""
    # The installed package has a hook for lm-evaluation-harness in torch, which is not what this is about.
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )
    expected = " ".join(map(str, record["canvas"]))
    assert run.stdout == f"{record['nfe']} forwards: {expected}\n"
