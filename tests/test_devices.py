"""Which GPU an operator runs on and what is kept about it, and what a GPU with less shared memory does."""

import json
import re
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

import blockbatch_kernels as bbk
from blockbatch_kernels import cuda, reference, tuning
from blockbatch_kernels.cuda import extension as loader
from contract_cases import tensors_of, with_change
from operator_arguments import arguments_of

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
INTS = dict(dtype=torch.int32)


@pytest.fixture
def extension():
    return pytest.importorskip("blockbatch_kernels._C", reason="the extension is not built here")


# What the binary holds.


def test_the_binary_holds_what_its_build_info_says(extension):
    """The probe that is asked on a GPU, seen without one: static shared memory in code for sm_90a alone."""
    cuobjdump = shutil.which("cuobjdump")
    if cuobjdump is None:
        pytest.skip("needs cuobjdump")
    usage = subprocess.run(
        [cuobjdump, "-res-usage", extension.__file__], capture_output=True, text=True, check=True
    ).stdout
    # cuobjdump prints each architecture of a file, then its functions.
    found = {}
    arch = None
    for line in usage.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif "probe_kernel" in line:
            probe = arch
        elif (match := re.search(r"SHARED:(\d+)", line)) and "probe" in locals() and probe is not None:
            found[probe], probe = int(match[1]), None
    assert found
    for arch, shared in found.items():
        assert (shared >= 16384) == (arch == "sm_90a"), found
    real = {name.partition("-")[0] for name in cuda.build_info()["cuda_archs"] if "virtual" not in name}
    assert {arch.removeprefix("sm_") for arch in found} == real


class TestPlainNinety:
    """A build for sm_90 without the letter: it runs, without the kernels of sm_90a, and says so."""

    @pytest.fixture
    def machine(self, monkeypatch):
        info = dict(api=loader.API, cuda_archs=["90"], cuda_version="13.0", compiler="gcc")
        built = types.SimpleNamespace(
            build_info=lambda: info, driver_version=lambda: "13.0", has_code_for=lambda device: "portable"
        )
        monkeypatch.setattr(loader, "load", lambda: built)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        loader._why_unavailable.cache_clear(), loader.code_for.cache_clear()
        yield
        loader._why_unavailable.cache_clear(), loader.code_for.cache_clear()

    def test_it_says_what_is_missing_once(self, machine, recwarn):
        assert cuda.why_unavailable(torch.device("cuda", 0)) is None
        assert loader.code_for(0) == "portable"
        (warning,) = recwarn
        text = str(warning.message)
        assert "built for the architectures 90, without the fastest kernels of cuda:0" in text
        assert text.endswith("build with BBK_CUDA_ARCHS=90a")


@pytest.mark.gpu
def test_products_are_right_whatever_the_build_holds():
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) / 64
    got = bbk.linear(x, weight, static_weight=True)
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(got.double(), exact, rtol=2**-7, atol=2**-7)
    top, confidence, _ = bbk.lm_head_confidence(x[:8], weight)
    want, index = exact[:8].softmax(-1).max(-1)
    torch.testing.assert_close(confidence.double(), want, rtol=0.1, atol=0.02)
    assert (exact[:8].gather(1, top.long()[:, None])[:, 0] >= exact[:8].amax(1) - 0.1).all()


# What is kept is kept for each GPU.


def test_answers_belong_to_a_gpu_not_to_whichever_is_current(monkeypatch):
    codes, sms = {0: "none", 1: "sm90a"}, {0: 78, 1: 132}
    info = dict(api=loader.API, cuda_archs=["90a"], cuda_version="13.0", compiler="gcc")
    built = types.SimpleNamespace(
        build_info=lambda: info, driver_version=lambda: "13.0", has_code_for=lambda device: codes[device]
    )
    current = [0]
    monkeypatch.setattr(loader, "load", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: types.SimpleNamespace(
            major=9, minor=0, multi_processor_count=sms[device.index], total_memory=(80 << 30) + device.index
        ),
    )
    kept = (loader._why_unavailable, loader.code_for, tuning.devices._kind)
    try:
        for one in kept:
            one.cache_clear()
        for device in (0, 1, 0):
            current[0] = device
            for asked in (None, torch.device("cuda"), torch.device("cuda", device), device):
                assert cuda.is_available(asked) == (device == 1), (device, asked)
            assert tuning.num_processors(torch.device("cuda")) == sms[device]
            assert tuning.device_kind(torch.device("cuda", 1 - device)).num_sms == sms[1 - device]
    finally:
        for one in kept:
            one.cache_clear()


