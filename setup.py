"""Builds and installs the packages blockbatch_kernels and blockbatch.

The extension `blockbatch_kernels._C` (`csrc/`, built by CMake and ninja) is optional. Environment variables:

BBK_BUILD_CUDA  `auto` (default): build it where there are nvcc and a GPU, else skip it with one line.
                `1`: build it, with or without a GPU; without nvcc that is an error. `0`: do not build it.
BBK_CUDA_ARCHS  architectures to compile for, separated by `;` (default `80;90a`), each as in CMake's
                CUDA_ARCHITECTURES: `80` (machine code and PTX), `80-real`, `80-virtual`, `90a`. Whoever sets
                it wants the build: `auto` then asks for no GPU.
CUDACXX         the nvcc to use; else `$CUDA_HOME/bin/nvcc`, else the `nvcc` on PATH.
MAX_JOBS        limit of parallel compile jobs (default: ninja's own).
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80;90a"
OFF = "set BBK_BUILD_CUDA=0 to install without the extension"
NO_GPU = (
    "there is no GPU here (CUDA_VISIBLE_DEVICES, nvidia-smi and /dev name none). BBK_BUILD_CUDA=1 builds it "
    "all the same, which takes minutes"
)
NO_NVCC = "nvcc was not found, neither through CUDACXX or CUDA_HOME nor on PATH"
PROGRESS_SECONDS = 10
ARCH_PATTERN = re.compile(r"\d{2,3}a?(-real|-virtual)?")


class BuildError(SystemExit):
    """Ends the build with one line on stderr and exit status 1."""

    def __init__(self, message):
        super().__init__(f"blockbatch: {message}")


def find_nvcc(environ):
    """Path of nvcc, or None. A CUDACXX that does not exist is an error, not a reason to look further."""
    named = environ.get("CUDACXX")
    if named:
        found = shutil.which(named, path=environ.get("PATH", ""))
        if found is None:
            raise BuildError(f"CUDACXX: expected an executable nvcc, got {named!r}")
        return found
    if environ.get("CUDA_HOME"):
        found = shutil.which(os.path.join(environ["CUDA_HOME"], "bin", "nvcc"))
        if found is not None:
            return found
    return shutil.which("nvcc", path=environ.get("PATH", ""))


def has_gpu(environ):
    """Whether an NVIDIA GPU can be used here, as far as can be told without any library."""
    if environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1", "NoDevFiles"):
        return False
    # WSL has the GPU behind /dev/dxg, with nvidia-smi in a folder of its own.
    search = os.pathsep.join([environ.get("PATH", ""), "/usr/lib/wsl/lib"])
    found = shutil.which("nvidia-smi", path=search)
    if found is not None:
        try:
            listed = subprocess.run([found, "-L"], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            listed = None
        if listed is not None and listed.returncode == 0 and "GPU" in listed.stdout:
            return True
    return any(re.fullmatch(r"nvidia\d+", path.name) for path in Path("/dev").glob("nvidia*"))


def plan(environ):
    """What to do about the extension: `(nvcc, None)` to build it, `(None, reason)` to skip it."""
    wanted = environ.get("BBK_BUILD_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise BuildError(f"BBK_BUILD_CUDA: expected 0, 1 or auto, got {wanted!r}")
    if wanted == "0":
        return None, "BBK_BUILD_CUDA=0"
    nvcc = find_nvcc(environ)
    if nvcc is None and wanted == "1":
        raise BuildError(f"BBK_BUILD_CUDA=1, but {NO_NVCC}")
    if nvcc is None:
        return None, NO_NVCC
    if wanted == "auto" and "BBK_CUDA_ARCHS" not in environ and not has_gpu(environ):
        return None, NO_GPU
    return nvcc, None


def cuda_archs(environ):
    """The architectures to compile for, as the `;` list that CMake takes."""
    text = environ.get("BBK_CUDA_ARCHS", DEFAULT_ARCHS)
    archs = [arch.strip() for arch in text.split(";")]
    if not all(ARCH_PATTERN.fullmatch(arch) for arch in archs):
        raise BuildError(f"BBK_CUDA_ARCHS: expected a list such as {DEFAULT_ARCHS!r}, got {text!r}")
    return ";".join(archs)


def find_tool(name):
    # An environment's own bin folder is not on PATH when its python is called by path without activating it.
    search = os.environ.get("PATH", "") + os.pathsep + sysconfig.get_path("scripts")
    found = shutil.which(name, path=search)
    if found is None:
        raise BuildError(
            f"{name} is needed to build the CUDA extension: install it (pip install {name}), or {OFF}"
        )
    return found


def pybind11_dir():
    try:
        import pybind11
    except ImportError:
        raise BuildError(
            f"pybind11 is needed to build the CUDA extension: install it (pip install pybind11), or {OFF}"
        ) from None
    return pybind11.get_cmake_dir()


def tell(text):
    """A line for whoever waits: in the log, and on the terminal, since pip shows no log of a good build."""
    line = f"blockbatch: {text}"
    print(line, flush=True)
    if not sys.stdout.isatty():
        try:
            with open("/dev/tty", "w") as terminal:
                terminal.write(line + "\n")
        except OSError:
            pass  # nobody waits there


def run(command, progress=None):
    """Runs a tool with its output in the log; ends the build if it fails.

    progress: shown with the seconds so far for each line of ninja that says how much is done.
    """
    print("+", " ".join(command), flush=True)
    begun, told = time.monotonic(), 0.0
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    for line in process.stdout:
        print(line, end="", flush=True)
        done = re.match(r"\[(\d+/\d+)\]", line)
        if progress and done and time.monotonic() - told >= PROGRESS_SECONDS:
            told = time.monotonic()
            tell(f"{progress}: {done.group(1)} after {duration(told - begun)}")
    status = process.wait()
    if status:
        raise BuildError(
            f"building the CUDA extension failed (exit status {status}; the lines above say why): "
            f"{' '.join(command)}. Mend that, or {OFF}"
        )


def duration(seconds):
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s" if seconds >= 60 else f"{seconds:.0f} s"


class CMakeBuild(build_ext):
    """Builds the extension with CMake and ninja, or says in one line that it is skipped."""

    def run(self):
        self.nvcc, reason_to_skip = plan(os.environ)
        if reason_to_skip:
            tell(f"CUDA extension skipped: {reason_to_skip}")
        super().run()

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve() / "cmake"
        work.mkdir(parents=True, exist_ok=True)
        cmake, archs, begun = find_tool("cmake"), cuda_archs(os.environ), time.monotonic()
        tell(
            f"compiling the CUDA extension for {archs.replace(';', ', ')} with {self.nvcc}: some minutes for "
            f"each architecture ({OFF})"
        )
        # --fresh: a cache may name tools of an earlier, now deleted build environment, or another source
        # folder. Object files are kept, so an unchanged source is not compiled again.
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "CMAKE_CUDA_COMPILER": self.nvcc,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11_dir(),
            "BBK_CUDA_ARCHS": archs,
        }
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        run([cmake, "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(work), *definitions])
        jobs = os.environ.get("MAX_JOBS")
        run(
            [cmake, "--build", str(work), *(["--parallel", jobs] if jobs else [])],
            progress="compiling the CUDA extension",
        )
        tell(f"the CUDA extension took {duration(time.monotonic() - begun)}")
        if not target.exists():
            raise BuildError(f"the build ended without {target}")


class Build(build):
    # Without an extension setuptools would leave out build_ext, and with it the line that says so.
    sub_commands = [("build_py", None), ("build_ext", None)]


if __name__ == "__main__":
    nvcc, _ = plan(os.environ)
    setup(
        packages=find_packages(include=["blockbatch_kernels", "blockbatch_kernels.*"])
        + find_packages("python", include=["blockbatch", "blockbatch.*"]),
        package_dir={"blockbatch": "python/blockbatch"},
        package_data={
            "blockbatch": [
                "tiny/checkpoint/*",
                "tiny/block_checkpoint/*",
                "pictures/replay_page/*",
                "serving/live_page/*",
                "serving/plain.jinja",
            ]
        },
        include_package_data=False,
        ext_modules=[Extension("blockbatch_kernels._C", sources=[])] if nvcc else [],
        cmdclass={"build": Build, "build_ext": CMakeBuild},
        zip_safe=False,
    )
