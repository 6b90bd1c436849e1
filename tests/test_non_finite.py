"""A decode whose numbers break ends by one error that says where, and leaves an engine that decodes on."""

import gc
import json
import math
import pickle

import pytest
import torch

import blockbatch
import blockbatch_kernels as bbk
from blockbatch.cli import main
from blockbatch.decoding import METHOD_BUILDERS, RunnerPool, Session
from blockbatch.decoding.graphs import StepGraphs
from blockbatch.generation import generate, open_session, stream
from blockbatch.tracing import load_trace, save_trace
from cuda_places import open_place
from oracle import ScriptedModel
from picture_traces import handmade
from scripted_engine import EngineScripted

FAILS = blockbatch.NonFiniteLogitsError
LONG = {"gen_length": 32, "refresh_interval": 8, "block_sizes": (4, 8, 16)}
OPEN = {"query_span": "open", "refresh_scope": "generation"}
DECODES = [
    {"method": "blockbatch", **LONG},
    {"method": "blockbatch", **LONG, **OPEN, "eos_exit": "none"},
    {"method": "blockbatch", **LONG, "eos_exit": "window"},
    {"method": "vanilla", "gen_length": 32, "steps": 8, "block_size": 16},
    {"method": "prefix_cache", "gen_length": 32, "block_size": 16},
    {"method": "dual_cache", "gen_length": 32, "block_size": 8, **OPEN},
    {"method": "dual_cache", "gen_length": 32, "block_size": 16, "drafts": (1, 2)},
    {"method": "local_leap", "gen_length": 32, "block_size": 16},
]
# On a model that predicts the next token, as that policy wants.
DREAM = {"method": "blockbatch", **LONG, "policy": "dream_published"}


