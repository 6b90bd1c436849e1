"""What takes minutes: generated requests against the schema, thousands of requests, lm_eval as a client."""

import gc
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import blockbatch
import picture_traces
from blockbatch.decoding.engine import Engine
from serving_fakes import HTTP, ScriptedEngine, ask, serving, until

pytestmark = pytest.mark.skipif(
    os.environ.get("BLOCKBATCH_LONG_TESTS") != "1", reason="takes minutes; make test-serve runs it"
)
CHAT = "/v1/chat/completions"
SCHEMATHESIS = shutil.which(
    "schemathesis", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
)
LOCAL_TASK = Path(__file__).parent / "data" / "lm_eval"


@pytest.fixture(scope="module")
def model():
    return blockbatch.load_model("tiny", device="cpu")


@pytest.mark.skipif(SCHEMATHESIS is None, reason="needs schemathesis")
@pytest.mark.parametrize("key", [None, "secret"])
def test_the_schema_holds(model, key, tmp_path):
    """No answer but those that the schema tells, and no 5xx.

    That a body fits the schema does not make its prompt fit the model: such refusals are no failures.
    """
    with serving(model, ScriptedEngine(model, pace=50, max_queue=1000), api_key=key) as server:
        command = [
            SCHEMATHESIS, "run", server.url + "/openapi.json", "--seed", "18", "--max-examples", "40",
            "--checks", "all", "--exclude-checks", "positive_data_acceptance", "--phases", "coverage,fuzzing",
        ]  # fmt: skip
        if key:
            command += ["--header", f"Authorization: Bearer {key}"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-8000:]


def _handles():
    return len(os.listdir("/proc/self/fd"))


def _resident():
    """MiB of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs /proc")
def test_thousands_of_requests_leave_nothing_behind(model):
    """Of all kinds: whole, streamed, refused, left by their client."""
    engine = ScriptedEngine(model, "a b c d e f", pace=3, max_requests=8, max_queue=64)

    def client(seed, count):
        draw = random.Random(seed)
        for _ in range(count):
            kind = draw.choice(["whole", "stream", "bad", "leave"])
            body = ask(max_tokens=draw.randrange(1, 64), stream=kind in ("stream", "leave"))
            if kind == "bad":
                body["n"] = 3
            with HTTP.stream("POST", server.url + CHAT, json=body) as answer:
                assert answer.status_code == (400 if kind == "bad" else 200)
                if kind != "leave":
                    answer.read()
        with lock:
            engine.requests[:] = [request for request in engine.requests if not request.ended]

    def run(count, seeds):
        threads = [threading.Thread(target=client, args=(seed, count)) for seed in seeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        until(lambda: server.service.in_flight == 0 and not engine.running())
        gc.collect()
        return _handles(), _resident(), len(gc.get_objects()), threading.active_count()

    lock = threading.Lock()
    with serving(model, engine) as server:
        run(250, range(4))
        before = run(250, range(4, 8))
        for start in range(8, 40, 4):
            after = run(312, range(start, start + 4))
        handles, resident, objects, threads = (later - earlier for later, earlier in zip(after, before))
        assert handles <= 4 and threads <= 1, (before, after)
        assert resident < 16 and objects < 5000, (before, after)
        text = HTTP.get(server.url + "/metrics").text
    counts = [
        float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:request_success")
    ]
    assert sum(counts) > 6000


def test_hundreds_of_decodes_leave_the_cache_empty(model):
    """The engine itself behind the server, its clients leaving at random."""
    engine = Engine(model, max_requests=8, max_queue=64)
    config = {"method": "dual_cache", "refresh_scope": "generation", "eos_exit": "prefix"}
    prompts = [picture_traces.problem(kind, 3).prompt for kind in ("arithmetic", "code", "symbolic")]

    def client(seed):
        draw = random.Random(seed)
        for _ in range(40):
            body = ask(draw.choice(prompts), max_tokens=32, stream=True, blockbatch=config)
            with HTTP.stream("POST", server.url + CHAT, json=body) as answer:
                assert answer.status_code == 200
                if draw.random() < 0.7:
                    assert answer.read().endswith(b"data: [DONE]\n\n")

    with serving(model, engine) as server:
        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        until(lambda: engine.stats().running == engine.stats().waiting == 0)
        stats = engine.stats()
        assert stats.cache_usage == 0 and stats.failed == 0
        assert stats.finished + stats.cancelled == 320 and stats.finished >= 200


def test_lm_eval_as_a_client(model, monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("tenacity", reason="needs pip install 'lm_eval[api]'")
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(LOCAL_TASK)
    tasks = TaskManager(include_path=str(LOCAL_TASK), include_defaults=False)
    options = {"gen_length": 64, "block_sizes": (4, 16, 64)}
    expected = blockbatch.DecodeConfig(**options, stop=("Question:", "</s>"))
    with serving(model, Engine(model, max_requests=4), options=options) as server:
        results = lm_eval.simple_evaluate(
            "local-chat-completions",
            model_args={
                "base_url": server.url + CHAT, "model": "tiny", "num_concurrent": 4, "max_gen_toks": 64,
                "tokenizer_backend": None,
            },
            tasks=["local_arithmetic"], task_manager=tasks, bootstrap_iters=0, apply_chat_template=True,
        )  # fmt: skip
    samples = results["samples"]["local_arithmetic"]
    for sample in samples:
        alone = blockbatch.generate(model, sample["doc"]["question"], expected)
        assert sample["resps"][0][0] == alone.text
    assert len(samples) == 4 and results["results"]["local_arithmetic"]["exact_match,answer"] > 0
