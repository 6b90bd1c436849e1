"""Finding a model: local folders, the HuggingFace cache, the hub."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest

import blockbatch
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
    assert hub.calls == [True, False, False]
    for name in ("modeling.py", "pytorch_model.bin", "model.pt"):
        assert not any(Path(name).match(pattern) for pattern in hub.allow_patterns)


class IncompleteSnapshotError(OSError):
    """As huggingface_hub raises it from 1.22 on: some file that the repository lists is not cached."""

    def __init__(self, snapshot_path):
        super().__init__("The cached snapshot is incomplete: 1 file(s) are missing (added_tokens.json)")
        self.snapshot_path = snapshot_path


class ListingHub(FakeHub):
    """Knows what a repository lists: a cached folder is refused, and fetching works with `online` alone."""

    def snapshot_download(self, hub_id, *, local_files_only=False, **options):
        self.calls.append(local_files_only)
        if local_files_only or self.folders[False] is None:
            # The folder's name comes as text. Without a network both calls raise it, if not something else.
            raise (
                IncompleteSnapshotError(str(self.folders[True]))
                if self.named[local_files_only]
                else OSError()
            )
        return str(self.folders[False])

    named = {True: True, False: True}


@pytest.mark.parametrize(
    "named", [{True: True, False: True}, {True: True, False: False}, {True: False, False: True}]
)
@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.json"])
def test_cached_folder_that_lacks_only_optional_files(folder, monkeypatch, kind, named):
    """All that a model needs is there; the repository lists more, and there is no network."""
    for name in (
        ["tokenizer.json"]
        if kind == "tokenizer.json"
        else ["vocab.json", "merges.txt", "tokenizer_config.json"]
    ):
        (folder / name).write_text("{}")
    hub = ListingHub(cached=folder)
    hub.named = named
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert resolve_folder("owner/name") == folder
    assert hub.calls == [True, False]  # with a network the missing files are fetched


def test_missing_optional_files_are_fetched(folder, tmp_path, monkeypatch):
    (folder / "tokenizer.json").write_text("{}")
    hub = ListingHub(cached=folder, online=tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert resolve_folder("owner/name") == tmp_path


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json", None])
def test_cached_folder_that_lacks_what_a_model_needs(folder, monkeypatch, missing):
    (folder / "tokenizer.json").write_text("{}")
    cached = folder / "gone" if missing is None else folder
    if missing:
        (folder / missing).unlink()
    monkeypatch.setitem(sys.modules, "huggingface_hub", ListingHub(cached=cached))
    with pytest.raises(CheckpointError, match="it is not cached in full.*snapshot is incomplete"):
        resolve_folder("owner/name")


def test_vocabulary_without_merges_is_no_tokenizer(folder, tmp_path, monkeypatch):
    (folder / "vocab.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "huggingface_hub", FakeHub(cached=folder, online=tmp_path))
    assert resolve_folder("owner/name") == tmp_path


def test_an_adapter_of_the_hub_is_known_as_one(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "a/b"}')
    hub = FakeHub(cached=tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert resolve_folder("owner/name") == tmp_path and "adapter_config.json" in hub.allow_patterns
    with pytest.raises(CheckpointError, match="is a LORA adapter of 'a/b' and no model"):
        blockbatch.load_model("owner/name", device="cpu")


def test_a_model_that_cannot_be_decoded_is_refused_before_its_weights_are_fetched(tmp_path, monkeypatch):
    config = {"model_type": "llada_moe", "architectures": ["LLaDAMoEModelLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    hub = FakeHub(online=tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(CheckpointError, match="LLaDA-MoE"):
        resolve_folder("owner/name")
    assert hub.calls == [True, False] and not any("safetensors" in name for name in hub.allow_patterns)


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


def test_a_listed_but_absent_file_with_the_real_library(folder, tmp_path):
    """A cache as huggingface_hub keeps it from 1.22 on, whose listing names a file that was never fetched."""
    pytest.importorskip("huggingface_hub")
    (folder / "tokenizer.json").write_text("{}")
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(folder, repository / "snapshots" / commit)
    names = [path.name for path in folder.iterdir()] + ["added_tokens.json"]
    listing = {"format_version": 1, "files": {name: {"size": 1, "blob_id": "0" * 40} for name in names}}
    for path, content in (("refs/main", commit), (f"trees/{commit}.json", json.dumps(listing))):
        (repository / path).parent.mkdir()
        (repository / path).write_text(content)
    script = "from blockbatch.models.checkpoint import resolve_folder\nprint(resolve_folder('owner/name'))\n"
    output = run_python(script, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "hub"))
    assert Path(output.strip()).samefile(repository / "snapshots" / commit)
