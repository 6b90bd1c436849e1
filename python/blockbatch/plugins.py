"""Python that a user names on the command line, to register methods of his own before anything else."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path


def load_plugin(name: str) -> None:
    """Imports a module by its name, or a file that ends in ".py". It runs with the user's rights.

    Nothing but the caller's own argument may be handed in here: no file of a model's repository is code.

    Raises:
        ValueError: there is none, or it fails; the message says why.
    """
    if not name.endswith(".py"):
        try:
            importlib.import_module(name)
        except Exception as error:
            raise ValueError(
                f"plugin: expected a module that can be imported, got {name!r} ({_why(error)})"
            ) from error
        return
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"plugin: expected a module or a Python file, got {name!r}, which does not exist")
    called = f"blockbatch_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(called, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[called] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[called]
        raise ValueError(f"plugin: expected a file that runs, got {name!r} ({_why(error)})") from error


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
