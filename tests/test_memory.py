"""What a decode is said to need of the memory, against what it takes; and systems that lack what Unix has."""

import gc
import subprocess
import sys
import weakref

import pytest
import torch

import blockbatch
from blockbatch import devices, generation, memory
from blockbatch.decoding import METHOD_BUILDERS, Session
from blockbatch.decoding.batch import most_tokens
from blockbatch.decoding.engine import Engine
from blockbatch.models import weights
from blockbatch_kernels import library
from live_memory import LiveMemory
from plain_models import write_dream, write_llada


def load(folder, family, dtype):
    write = {"llada": write_llada, "dream": write_dream}[family]
    write(folder, vocab_size=200, sharpness=3.0)
    return blockbatch.load_model(folder, device="cpu", dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("method", blockbatch.METHODS)
def test_no_decode_takes_more_than_it_is_said_to_need(method, family, dtype, tmp_path, monkeypatch):
    """Requests so many that a step computes more tokens than whole rows may at a time."""
    monkeypatch.setitem(blockbatch.decoding.session.ROW_TOKENS, "cpu", 64)
    # The operators run as they are, so that what they make inside counts, too.
    monkeypatch.setattr(library, "is_in_torch_dispatch_mode", lambda: False)
    model = load(tmp_path, family, dtype)
    config = blockbatch.DecodeConfig(method, gen_length=16)
    prompts = [[1 + number % 5] * 40 for number in range(30)]
    built = METHOD_BUILDERS[method](config, model.spec, model.eos_token_ids)
    needed = memory.needs(model, config, len(prompts), 40)
    with LiveMemory() as live:
        session = Session(model, prompts, built, config.gen_length)
        for _ in range(3):
            session.step()
    assert session.cache.kv.nbytes == needed.cache
    assert needed.cache < live.peak <= sum(needed)


def test_the_whole_canvas_of_every_request_counts(tmp_path):
    """Of vanilla a step computes prompts, too, however many requests there are."""
    model = load(tmp_path, "llada", "float32")
    config = blockbatch.DecodeConfig("vanilla", gen_length=16)
    method = METHOD_BUILDERS["vanilla"](config, model.spec, ())
    assert most_tokens(method, 500, 100, 16) == 500 * 116
    short, long = (memory.needs(model, config, 500, length) for length in (10, 100))
    per_token = (long.work - short.work) / (500 * 90)
    assert per_token >= 4 * (3 * model.spec.hidden_size + 3 * model.spec.intermediate_size)
    assert long.work - memory.needs(model, config, 250, 100).work >= 250 * 116 * per_token * 0.99


def test_weights_are_counted(tmp_path):
    for family in ("llada", "dream"):
        (tmp_path / family).mkdir()
        model = load(tmp_path / family, family, "bfloat16")
        allocated = {}
        for owner in (model.weights, *model.weights.layers):
            for tensor in vars(owner).values():
                if isinstance(tensor, torch.Tensor):
                    allocated[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        assert weights.weight_bytes(model.spec, model.dtype) == sum(allocated.values())


def test_torchs_error_becomes_one_that_says_what_was_missing(tmp_path, monkeypatch):
    model = load(tmp_path, "llada", "float32")
    config = blockbatch.DecodeConfig(gen_length=16)
    expected = blockbatch.generate(model, [1, 2], config)

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    with monkeypatch.context() as broken:
        broken.setattr(model, "predict", full)
        with pytest.raises(MemoryError, match="free memory of cpu: expected room for the next forward, got"):
            blockbatch.generate(model, [1, 2], config)
    with monkeypatch.context() as broken:
        broken.setattr(model, "new_cache", full)
        with pytest.raises(
            MemoryError, match="expected room for the K/V cache, got .* bytes .CUDA out of mem"
        ):
            generation.open_session(model, [1, 2], config)
    assert blockbatch.generate(model, [1, 2], config).canvas == expected.canvas


def test_a_full_cpu_says_so_too(tmp_path, monkeypatch):
    model = load(tmp_path, "llada", "float32")
    monkeypatch.setattr(model, "predict", lambda *args: torch.empty(2**62, dtype=torch.uint8, device="cpu"))
    with pytest.raises(MemoryError, match="free memory of cpu: expected room for the next forward"):
        blockbatch.generate(model, [1, 2], blockbatch.DecodeConfig(gen_length=16))


def test_a_message_counts_drafts_and_takes_the_longest_prompt(tmp_path, monkeypatch):
    model = load(tmp_path, "llada", "float32")
    config = blockbatch.DecodeConfig("dual_cache", gen_length=16, drafts=(1, 2))
    monkeypatch.setattr(memory, "free_bytes", lambda model: 1000)
    with pytest.raises(
        MemoryError,
        match=r"free memory of cpu: expected at least [\d,]+ bytes for the K/V cache and a forward of "
        r"1 branch and 2 drafts of 25 positions, got 1,000",
    ):
        blockbatch.generate(model, [[1], [2] * 9], config)


HIDDEN = """
import builtins, os, select, signal, sys
import torch, ctypes
for name in ("fcntl", "resource", "termios", "pty", "tty", "pwd", "grp"):
    sys.modules[name] = None
unix = ("sysconf", "sysconf_names", "fork", "killpg", "setsid", "getuid", "geteuid", "uname")
signals = ("SIGKILL", "SIGXCPU", "SIGALRM", "SIGHUP")
for module, names in ((os, unix), (select, ("poll",)), (signal, signals)):
    for name in names:
        delattr(module, name)
opened = builtins.open
def without_proc(file, *args, **options):
    if str(file).startswith("/proc"):
        raise FileNotFoundError(file)
    return opened(file, *args, **options)
builtins.open = without_proc
"""
EVERYTHING = """
import importlib, pkgutil, blockbatch, blockbatch_kernels
for package in (blockbatch, blockbatch_kernels):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        # Scripts of another process, what is compiled, and what needs packages that may be missing.
        if ".jail" in found.name or found.name.endswith((".__main__", "._C", ".harness")):
            continue
        if found.name.startswith("blockbatch_kernels.triton."):
            continue
        importlib.import_module(found.name)
from blockbatch import devices, memory
model = blockbatch.load_model("tiny", device="cpu")
for method in blockbatch.METHODS:
    print(len(blockbatch.generate(model, "a = 3", blockbatch.DecodeConfig(method, gen_length=16)).canvas))
print(devices.free_bytes(model.device) == 2**40)
from blockbatch import sandbox
try:
    sandbox.run_python("pass", seconds=1, memory_bytes=1 << 28, accept_weaker=True)
except sandbox.SandboxError as error:
    print(error)
from blockbatch.cli import main
print(main(["compare", "--device", "cpu", "--family", "code", "--count", "1", "--gen-length", "16",
            "--methods", "blockbatch", "--json", "compare.json"]))
print(main(["eval", "--device", "cpu", "--tasks", "arithmetic", "--limit", "1", "--gen-length", "16",
            "--methods", "blockbatch", "--out", "out"]))
print(main(["eval", "--device", "cpu", "--tasks", "code", "--limit", "1", "--run-code", "--out", "code"]))
"""


def test_a_system_without_what_is_of_unix_alone(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN + EVERYTHING], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[:6] == ["16"] * len(blockbatch.METHODS) + ["True"]
    assert lines[6].startswith("generated code cannot be run on this system: ")
    assert (tmp_path / "compare.json").exists() and (tmp_path / "out" / "results.jsonl").exists()
    assert lines[-1] == "2", "an evaluation that has to run code is refused"
    assert done.stderr.splitlines()[-1].startswith("blockbatch: error: generated code cannot be run")
    assert "Traceback" not in done.stderr


def test_memory_that_windows_tells(monkeypatch):
    class Kernel:
        @staticmethod
        def GlobalMemoryStatusEx(reference):
            status = reference._obj
            assert status.length == 64
            status.available = 10 << 30
            return 1

    def nothing(*args, **options):
        raise FileNotFoundError

    monkeypatch.setattr(devices, "open", nothing, raising=False)
    monkeypatch.delattr(devices.os, "sysconf")
    windll = type("windll", (), {"kernel32": Kernel})
    monkeypatch.setattr(devices.ctypes, "windll", windll, raising=False)
    assert devices.free_bytes(torch.device("cpu")) == int(0.9 * (10 << 30))


@pytest.mark.parametrize("pages", [-1, 0, OSError(), ValueError()], ids=repr)
def test_systems_that_do_not_tell(monkeypatch, pages):
    def sysconf(name):
        if isinstance(pages, Exception):
            raise pages
        return pages

    def nothing(*args, **options):
        raise FileNotFoundError

    monkeypatch.setattr(devices, "open", nothing, raising=False)
    monkeypatch.setattr(devices.os, "sysconf", sysconf)
    assert devices.free_bytes(torch.device("cpu")) == 2**40


class Cycle:
    """Something that only a cycle of references holds, once it is forgotten."""

    def __init__(self, held=None):
        self.itself, self.held = self, held


def test_memory_that_cycles_hold_is_given_back(monkeypatch):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    gc.disable()
    try:
        for device, is_held in (("cpu", True), ("cuda", False)):
            forgotten = weakref.ref(Cycle())
            devices.reclaim(torch.device(device))
            assert (forgotten() is not None) == is_held
    finally:
        gc.enable()


@pytest.mark.gpu
def test_closed_engines_leave_room_for_the_next():
    """Each takes more than a third of what the process may take, and is held by nothing but a cycle."""
    model = blockbatch.load_model("tiny", device="cuda")
    torch.cuda.empty_cache()
    room, total = 2 << 30, torch.cuda.get_device_properties(0).total_memory
    sizes = {name: getattr(model.spec, name) for name in ("num_layers", "num_kv_heads", "head_dim")}
    page = blockbatch.kv_cache.cache_bytes(1, 16, **sizes, dtype=model.kv_dtype)
    options = dict(cache_tokens=int(0.4 * room) // page * 16, max_requests=2)
    config = blockbatch.DecodeConfig(method="dual_cache", gen_length=8, block_size=4)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)
    gc.disable()
    try:
        for _ in range(4):
            engine = Engine(model, **options)
            engine.submit([1, 2, 3], config)
            engine.run_until_idle()
            engine.close()
            Cycle(engine)
    finally:
        gc.enable()
        torch.cuda.set_per_process_memory_fraction(1.0)
