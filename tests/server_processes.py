"""Servers as processes, and what they say in their log."""

import contextlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

from command_runs import ROOT
from serving_fakes import get, until

TESTS = Path(__file__).parent


@contextlib.contextmanager
def process(*command):
    """A server's process, ready to answer; its `log` is what it has said so far, as JSON."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "python", TESTS)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True, env=environment)
    log = []

    def read():
        for line in run.stderr:
            with contextlib.suppress(ValueError):
                log.append(json.loads(line))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        ports = []
        until(lambda: ports.extend(_ports(log)) or ports or run.poll() is not None, seconds=120)
        port = ports[0]
        server = SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, run=run, log=log, reader=reader)
        until(lambda: get(server, "/health").status_code == 200, seconds=120)
        yield server
    finally:
        run.kill()
        run.wait()


def _ports(log):
    return [line["port"] for line in log if line["event"] == "listening"]
