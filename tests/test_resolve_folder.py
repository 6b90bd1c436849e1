"""Finding a model: local folders, the HuggingFace cache, the hub."""

import sys
import types
from pathlib import Path

import pytest

import plain_models
from blockbatch.models.checkpoint import CheckpointError, resolve_folder
from checkpoint_files import run_python


@pytest.fixture
def folder(tmp_path):
    plain_models.write_llada(tmp_path / "model")
    return tmp_path / "model"


def test_local_folder(folder, monkeypatch):
    assert resolve_folder(folder) == folder
    monkeypatch.chdir(folder.parent)
    assert resolve_folder("model").samefile(folder)
    with pytest.raises(ValueError, match="revision must be None for a local folder, got 'main'"):
        resolve_folder(folder, revision="main")


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "a/b/c", "~/nowhere/at/all"])
def test_neither_folder_nor_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected an existing folder or a hub id 'owner/name'"):
        resolve_folder(name)


def test_a_file_is_no_folder(folder):
    with pytest.raises(FileNotFoundError, match="expected a folder, got the file"):
        resolve_folder(folder / "config.json")


class FakeHub(types.ModuleType):
    """Stands for huggingface_hub: a cache and a hub that each hold a folder or nothing."""

    def __init__(self, cached=None, online=None):
        super().__init__("huggingface_hub")
        self.folders = {True: cached, False: online}
        self.calls = []

    def snapshot_download(self, hub_id, *, revision, allow_patterns, ignore_patterns, local_files_only=False):
        self.calls.append(local_files_only)
        self.allow_patterns = allow_patterns
        if self.folders[local_files_only] is None:
            raise OSError("not cached" if local_files_only else "no route to host")
        return str(self.folders[local_files_only])


def test_hub_id_comes_from_the_cache(folder, monkeypatch):
    (folder / "tokenizer.json").write_text("{}")
    hub = FakeHub(cached=folder, online=None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert resolve_folder("owner/name") == folder
    assert hub.calls == [True]


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
def test_incomplete_cache_is_fetched(folder, tmp_path, monkeypatch, missing):
    (folder / "tokenizer.json").write_text("{}")
    (folder / missing).unlink()
    hub = FakeHub(cached=folder, online=tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert resolve_folder("owner/name", revision="v1") == tmp_path
    assert hub.calls == [True, False]
    for name in ("modeling.py", "pytorch_model.bin", "model.pt"):
        assert not any(Path(name).match(pattern) for pattern in hub.allow_patterns)


def test_hub_out_of_reach(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", FakeHub())
    with pytest.raises(CheckpointError, match="'owner/name' at revision 'v1'.*not cached.*no route to host"):
        resolve_folder("owner/name", revision="v1")


def test_offline_with_the_real_library(tmp_path):
    """Nothing cached and HF_HUB_OFFLINE set: one CheckpointError, whatever the library raises inside."""
    pytest.importorskip("huggingface_hub")
    script = (
        "from blockbatch.models.checkpoint import CheckpointError, resolve_folder\n"
        "try:\n    resolve_folder('owner/name')\n"
        "except CheckpointError as error:\n    print(error)\n"
    )
    output = run_python(script, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert "model 'owner/name': expected it in the HuggingFace cache or on the hub" in output
