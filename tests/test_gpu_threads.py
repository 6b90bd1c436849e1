"""Several threads, streams and devices on GPUs, and a GPU that is nearly full."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import blockbatch
from blockbatch import devices, generation, memory, tiny
from blockbatch.cli import main
from blockbatch.decoding.graphs import StepGraphs

pytestmark = pytest.mark.gpu
THREADS = 4


@pytest.fixture(scope="module")
def second():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    assert torch.cuda.current_device() == 0
    return torch.device("cuda", 1)


def load(device="cuda"):
    return blockbatch.load_model("tiny", device=device, dtype="float32")


def prompts(count):
    families = [tiny.generate_problems(family, "test", count, 5) for family in ("arithmetic", "symbolic")]
    return [problem.prompt for pair in zip(*families) for problem in pair][:count]


CONFIGS = [
    blockbatch.DecodeConfig(gen_length=128),
    blockbatch.DecodeConfig("dual_cache", gen_length=64, drafts=(1, 2), refresh_scope="generation"),
    blockbatch.DecodeConfig("prefix_cache", gen_length=64),
    blockbatch.DecodeConfig("vanilla", gen_length=32, steps=8),
]


def outcome(result):
    return result.canvas, result.nfe, result.branches, result.stop_reason


def run_all(function, count=THREADS):
    """Runs `function(number)` in threads that begin together; raises what any of them raises."""
    begin = threading.Barrier(count)

    def work(number):
        begin.wait(60)
        return function(number)

    with ThreadPoolExecutor(count) as pool:
        return [task.result(300) for task in [pool.submit(work, number) for number in range(count)]]


@pytest.fixture(scope="module")
def alone():
    """What one thread gives, by configuration and prompt."""
    model = load()
    return {
        (number, prompt): outcome(blockbatch.generate(model, prompt, config))
        for number, config in enumerate(CONFIGS)
        for prompt in prompts(6)
    }


@pytest.mark.parametrize("streams", [False, True], ids=["one stream", "streams"])
@pytest.mark.parametrize("kind", ["same", "mixed"])
def test_threads_give_what_one_thread_gives(alone, streams, kind):
    """On a model that no graph was captured for: all threads want to capture at once."""
    model = load()

    def decode(thread):
        stream = torch.cuda.Stream() if streams else torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            found = {}
            for number, config in enumerate(CONFIGS[:1] if kind == "same" else CONFIGS):
                for prompt in prompts(6)[thread % 2 :]:
                    found[number, prompt] = outcome(blockbatch.generate(model, prompt, config))
            return found

    for found in run_all(decode):
        assert found and all(alone[key] == result for key, result in found.items())
    assert StepGraphs.possible(model)


def test_streams_of_text_in_threads(alone):
    model, config = load(), CONFIGS[0]
    texts = run_all(lambda thread: "".join(blockbatch.stream(model, prompts(6)[thread], config)))
    for prompt, text in zip(prompts(6), texts):
        assert text == blockbatch.generate(model, prompt, config).text


def test_two_models_of_one_gpu_in_threads(alone):
    models = [load(), load()]

    def decode(thread):
        return [outcome(blockbatch.generate(models[thread % 2], prompt, CONFIGS[0])) for prompt in prompts(6)]

    for found in run_all(decode):
        assert found == [alone[0, prompt] for prompt in prompts(6)]


def test_a_runner_on_another_stream(alone):
    """Buffers and graphs of one stream serve the next decode on another."""
    model = load()
    for _ in range(3):
        for prompt in prompts(6):
            with torch.cuda.stream(torch.cuda.Stream()):
                assert outcome(blockbatch.generate(model, prompt, CONFIGS[0])) == alone[0, prompt]


def test_a_session_whose_stream_changes_from_step_to_step(alone):
    model = load()
    for prompt in prompts(2):
        ids = model.tokenizer.encode(prompt)
        session = generation.open_session(model, ids, CONFIGS[0])
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        for number in range(10_000):
            with torch.cuda.stream(streams[number % 2]):
                if session.step() is None:
                    break
        assert outcome(generation.build_result(model, session, 0)) == alone[0, prompt]


def test_another_thread_allocates_and_waits_while_steps_are_captured(alone):
    model, ends = load(), threading.Event()

    def disturb():
        size = 1
        while not ends.is_set():
            held = torch.empty(size << 16, device="cuda")
            pinned = torch.empty(size, pin_memory=True)
            held[:1].copy_(pinned[:1], non_blocking=True)
            torch.cuda.current_stream().synchronize()
            size = size % 300 + 7

    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(disturb)
        try:
            found = [outcome(blockbatch.generate(model, prompt, CONFIGS[0])) for prompt in prompts(6)]
        finally:
            ends.set()
        task.result(60)
    assert found == [alone[0, prompt] for prompt in prompts(6)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.method)
def test_no_decode_takes_more_than_it_is_said_to_need(config):
    model = load()
    some = prompts(24) * 4
    ids = [model.tokenizer.encode(prompt) for prompt in some]
    needed = memory.needs(model, config, len(ids), max(map(len, ids)))
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    generation._session(model, ids, config).run()
    peak = torch.cuda.max_memory_allocated() - before
    assert needed.cache < peak <= sum(needed)


@pytest.fixture
def fill():
    """Takes the GPU's memory but for so many bytes; gives it back at the end."""
    held = []

    def leave(size):
        gc.collect()
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        held.append(torch.empty(free - size, dtype=torch.uint8, device="cuda"))

    def release():
        # Torch would keep the memory and cut what comes next out of it: it could never go back in one piece.
        held.clear()
        gc.collect()
        torch.cuda.empty_cache()

    yield leave, release
    release()


