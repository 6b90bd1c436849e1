"""Triton's interpreter: whether kernels are interpreted is settled when they are defined, so tests of it run
in a process of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blockbatch_kernels import triton

in_interpreter = pytest.mark.skipif(not triton.interpreted(), reason="runs in a process of the interpreter")
DEVICE = "cpu" if triton.interpreted() else "cuda"


def run_in_the_interpreter(file, *options):
    """Runs the tests of `file` but those for a GPU, in a process where Triton interprets its kernels."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    if triton.interpreted():
        pytest.skip("this is that process")
    arguments = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not gpu",
        file,
        *options,
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def interpreted_checks(script):
    """What a script of tests/ prints as JSON, in a process where Triton interprets its kernels.

    Without `BBK_CHECK=1`: the scripts also try capacities that are too small.
    """
    pytest.importorskip("triton")
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), *(path for path in sys.path if path)])
    done = subprocess.run(
        [sys.executable, str(tests / script)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "BBK_CHECK": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
