"""What setup.py decides about the extension, what a wheel holds, and what importing the packages touches."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = "blockbatch: CUDA extension skipped:"


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory):
    """A copy of what a build reads, so that no build writes into the checkout."""
    tree = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    leave_out = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("csrc", "blockbatch_kernels", "python"):
        shutil.copytree(ROOT / name, tree / name, ignore=leave_out)
    return tree


@pytest.fixture
def setup_py(source_tree, tmp_path):
    """Runs setup.py with exactly the given build variables; nothing but `path` is on PATH."""

    def run(*arguments, path="", **variables):
        environ = {name: value for name, value in os.environ.items() if not name.startswith("BBK_")}
        for name in ("CUDACXX", "CUDA_HOME", "CUDA_VISIBLE_DEVICES"):
            environ.pop(name, None)
        environ |= {"PATH": str(path), **variables}
        return subprocess.run(
            [sys.executable, "setup.py", *arguments],
            cwd=source_tree,
            env=environ,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture
def build_ext(setup_py, tmp_path):
    def run(**options):
        return setup_py(
            "-q", "build_ext", "-b", str(tmp_path / "lib"), "-t", str(tmp_path / "temp"), **options
        )

    return run


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("variables", [{}, {"BBK_BUILD_CUDA": "auto"}], ids=["unset", "auto"])
def test_without_nvcc_one_line_says_that_the_extension_is_skipped(build_ext, tmp_path, variables):
    result = build_ext(**variables)
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if SKIPPED in line]
    assert len(lines) == 1 and "nvcc was not found" in lines[0]
    assert not list(tmp_path.rglob("_C*"))


def test_zero_skips_even_with_nvcc(build_ext, tmp_path):
    script(tmp_path / "bin" / "nvcc", "exit 1")
    result = build_ext(path=tmp_path / "bin", BBK_BUILD_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert f"{SKIPPED} BBK_BUILD_CUDA=0" in result.stdout


def gpu(tmp_path, answer="echo 'GPU 0: of a test'"):
    """A folder whose nvidia-smi names a GPU."""
    script(tmp_path / "gpu" / "nvidia-smi", answer)
    return tmp_path / "gpu"


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_without_a_gpu_one_line_says_that_the_extension_is_skipped(build_ext, tmp_path, hidden):
    nvcc = script(tmp_path / "bin" / "nvcc", "exit 1")
    result = build_ext(
        path=f"{nvcc.parent}{os.pathsep}{gpu(tmp_path)}{os.pathsep}{os.environ['PATH']}",
        CUDA_VISIBLE_DEVICES=hidden,
    )
    assert result.returncode == 0, result.stderr
    (line,) = (line for line in result.stdout.splitlines() if SKIPPED in line)
    assert "there is no GPU here" in line and "BBK_BUILD_CUDA=1" in line
    assert not list(tmp_path.rglob("_C*"))


@pytest.mark.parametrize("answer", ["exit 9", "echo 'No devices found.'"])
def test_a_driver_that_names_no_gpu(tmp_path, monkeypatch, answer):
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: iter(()))  # of /dev
    setup = runpy.run_path(str(ROOT / "setup.py"))
    for said, expected in ((answer, False), ("echo 'GPU 0: of a test'", True)):
        path = f"{gpu(tmp_path, said)}{os.pathsep}{os.environ['PATH']}"
        assert setup["has_gpu"]({"PATH": path}) is expected
        assert setup["has_gpu"]({"PATH": path, "CUDA_VISIBLE_DEVICES": ""}) is False


FAILING = [
    {"BBK_BUILD_CUDA": "1", "CUDA_VISIBLE_DEVICES": ""},  # forced, without a GPU
    {"BBK_CUDA_ARCHS": "90a", "CUDA_VISIBLE_DEVICES": ""},  # wanted
    {},  # with a GPU
]


@pytest.mark.parametrize("variables", FAILING, ids=["forced", "architectures", "GPU"])
def test_a_build_that_cannot_be_names_how_to_do_without(build_ext, tmp_path, variables):
    nvcc = script(tmp_path / "cuda" / "bin" / "nvcc", "exit 1")
    result = build_ext(
        path=f"{gpu(tmp_path)}{os.pathsep}{os.environ['PATH']}", CUDACXX=str(nvcc), **variables
    )
    assert result.returncode == 1 and SKIPPED not in result.stdout
    last = result.stderr.splitlines()[-1]
    assert last.startswith("blockbatch: building the CUDA extension failed")
    assert "BBK_BUILD_CUDA=0" in last
    assert "blockbatch: compiling the CUDA extension for" in result.stdout and "minutes" in result.stdout


def test_a_build_shows_how_far_it_is(tmp_path, capfd):
    setup = runpy.run_path(str(ROOT / "setup.py"))
    tool = script(tmp_path / "tool", "echo '[1/2] one'; echo other; echo '[2/2] two'; exit ${1:-0}")
    setup["run"].__globals__["PROGRESS_SECONDS"] = 0
    setup["run"]([str(tool)], progress="compiling")
    out = capfd.readouterr().out
    assert re.findall(r"blockbatch: compiling: (\d/\d) after \d+ s", out) == ["1/2", "2/2"]
    assert "other\n" in out, "the log is whole"
    assert setup["duration"](62.4) == "1 min 2 s"
    with pytest.raises(SystemExit, match="exit status 3.*BBK_BUILD_CUDA=0"):
        setup["run"]([str(tool), "3"])


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"BBK_BUILD_CUDA": "1"}, "BBK_BUILD_CUDA=1, but nvcc was not found"),
        ({"BBK_BUILD_CUDA": "yes"}, "BBK_BUILD_CUDA: expected 0, 1 or auto, got 'yes'"),
        ({"BBK_BUILD_CUDA": ""}, "BBK_BUILD_CUDA: expected 0, 1 or auto, got ''"),
        ({"CUDACXX": "/nowhere/nvcc"}, "CUDACXX: expected an executable nvcc, got '/nowhere/nvcc'"),
    ],
)
def test_wrong_variables_end_the_build_with_one_line(build_ext, variables, message):
    result = build_ext(**variables)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(f"blockbatch: {message}")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("archs", ["", "sm_90", "80,90a", "80;", "90a;../x"])
def test_wrong_architectures_end_the_build(build_ext, tmp_path, archs):
    nvcc = script(tmp_path / "bin" / "nvcc", "exit 1")
    result = build_ext(CUDACXX=str(nvcc), BBK_CUDA_ARCHS=archs)
    assert result.returncode == 1
    assert f"blockbatch: BBK_CUDA_ARCHS: expected a list such as '80;90a', got {archs!r}" in result.stderr


@pytest.mark.parametrize("where", ["PATH", "CUDACXX", "CUDA_HOME"])
def test_a_failing_compiler_fails_the_build(build_ext, tmp_path, where):
    nvcc = script(tmp_path / "cuda" / "bin" / "nvcc", "exit 1")
    path = os.environ["PATH"]
    variables = {"CUDACXX": str(nvcc)}
    if where == "CUDA_HOME":
        variables = {"CUDA_HOME": str(tmp_path / "cuda")}
    elif where == "PATH":
        variables, path = {}, f"{nvcc.parent}{os.pathsep}{path}"
    result = build_ext(path=path, BBK_BUILD_CUDA="1", **variables)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("blockbatch: building the CUDA extension failed")
    assert str(nvcc) in result.stdout + result.stderr
    assert SKIPPED not in result.stdout


def test_a_wheel_without_nvcc_holds_both_packages_and_is_pure(setup_py, source_tree, tmp_path):
    checkpoint = source_tree / "python" / "blockbatch" / "tiny" / "checkpoint"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "probe.safetensors").write_bytes(b"weights")
    result = setup_py(
        "-q", "bdist_wheel", "--bdist-dir", str(tmp_path / "temp"), "-d", str(tmp_path / "dist")
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(SKIPPED) == 1
    (wheel,) = (tmp_path / "dist").iterdir()
    assert wheel.name.startswith("blockbatch-") and wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "blockbatch = blockbatch.cli:main" in archive.read(entry_points).decode()
    sources = {
        str(path.relative_to(folder))
        for folder, package in ((source_tree, "blockbatch_kernels"), (source_tree / "python", "blockbatch"))
        for path in (folder / package).rglob("*.py")
    }
    assert sources <= names
    assert {
        "blockbatch/tiny/checkpoint/probe.safetensors",
        "blockbatch/tiny/checkpoint/tokenizer.json",
    } <= names
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "python/"))]


IMPORT = """
import sys
import torch
import {package}
loaded = sorted(sys.modules)
assert not torch.cuda.is_initialized()
heavy = [name for name in loaded if name.partition(".")[0] in {heavy}]
assert not heavy, heavy
assert "blockbatch_kernels._C" not in loaded
print({package}.__version__)
"""


@pytest.mark.parametrize("package", ["blockbatch_kernels", "blockbatch"])
def test_importing_touches_no_gpu_and_loads_nothing_heavy(package, tmp_path):
    # torch itself may have loaded these; only what comes beyond it counts.
    heavy = {"triton", "matplotlib", "transformers"}
    probe = "import sys, torch; print(*{name.partition('.')[0] for name in sys.modules})"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    python = [sys.executable, "-c"]
    by_torch = subprocess.run(
        [*python, probe], env=environ, capture_output=True, text=True, check=True
    ).stdout
    code = IMPORT.format(package=package, heavy=heavy - set(by_torch.split()))
    result = subprocess.run([*python, code], env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    version = result.stdout.strip()
    assert version and version == __import__("blockbatch_kernels").__version__