SAID = r"free memory of cuda:0: expected at least [\d,]+ bytes for .*, got [\d,]+"


def test_a_nearly_full_gpu_is_told_before_any_work(fill, alone, monkeypatch):
    leave, release = fill
    model, prompt = load(), prompts(1)[0]
    config = CONFIGS[0]
    leave(24 << 20)
    ran = []
    original = model.predict
    monkeypatch.setattr(model, "predict", lambda *args: ran.append(1) or original(*args))
    for call in (
        lambda: blockbatch.generate(model, prompt, config),
        lambda: blockbatch.generate(model, [prompt, "x"], config),
        lambda: blockbatch.stream(model, prompt, config),
    ):
        with pytest.raises(MemoryError, match=SAID):
            call()
    assert not ran
    with pytest.raises(MemoryError, match="the weights of tiny|K/V cache|a forward"):
        leave(4 << 20)
        load()
    release()
    assert outcome(blockbatch.generate(model, prompt, config)) == alone[0, prompt]


def test_memory_that_the_process_may_not_have(alone):
    model, prompt = load(), prompts(1)[0]
    total = torch.cuda.get_device_properties(0).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    if not hasattr(torch.cuda, "get_per_process_memory_fraction"):
        pytest.skip("this torch does not tell the fraction")
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (8 << 20)) / total)
    try:
        with pytest.raises(MemoryError, match=SAID):
            blockbatch.generate(model, prompt, CONFIGS[0])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert outcome(blockbatch.generate(model, prompt, CONFIGS[0])) == alone[0, prompt]


def test_memory_that_goes_while_a_decode_runs(fill, alone, monkeypatch):
    """What was counted is not there any more: still one clear error, and the model stays usable."""
    leave, release = fill
    model, prompt = load(), prompts(1)[0]
    monkeypatch.setattr(memory, "free_bytes", lambda model: 2**60)
    leave(4 << 20)
    with pytest.raises(MemoryError, match="free memory of cuda:0: expected room for .*, got"):
        blockbatch.generate(model, prompt, CONFIGS[0])
    release()
    monkeypatch.undo()
    assert outcome(blockbatch.generate(model, prompt, CONFIGS[0])) == alone[0, prompt]


def test_as_many_prompts_as_fit_beside_idle_batches(fill):
    leave, release = fill
    model, some = load(), prompts(12)
    expected = [result.canvas for result in blockbatch.generate(model, some, CONFIGS[0])]
    model = load()
    for prompt in some[:3]:
        blockbatch.generate(model, [prompt] * 2, CONFIGS[0])  # batches that wait in the pool
    leave(int(1.5 * sum(memory.needs(model, CONFIGS[0], 3, 64))))
    assert [result.canvas for result in blockbatch.generate(model, some, CONFIGS[0])] == expected


class TestASecondDevice:
    """A model on a GPU that is not the current one."""

    def test_load_generate_stream_and_logits(self, second, alone):
        before = torch.cuda.memory_allocated(0)
        model = load("cuda:1")
        assert model.device == second
        for number, config in enumerate(CONFIGS):
            for prompt in prompts(6):
                assert outcome(blockbatch.generate(model, prompt, config)) == alone[number, prompt]
        text = "".join(blockbatch.stream(model, prompts(1)[0], CONFIGS[0]))
        assert text == blockbatch.generate(model, prompts(1)[0], CONFIGS[0]).text
        assert model.logits([[1, 2, 3]]).device == second
        assert torch.cuda.current_device() == 0 and torch.cuda.memory_allocated(0) == before

    def test_traces_and_stops(self, second):
        config = blockbatch.DecodeConfig(gen_length=64, trace=True, trace_kv=True, stop="\n")
        found, expected = (
            blockbatch.generate(load(device), prompts(2), config) for device in ("cuda:1", "cuda:0")
        )
        assert list(map(outcome, found)) == list(map(outcome, expected))

    def test_compare_eval_and_generate(self, second, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        device = ["--device", "cuda:1", "--gen-length", "32"]
        assert main(["generate", "--prompt", "a = 3", *device, "--json", "--trace", "trace.json"]) == 0
        assert main(["compare", "--family", "symbolic", "--count", "1", *device, "--json", "c.json"]) == 0
        assert main(["eval", "--tasks", "symbolic", "--limit", "1", *device, "--out", "out"]) == 0

    def test_both_devices_in_threads(self, second, alone):
        models = [load("cuda:0"), load("cuda:1")]

        def decode(thread):
            model = models[thread % 2]
            return [outcome(blockbatch.generate(model, prompt, CONFIGS[0])) for prompt in prompts(6)]

        for found in run_all(decode):
            assert found == [alone[0, prompt] for prompt in prompts(6)]

    def test_the_first_capture_of_the_process_is_on_it(self, second):
        """In a process of its own: nothing of the first device is touched."""
        import subprocess
        import sys

        code = (
            "import torch, blockbatch\n"
            "model = blockbatch.load_model('tiny', device='cuda:1')\n"
            "blockbatch.generate(model, 'a = 3', blockbatch.DecodeConfig(gen_length=64))\n"
            "print(torch.cuda.memory_reserved(0), torch.cuda.current_device())\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.split() == ["0", "0"]


def test_a_device_that_is_not_there():
    count = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"device: expected cuda:0.*, got 'cuda:{count}'"):
        load(f"cuda:{count}")
    assert load(0).device == torch.device("cuda", 0)
    assert devices.free_bytes(torch.device("cuda", 0)) > 0
