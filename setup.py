"""Builds and installs the packages blockbatch_kernels and blockbatch.

The extension `blockbatch_kernels._C` (`csrc/`, built by CMake and ninja) is optional. Environment variables:

BBK_BUILD_CUDA  `auto` (default): build it where nvcc is found, else skip it with one line.
                `1`: build it; without nvcc that is an error. `0`: do not build it.
BBK_CUDA_ARCHS  architectures to compile for, separated by `;` (default `80;90a`), each as in CMake's
                CUDA_ARCHITECTURES: `80` (machine code and PTX), `80-real`, `80-virtual`, `90a`.
CUDACXX         the nvcc to use; else `$CUDA_HOME/bin/nvcc`, else the `nvcc` on PATH.
MAX_JOBS        limit of parallel compile jobs (default: ninja's own).
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80;90a"
NO_NVCC = "nvcc was not found, neither through CUDACXX or CUDA_HOME nor on PATH"
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
    return nvcc, None if nvcc else NO_NVCC


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
            f"{name} is needed to build the CUDA extension: install it (pip install {name}), "
            "or set BBK_BUILD_CUDA=0 to install without the extension"
        )
    return found


def pybind11_dir():
    try:
        import pybind11
    except ImportError:
        raise BuildError(
            "pybind11 is needed to build the CUDA extension: install it (pip install pybind11), "
            "or set BBK_BUILD_CUDA=0 to install without the extension"
        ) from None
    return pybind11.get_cmake_dir()


def run(command):
    print("+", " ".join(command), flush=True)
    status = subprocess.run(command).returncode
    if status:
        raise BuildError(f"building the CUDA extension failed (exit status {status}): {' '.join(command)}")


class CMakeBuild(build_ext):
    """Builds the extension with CMake and ninja, or says in one line that it is skipped."""

    def run(self):
        self.nvcc, reason_to_skip = plan(os.environ)
        if reason_to_skip:
            print(f"blockbatch: CUDA extension skipped: {reason_to_skip}", flush=True)
        super().run()

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        work = Path(self.build_temp).resolve() / "cmake"
        work.mkdir(parents=True, exist_ok=True)
        cmake = find_tool("cmake")
        # --fresh: a cache may name tools of an earlier, now deleted build environment, or another source
        # folder. Object files are kept, so an unchanged source is not compiled again.
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "CMAKE_CUDA_COMPILER": self.nvcc,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11_dir(),
            "BBK_CUDA_ARCHS": cuda_archs(os.environ),
        }
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        run([cmake, "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(work), *definitions])
        jobs = os.environ.get("MAX_JOBS")
        run([cmake, "--build", str(work), *(["--parallel", jobs] if jobs else [])])
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
            "blockbatch": ["tiny/checkpoint/*", "tiny/block_checkpoint/*", "pictures/replay_page/*"]
        },
        include_package_data=False,
        ext_modules=[Extension("blockbatch_kernels._C", sources=[])] if nvcc else [],
        cmdclass={"build": Build, "build_ext": CMakeBuild},
        zip_safe=False,
    )
