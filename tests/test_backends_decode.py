"""Whole decodes on a GPU in fp32, on every backend: the tokens and forwards of the CPU's."""

import json

import pytest
import torch

import blockbatch
import blockbatch_kernels as bbk
from test_conformance import DATA, OPTIONS, RECORDS
from tiny_decodes import RECORDED, config

PROBLEMS = 8
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["reference", "triton", "cuda"])
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def conformance_model(backend):
    return blockbatch.load_model(DATA, device="cuda", dtype="float32", backend=backend)


@pytest.fixture(scope="module")
def tiny_model(backend):
    return blockbatch.load_model("tiny", device="cuda", dtype="float32", backend=backend)


def decoded(result):
    nfe = result.nfe
    return {"canvas": result.canvas, "nfe": [nfe.init, nfe.block, nfe.refresh]}


@pytest.mark.parametrize("method", sorted({record["method"] for record in RECORDS}))
def test_conformance_records(conformance_model, method):
    records = {index: record for index, record in enumerate(RECORDS) if record["method"] == method}
    wrong = {}
    for index, record in records.items():
        options = {name: record[name] for name in OPTIONS if name in record}
        result = blockbatch.generate(conformance_model, record["prompt"], blockbatch.DecodeConfig(**options))
        got, expected = {"canvas": result.canvas, "nfe": result.nfe.total}, dict(record)
        if method == "blockbatch":
            got = decoded(result)
            got["merged"] = {str(branch.block_size): branch.merged for branch in result.branches}
            got["winner_block_size"] = result.block_size
            expected["nfe"] = [record[f"nfe_{phase}"] for phase in bbk.PHASES]
        expected = {name: expected[name] for name in got}
        if got != expected:
            wrong[index] = (expected, got)
    assert not wrong, (len(wrong), wrong)


@pytest.mark.parametrize("method", blockbatch.METHODS)
def test_built_in_model(tiny_model, method):
    records = [record for record in json.loads(RECORDED.read_text()) if record["method"] == method][:PROBLEMS]
    assert len(records) == PROBLEMS
    wrong = {}
    for index, record in enumerate(records):
        result = decoded(blockbatch.generate(tiny_model, record["prompt"], config(method)))
        expected = {name: record[name] for name in result}
        if result != expected:
            wrong[index] = (expected, result)
    assert not wrong, (len(wrong), wrong)


def test_a_backend_is_used_for_every_operator(backend):
    """So that a decode above has not run on another one by accident."""
    for name in (
        "attention_plan",
        "copy_pages",
        "decode_policy",
        "initial_plan",
        "linear_rope_kv_write",
        "lm_head_confidence",
        "pack_windows",
        "rms_norm",
        "share_pages",
        "swiglu",
        "varlen_attention",
    ):
        assert bbk.backend_of(name, torch.device("cuda"), backend) == backend
