"""Helpers for tests of model folders: load one, or change its files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import plain_models
from blockbatch.models.checkpoint import load_weights, read_config, read_spec


def load(folder, dtype=torch.float32):
    spec = read_spec(read_config(folder))
    return spec, load_weights(folder, spec, "cpu", dtype)


def edit_config(folder, **changes):
    """Changes entries of config.json; the value `...` removes one."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            del config[key]
        else:
            config[key] = value
    path.write_text(json.dumps(config))


def edit_tensors(folder, **changes):
    """Replaces tensors of model.safetensors, named with "__" for "."; the value None removes one."""
    tensors = plain_models.read_weights(folder)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, Path(folder) / "model.safetensors")


def run_python(script, *arguments, **environment):
    paths = os.pathsep.join(filter(None, [os.path.abspath(path) for path in sys.path if path]))
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
