"""Decodes of the published code of SDAR and Fast-dLLM v2: tokens, and kind and input of every forward."""

import pytest

import blockbatch
import fast_interpreter
from block_causal_data import FAMILIES, config, decode, expected_canvas, forwards, load, records
from blockbatch_kernels import triton
from interpreter import in_interpreter, run_in_the_interpreter

if triton.interpreted():
    fast_interpreter.replace_language_once()


def check(model, record, **changes):
    result = decode(model, record, **changes)
    assert result.canvas == expected_canvas(record, result), record.get("name", record["args"])
    assert forwards(result) == record["forwards"], record["args"]
    assert result.nfe.total == record["nfe"]
    kinds = [forward[0] for forward in record["forwards"]]
    counts = (kinds.count("prefill"), sum(kinds.count(kind) for kind in ("denoise", "block", "sub")))
    assert (result.nfe.prefill, result.nfe.denoise, result.nfe.store) == (*counts, kinds.count("store"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_decode(family):
    model = load(family)
    assert len(records(family)) > 20
    for record in records(family):
        check(model, record)
    assert model.pool.pages_in_use == 0


def test_a_store_joined_with_the_next_denoise_forward():
    """One forward less for every block but the last, and for the prompt; the same tokens and confidences."""
    model, separate, joined = load("sdar"), 0, 0
    for record in records("sdar"):
        alone, result = decode(model, record), decode(model, record, fuse_store=None)
        assert result.canvas == expected_canvas(record, result)
        kinds = [kind for kind, *_ in record["forwards"]]
        assert result.nfe.total == record["nfe"] - (kinds.count("store") - 1) - kinds.count("prefill")
        commits = [[commit for entry in one.trace for commit in entry["commits"]] for one in (alone, result)]
        for a, b in zip(*commits, strict=True):
            assert (a["positions"], a["tokens"]) == (b["positions"], b["tokens"])
            assert a["confidence"] == pytest.approx(b["confidence"], abs=1e-4)
        separate, joined = separate + alone.nfe.total, joined + result.nfe.total
    assert joined < 0.82 * separate


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_a_batch_are_decoded_as_alone(family):
    model = load(family)
    alike = {}
    for record in records(family):
        key = str(sorted((name, value) for name, value in record["args"].items() if name != "stop"))
        alike.setdefault((record["algorithm"], key), []).append(record)
    # Records of the same settings are few; prompts of others serve as well, since the decode alone is known.
    prompts = [record["prompt"] for record in records(family)]
    for group in list(alike.values())[:4]:
        settings = config(group[0], trace=True)
        with pytest.warns(UserWarning) if settings.block_size != model.spec.block_size else no_warning():
            together = blockbatch.generate(model, prompts[:6], settings)
        for prompt, result in zip(prompts, together):
            alone = decode(model, {**group[0], "prompt": prompt})
            assert (result.canvas, result.nfe) == (alone.canvas, alone.nfe)
            assert forwards(result) == forwards(alone)


def no_warning():
    import contextlib

    return contextlib.nullcontext()


@in_interpreter
@pytest.mark.parametrize("family", FAMILIES)
def test_interpreted_triton(family):
    """Records of few forwards, with and without a block cache; all of them take a quarter of an hour."""
    model, chosen = load(family, backend="triton"), {}
    for record in sorted(records(family), key=lambda record: record["nfe"]):
        if 0 < record["nfe"] <= 12:
            chosen[record["args"].get("cache"), record["args"].get("rule")] = record
    assert len(chosen) >= 2
    for record in chosen.values():
        check(model, record)


def test_on_triton():
    if not triton.interpreted():
        run_in_the_interpreter(__file__, "-k", "test_interpreted_triton")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu(family, backend):
    model = load(family, device="cuda", dtype="float32", backend=backend)
    for record in records(family):
        check(model, record)
        if family == "sdar":
            result = decode(model, record, fuse_store=True)
            assert result.canvas == expected_canvas(record, result)
