"""Runs the scripts of bench/ as a user does, in their smallest form on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = {"command", "date", "dtype", "backend", "device", "threads", "python", "torch"}


def run(script, out, *arguments):
    start(script, "--device", "cpu", "--out", str(out), *arguments)
    report = json.loads(out.read_text())
    assert HEADER <= set(report)
    return report


def start(script, *arguments):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    finished = subprocess.run(
        [sys.executable, str(ROOT / "bench" / script), *arguments],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
