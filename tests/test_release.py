"""What a release needs: one version, and archives from which the demo runs, without the checkout."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import blockbatch

ROOT = Path(__file__).parents[1]
HOOKS = "from setuptools import build_meta; print(build_meta.build_{}({!r}))"


def test_the_version_is_the_same_everywhere():
    version = blockbatch.__version__
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def hook(kind, folder, tree):
    """Runs a hook of the build backend, as `python -m build` and pip do."""
    finished = subprocess.run(
        [sys.executable, "-c", HOOKS.format(kind, str(folder))],
        cwd=tree,
        env={**os.environ, "BBK_BUILD_CUDA": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return folder / finished.stdout.split()[-1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder into which the wheel was installed that the source archive gives."""
    folder = tmp_path_factory.mktemp("release")
    tree = folder / "checkout"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    wanted = re.compile(r"(csrc|python|blockbatch_kernels)/|[^/]+$")
    for name in filter(wanted.match, filter(None, listed.stdout.split("\0"))):
        if (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    archive = hook("sdist", folder, tree)
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data") if sys.version_info >= (3, 12) else opened.extractall(folder)
    source = folder / archive.name.removesuffix(".tar.gz")
    for name in ("CHANGELOG.md", "CITATION.cff", "csrc", "LICENSE"):
        assert (source / name).exists(), name
    wheel = hook("wheel", folder, source)
    assert wheel.name.endswith("-py3-none-any.whl")
    place = folder / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(place),
    ]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True, timeout=300)
    return place


def test_the_demo_runs_from_the_wheel(installed, tmp_path):
    environ = {**os.environ, "PYTHONPATH": str(installed), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "blockbatch"]
    where = "import blockbatch, blockbatch_kernels as bbk; print(blockbatch.__file__, bbk.__file__)"
    names = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True
    )
    assert all(Path(name).is_relative_to(installed) for name in names.stdout.split())
    for model in ("tiny", "tiny-block"):
        arguments = [
            "compare",
            "--model",
            model,
            "--family",
            "symbolic",
            "--count",
            "1",
            "--gen-length",
            "32",
        ]
        methods = ["--methods", "blockbatch", "--preset", "fast"] if model == "tiny" else []
        done = subprocess.run(
            [*command, *arguments, *methods],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(model) and "Try next" in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_a_cuda_wheel_for_each_python_that_is_there(tmp_path):
    stub = tmp_path / "python3.98"
    stub.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "$BBK_BUILD_CUDA $*" >> "$0.calls"\n')
    stub.chmod(0o755)
    command = ["make", "-s", "cuda-wheels", f"PYTHONS=python3.97 {stub}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "python3.97: not here, passed over\n"
    assert (tmp_path / "python3.98.calls").read_text() == "1 -m pip wheel --no-deps --wheel-dir dist .\n"
    stub.write_text('#!/bin/sh\n[ "$1" = -c ]\n')  # its build fails
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60).returncode != 0
