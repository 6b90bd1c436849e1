"""Data of installed packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def installed_file(package: str, path: str, *, task: str) -> bytes:
    """A data file of an installed package, without running any of its code.

    Raises ValueError, which says what to install for `task`, if it is not there.
    """
    spec = importlib.util.find_spec(package)  # of a top-level name: it is looked up, not imported
    for folder in spec.submodule_search_locations or () if spec else ():
        file = Path(folder) / path
        if file.is_file():
            return file.read_bytes()
    raise ValueError(
        f"task: {task} needs {path} of the package {package.replace('_', '-')}, which is not installed: "
        f"pip install 'blockbatch[{task}]'"
    )