@pytest.mark.parametrize("num_sms", [7, 16, 60, 78, 114, 144])
def test_any_number_of_processors_is_served(num_sms):
    """MIG slices, H20, H100 PCIe and others: the rules count the processors that are there."""
    kind = tuning.DeviceKind((9, 0), num_sms)
    for gated in (False, True):
        for sizes in ((8, 4096, 4096), (64, 12288, 4096), (252, 12288, 4096), (128, 2048, 512)):
            parts = tuning.linear_parts(*sizes, gated=gated, device_kind=kind)
            assert parts in tuning.candidates(*sizes, gated=gated, device_kind=kind).values()
    for heads, kv_heads in ((32, 32), (28, 4), (8, 1)):
        shape = tuning.attention_shape(64, heads, kv_heads, 16, 20, num_sms, units=True)
        table, lengths = torch.arange(120, **INTS).view(6, 20), torch.full((6,), 300, **INTS)
        starts = torch.arange(0, 61, 10, **INTS)
        plan = reference.attention_plan(table, starts, lengths, page_size=16, num_tokens=64, shape=shape)
        assert plan.stretches.shape == (num_sms, 4)
        begin, end = plan.stretches[:, 0], plan.stretches[:, 1]
        assert int((end - begin).sum()) == int(plan.units[0, 0]) * kv_heads  # each unit once


# The current GPU.


def run_all(device, backend):
    """Mismatches of every operator against the reference on the CPU."""
    wrong = []
    for operator in bbk.operators.OPERATORS:
        arguments = arguments_of(operator)
        there = arguments_of(operator)
        for path, _ in [entry for name, value in there.items() for entry in tensors_of(value, name)]:
            there = with_change(there, path, lambda x: x.to(device))
        if "plan" in there and operator == "varlen_attention":
            del arguments["plan"], there["plan"]
        expected = getattr(bbk, operator)(**arguments, backend="reference")
        got = getattr(bbk, operator)(**there, backend=backend)
        if operator == "attention_plan":
            continue  # cut for other numbers of processors
        pairs = list(zip(tensors_of(got, "result"), tensors_of(expected, "result")))
        for name, value in there.items():
            pairs += list(zip(tensors_of(value, name), tensors_of(arguments[name], name)))
        for (path, one), (_, other) in pairs:
            if one.device != torch.device(device):
                wrong.append(f"{operator} {path}: on {one.device}")
            elif not torch.allclose(one.cpu().double(), other.double(), rtol=1e-4, atol=1e-4):
                wrong.append(f"{operator} {path}")
    return wrong


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_tensors_of_a_gpu_that_is_not_current(backend):
    torch.zeros(1, device="cuda:0")
    torch.cuda.set_device(0)
    assert run_all("cuda:1", backend) == []
    assert torch.cuda.current_device() == 0
    found = []
    thread = threading.Thread(target=lambda: found.append(run_all("cuda:1", backend)))
    thread.start()
    thread.join()
    assert found == [[]]


def other_gpu_alone():
    """In a process of its own: uses GPU 1 alone, from threads whose current GPU is 0; prints what came."""
    import ctypes

    driver = ctypes.CDLL("libcuda.so.1")

    def has_context(device):
        flags, active = ctypes.c_uint(), ctypes.c_int()
        assert driver.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active)) == 0
        return bool(active.value)

    gate_up = torch.randn(4, 64, device="cuda:1")
    out = torch.full((4, 32), float("nan"), device="cuda:1")
    torch.cuda.synchronize(1)
    compiled, stream = loader.load(), loader.stream_of(gate_up)
    states = []

    def launch():  # nothing of torch has chosen a GPU in this thread
        compiled.swiglu(gate_up=gate_up, out=out, stream=stream)
        states.append(has_context(0))

    thread = threading.Thread(target=launch)
    thread.start()
    thread.join()
    torch.cuda.synchronize(1)
    right = torch.allclose(out, bbk.swiglu(gate_up, backend="reference"))
    wrong = run_all("cuda:1", "cuda")
    states.append(has_context(0))
    print(json.dumps(dict(right=right, wrong=wrong, contexts=states, current=torch.cuda.current_device())))


