"""Clients for locust: `locust -f tests/locust_clients.py --headless --host URL`. Each checks every answer.

LOCUST_ANSWERS names a file of JSON: prompts, each with its text. After LOCUST_REQUESTS answers they stop.
"""

import json
import os
import random
import threading
import time

import gevent
from locust import HttpUser, constant, task

with open(os.environ["LOCUST_ANSWERS"]) as _file:
    ANSWERS = list(json.load(_file).items())
_left, _lock = [int(os.environ["LOCUST_REQUESTS"])], threading.Lock()


class Client(HttpUser):
    """Asks for chats and completions, whole and streamed; comes again where it is told to."""

    wait_time = constant(0)

    @task(2)
    def chat(self):
        self._ask("/v1/chat/completions", lambda prompt: {"messages": [{"role": "user", "content": prompt}]})

    @task(1)
    def completion(self):
        self._ask("/v1/completions", lambda prompt: {"prompt": prompt})

    def _ask(self, path, body):
        prompt, expected = random.choice(ANSWERS)
        streamed = random.random() < 0.6
        sent = {
            **body(prompt),
            "max_tokens": 64,
            "stream": streamed,
            "logprobs": random.choice((None, False)),
        }
        name = f"{path} {'streamed' if streamed else 'whole'}"
        with self.client.post(path, json=sent, name=name, stream=streamed, catch_response=True) as answer:
            if answer.status_code == 503 and answer.headers.get("Retry-After"):
                answer.success()
                time.sleep(float(answer.headers["Retry-After"]))
                return
            if answer.status_code != 200:
                answer.failure(f"{answer.status_code} {answer.text[:200]}")
                return
            text, whole = self._read(answer, streamed)
            if whole and text == expected:
                answer.success()
            else:
                answer.failure(f"expected {expected!r}, got {text!r}, whole: {whole}")
        with _lock:
            _left[0] -= 1
            if _left[0] == 0:
                gevent.spawn(self.environment.runner.quit)  # which waits for this client, too

    @staticmethod
    def _read(answer, streamed):
        """The text, and whether it came to its end."""
        if not streamed:
            choice = answer.json()["choices"][0]
            return choice.get("text") or choice.get("message", {}).get("content"), True
        text, whole = "", False
        for line in answer.iter_lines():
            content = line.decode().removeprefix("data: ")
            whole = content == "[DONE]" or whole
            if content and not whole:
                choice = json.loads(content)["choices"][0]
                text += choice.get("text") or choice.get("delta", {}).get("content") or ""
        return text, whole