class Breaking(EngineScripted):
    """Gives NaN or infinity for one prompt, known by its first token, in one forward counted from 1."""

    def __init__(self, scripted):
        super().__init__(scripted)
        self.of_row, self.scripted = scripted.logits, self
        self.vocab_size, self.mask_token_id = scripted.vocab_size, scripted.mask_token_id
        self.suppress_mask = scripted.suppress_mask
        self.broken_forward, self.first_token, self.value, self.forwards = None, None, math.nan, 0

    def predict(self, *args, **options):
        self.forwards += 1
        return super().predict(*args, **options)

    def logits(self, seen, positions):
        logits = torch.as_tensor(self.of_row(seen, positions)).float()
        if self.forwards == self.broken_forward and int(seen[0]) == self.first_token:
            # At one position and one token alone.
            logits[len(positions) // 2, self.forwards % self.vocab_size] = self.value
            if self.value < 0:
                logits[len(positions) // 2] = self.value
        return logits

    def broken(self, forward, first_token, value):
        self.broken_forward, self.first_token, self.value, self.forwards = forward, first_token, value, 0
        return self


def engine(prediction_offset=0):
    return Breaking(ScriptedModel(3, peak=(1.0, 8.0), eos_rate=0.01, prediction_offset=prediction_offset))


@pytest.mark.parametrize("options", [*DECODES, DREAM, {**DREAM, "eos_exit": "prefix"}], ids=str)
@pytest.mark.parametrize("place", ["reference", "host"])
def test_every_forward_of_every_method(monkeypatch, options, place):
    if place == "host":
        with open_place("cpu").default(monkeypatch):
            check_every_forward(options)
    else:
        check_every_forward(options)


def check_every_forward(options):
    model, config = engine(int("policy" in options)), blockbatch.DecodeConfig(**options)
    prompts = [[5, 1, 2], [9, 3]]
    expected = generate(model, prompts, config)
    session = Session(model, prompts, method_of(model, config), config.gen_length)
    phases, served = [], []
    while (step := session.step()) is not None:
        if step.plan.query_tokens:
            phases.append(step.phase)
            served.append([row >= 0 for row in step.plan.source_row])
    rows = len(served[0]) // 2
    seen = set()
    for forward, phase in enumerate(phases, start=1):
        for request, (first, *_) in enumerate(prompts):
            mine = [any(each[request * rows : request * rows + rows]) for each in served[:forward]]
            if not mine[-1]:
                continue
            value = (math.nan, math.inf, -math.inf)[forward % 3]
            with pytest.raises(FAILS) as failed:
                generate(model.broken(forward, first, value), prompts, config)
            error = failed.value
            number = sum(took_part and one == phase for one, took_part in zip(phases, mine))
            assert (error.request, error.name) == (request, f"prompt[{request}]")
            assert (error.phase, error.number, error.forward) == (phase, number, sum(mine))
            assert error.dtype == torch.float32
            start = (
                f"prompt[{request}]: expected finite logits, got NaN or infinity in {phase} forward {number}"
            )
            assert str(error).startswith(f"{start} (forward {sum(mine)} of all), computed in float32. ")
            seen.add(phase)
    assert {"init", "block"} <= seen
    again = generate(model.broken(None, None, math.nan), prompts, config)
    assert [(r.canvas, r.nfe) for r in again] == [(r.canvas, r.nfe) for r in expected]


def method_of(model, config):
    return METHOD_BUILDERS[config.method](config, model.spec, model.eos_token_ids)


def test_refreshes_are_among_them():
    model, config = engine(), blockbatch.DecodeConfig(**DECODES[0])
    phases = []
    session = open_session(model, [5, 1, 2], config)
    while (step := session.step()) is not None:
        phases += [step.phase] if step.plan.query_tokens else []
    forward = phases.index("refresh") + 1
    with pytest.raises(FAILS, match=rf"^prompt: .* in refresh forward 1 \(forward {forward} of all\)"):
        generate(model.broken(forward, 5, math.nan), [5, 1, 2], config)


def test_a_session_that_failed_goes_nowhere():
    model, config = engine(), blockbatch.DecodeConfig(**DECODES[0])
    session = open_session(model.broken(2, 5, math.nan), [5, 1, 2], config)
    assert session.step().phase == "init"
    for _ in range(3):
        with pytest.raises(FAILS, match="in block forward 1"):
            session.step()
    assert model.forwards == 2


def test_prompts_keep_their_index_over_batches():
    model, config = engine(), blockbatch.DecodeConfig(**DECODES[0])
    model.cache_bytes = 3 * 48 * 2 * 2 * 4  # one request at a time
    prompts = [[5, 1], [6, 2], [9, 3]]
    before = sum(result.nfe.total for result in generate(model, prompts, config)[:2])
    with pytest.raises(FAILS, match=r"^prompt\[2\]: .* in init forward 1 \(forward 1 of all\)") as failed:
        generate(model.broken(before + 1, 9, math.nan), prompts, config)
    assert failed.value.request == 2
    copy = pickle.loads(pickle.dumps(failed.value))
    assert str(copy) == str(failed.value) and copy.request == 2


def test_an_error_that_is_kept_holds_no_session():
    model, config = engine(), blockbatch.DecodeConfig(**DECODES[0])
    with pytest.raises(FAILS) as failed:
        generate(model.broken(2, 5, math.nan), [5, 1, 2], config)
    gc.collect()
    names, frames = set(), failed.value.__traceback__
    while frames is not None:
        names |= {name for name, value in frames.tb_frame.f_locals.items() if isinstance(value, Session)}
        frames = frames.tb_next
    assert not names and failed.value.__context__ is None


@pytest.fixture
def tiny():
    return blockbatch.load_model("tiny", device="cpu")


def swollen(dtype, device="cpu", backend=None):
    """The built-in model with an MLP whose inner values pass 65504, though what it adds stays the same."""
    model = blockbatch.load_model("tiny", device=device, dtype=dtype, backend=backend)
    layer = model.weights.layers[6]
    half = layer.gate_up_weight.shape[0] // 2
    layer.gate_up_weight[half:] *= 2.0**15
    layer.down_weight *= 2.0**-15
    return model


@pytest.mark.parametrize("method", blockbatch.METHODS)
def test_float16_overflows(method):
    config = blockbatch.DecodeConfig(method=method, gen_length=32)
    prompt = "Tom has 3 apples."
    message = (
        r"^prompt: expected finite logits, got NaN or infinity in init forward 1 .*, computed in "
        r"float16\. Float16 ends at 65504, .* dtype='bfloat16' or dtype='float32'"
    )
    with pytest.raises(FAILS, match=message):
        generate(swollen("float16"), prompt, config)
    with pytest.raises(FAILS, match="computed in float16"):
        list(stream(swollen("float16"), prompt, config))
    for dtype in ("bfloat16", "float32"):
        plain = blockbatch.load_model("tiny", device="cpu", dtype=dtype)
        assert generate(swollen(dtype), prompt, config).canvas == generate(plain, prompt, config).canvas


def test_a_broken_cache_is_not_read_by_the_next_decode(tiny):
    """Both decodes have the same buffers; the second canvas is shorter, so that pages behind it stay NaN."""
    config = blockbatch.DecodeConfig(gen_length=32)
    method, pool = method_of(tiny, config), RunnerPool()
    prompt = tiny.tokenizer.encode("3+4=")
    expected = generate(tiny, prompt, config)
    weight = tiny.weights.layers[0].down_weight
    kept = weight.clone()
    weight[0, 0] = math.nan
    session = pool.open_session(tiny, [prompt * 9], method, 32, 9 * len(prompt))
    with pytest.raises(FAILS):
        session.run()
    cache = session.cache.kv
    assert cache.isnan().any()
    weight.copy_(kept)
    del session
    session = pool.open_session(tiny, [prompt], method, 32, 9 * len(prompt))
    assert session.cache.kv is cache
    session.run()
    assert cache.isnan().any()
    result = blockbatch.generation.build_result(tiny, session, 0)
    assert (result.canvas, result.nfe) == (expected.canvas, expected.nfe)


def test_the_command_line_says_it_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(blockbatch.models.Model, "predict", broken_predict)
    trace = tmp_path / "trace.json"
    assert main(["generate", "--device", "cpu", "--prompt", "3+4=", "--trace", str(trace)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("blockbatch: error: prompt: expected finite logits") and error.count("\n") == 1
    assert not trace.exists()


def broken_predict(model, packed, cache, seqlens_k, probe_tokens=None):
    nothing = torch.full(packed.predict_target.shape, math.nan)
    return bbk.Predictions(packed.predict_target, torch.zeros_like(nothing, dtype=torch.int32), nothing)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_trace_files_hold_finite_numbers(tmp_path, value):
    path = tmp_path / "trace.json"
    content = handmade()
    records = content.pop("trace")
    save_trace(path, records, **content)
    good = path.read_text()
    for name, broken in (
        ("record 1", records[:1] + [{**records[1], "seconds": value}] + records[2:]),
        ("record 0", [{**records[0], "kv": [{"branches": [0], "state": [0.5, value]}]}, *records[1:]]),
    ):
        with pytest.raises(
            ValueError, match=f"^trace: expected finite numbers, got NaN or infinity in {name}$"
        ):
            save_trace(path, broken, **content)
        assert path.read_text() == good and list(tmp_path.iterdir()) == [path]
        path.write_text(json.dumps({**content, "trace": broken}))  # as it was written once
        word = json.dumps(value)
        with pytest.raises(ValueError, match=f"expected a trace .*, got {word}, which is no number of JSON"):
            load_trace(path)
        path.write_text(good)
    with pytest.raises(ValueError, match="got NaN or infinity in seconds"):
        save_trace(path, records, **{**content, "seconds": value})


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("graphs", [True, False])
def test_on_a_gpu(monkeypatch, backend, graphs):
    if not graphs:
        monkeypatch.setattr(StepGraphs, "possible", staticmethod(lambda model: False))
    prompts = ["Tom has 3 apples.", "3+4=", "a" * 200]
    model = blockbatch.load_model("tiny", device="cuda", dtype="float16", backend=backend)
    weight = model.weights.layers[1].down_weight
    kept = weight.clone()
    for options in DECODES:
        config = blockbatch.DecodeConfig(**{**options, "gen_length": 64})
        expected = generate(model, prompts, config)
        for value in (math.nan, math.inf):
            weight[3, 5] = value
            with pytest.raises(FAILS, match=r"^prompt\[0\]: .* in init forward 1 .* computed in float16\. "):
                generate(model, prompts, config)
            weight.copy_(kept)
            result = generate(model, prompts, config)
            assert [r.canvas for r in result] == [r.canvas for r in expected]
        # In the middle of a decode, with steps that are captured already.
        session = blockbatch.generation._session(model, [model.tokenizer.encode(p) for p in prompts], config)
        for _ in range(2):
            session.step()
        weight[3, 5] = math.nan
        with pytest.raises(FAILS, match=r"computed in float16"):
            session.run()
        weight.copy_(kept)
        del session
        result = generate(model, prompts, config)
        assert [r.canvas for r in result] == [r.canvas for r in expected]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_float16_overflows_on_a_gpu(backend):
    for method in blockbatch.METHODS:
        config = blockbatch.DecodeConfig(method=method, gen_length=32)
        with pytest.raises(FAILS, match="computed in float16"):
            generate(swollen("float16", "cuda", backend), "Tom has 3 apples.", config)
        generate(swollen("bfloat16", "cuda", backend), "Tom has 3 apples.", config)