@pytest.mark.gpu
@two_gpus
def test_no_context_starts_on_another_gpu():
    code = "import test_devices; test_devices.other_gpu_alone()"
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    code = f"import sys; sys.path[:0] = {paths!r}; {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == dict(right=True, wrong=[], contexts=[False, False], current=0)


# Less shared memory.


@pytest.fixture(params=[48 * 1024, 99 * 1024])
def little_shared_memory(request, extension):
    """As sm_86, sm_89 and sm_120 have it, and the least that any GPU has."""
    extension.limit_shared_bytes(request.param)
    yield request.param
    extension.limit_shared_bytes(0)


@pytest.mark.gpu
@pytest.mark.parametrize("gen_length", [128, 1706, 1707, 4300])
@pytest.mark.parametrize("num_requests", [1, 2])
def test_the_policy_needs_no_more(little_shared_memory, gen_length, num_requests):
    sizes = torch.tensor([4, 8, 16, 32, 64, 128], **INTS)
    params = bbk.PolicyParams(mask_token_id=99, eos_token_ids=(98,), threshold=0.7)
    generator = torch.Generator().manual_seed(gen_length)

    def start(device):
        prompts, lengths = torch.ones(num_requests, 3, **INTS), torch.full((num_requests,), 3, **INTS)
        state = bbk.BranchState.create(prompts.to(device), lengths.to(device), sizes, gen_length, 99)
        return state, bbk.initial_plan(state, params)

    (state, plan), (ours, our_plan) = start("cpu"), start("cuda")
    target = torch.arange(6 * num_requests * gen_length)
    for _ in range(3):
        top = torch.randint(0, 98, target.shape, generator=generator, **INTS)
        confidence = torch.rand(target.shape, generator=generator)
        plan, events = bbk.decode_policy(state, bbk.Predictions(target, top, confidence), plan, params)
        predictions = bbk.Predictions(target.cuda(), top.cuda(), confidence.cuda())
        our_plan, our_events = bbk.decode_policy(ours, predictions, our_plan, params, backend="cuda")
        for got, expected in ((vars(ours), vars(state)), (our_plan._asdict(), plan._asdict())):
            for name, tensor in expected.items():
                assert torch.equal(got[name].cpu(), tensor), name
        assert torch.equal(our_events.committed.cpu(), events.committed)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [384, 385, 792, 793, 12288, 12289, 26000, 60000])
def test_shared_tables_need_no_more(little_shared_memory, num_rows):
    check_sharing(num_rows, lambda table, source: bbk.share_pages(table, source, backend="cuda"), "cuda")


def test_tables_of_any_number_of_rows_are_shared_on_the_host(extension):
    check_sharing(60000, cuda.share_pages, "cpu")


def check_sharing(num_rows, share_pages, device):
    table = torch.arange(num_rows * 5, **INTS).view(num_rows, 5)
    source = torch.randperm(num_rows, generator=torch.Generator().manual_seed(num_rows)).int()
    ours = table.to(device, copy=True)
    share_pages(ours, source.to(device))
    assert torch.equal(ours.cpu(), table[source.long()])


@pytest.mark.parametrize(
    "memory_bytes, kind", [(85_000_000_000, tuning.H100), (150_000_000_000, tuning.H200)]
)
def test_the_kind_tells_gpus_of_the_same_processors_apart(monkeypatch, memory_bytes, kind):
    found = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=memory_bytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert tuning.devices._kind.__wrapped__(torch.device("cuda", 0)) == kind
