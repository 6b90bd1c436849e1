"""Locust's clients against the server: more of them than it runs or queues, every answer checked."""

import csv
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

import blockbatch
import picture_traces
from server_processes import TESTS, process
from serving_fakes import get

REQUESTS, USERS = 60, 12
SETTINGS = {"method": "dual_cache", "eos_exit": "prefix", "threshold": 0.9}

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("BLOCKBATCH_LONG_TESTS") != "1", reason="takes minutes; make test-serve runs it"
    ),
    pytest.mark.skipif(find_spec("locust") is None, reason="needs locust"),
]


def counted(text, name):
    lines = [line for line in text.splitlines() if line.startswith(name)]
    return sum(float(line.split()[-1]) for line in lines)


def test_more_clients_than_there_is_room_for(tmp_path):
    model = blockbatch.load_model("tiny", device="cpu")
    config, answers = blockbatch.DecodeConfig(**SETTINGS, gen_length=64), {}
    for number in range(6):
        prompt = picture_traces.problem(("arithmetic", "code", "symbolic")[number % 3], number).prompt
        answers[prompt] = blockbatch.generate(model, prompt, config).text
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    environment = {
        **os.environ, "LOCUST_ANSWERS": str(tmp_path / "answers.json"), "LOCUST_REQUESTS": str(REQUESTS),
        "NO_PROXY": "*",
    }  # fmt: skip
    with process("-m", "blockbatch", "serve", "tiny", "--device", "cpu", "--port", "0", "--max-requests", "4",
                 "--max-queue", "6", *options) as server:  # fmt: skip
        ran = subprocess.run(
            [sys.executable, "-m", "locust", "-f", str(TESTS / "locust_clients.py"), "--headless", "--host",
             server.url, "-u", str(USERS), "-r", str(USERS), "-t", "300s", "--stop-timeout", "120", "--csv",
             str(tmp_path / "load"), "--only-summary"],
            env=environment, capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        metrics = get(server, "/metrics").text
    assert ran.returncode == 0, ran.stderr[-3000:]
    with open(tmp_path / "load_stats.csv") as file:
        rows = {row["Name"]: row for row in csv.DictReader(file)}
    total = rows["Aggregated"]
    assert int(total["Failure Count"]) == 0 and int(total["Request Count"]) >= REQUESTS
    assert len(rows) == 5  # chats and completions, whole and streamed, and their sum
    # Locust and the server count alike, but for what ended while locust did; some were told to come again.
    turned_away = counted(metrics, 'blockbatch:http_answers_total{engine="0",model_name="tiny",status="503"')
    ended = counted(metrics, "vllm:request_success_total{")
    assert turned_away > 0 and 0 <= ended + turned_away - int(total["Request Count"]) <= USERS
    assert counted(metrics, 'vllm:request_success_total{engine="0",finished_reason="error"') == 0
    assert (
        counted(metrics, "vllm:num_requests_running{") == counted(metrics, "vllm:num_requests_waiting{") == 0
    )
