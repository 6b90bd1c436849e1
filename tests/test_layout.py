"""docs/layout.md, held: who may import or include whom, no circles, and files of a readable length."""

import re
import subprocess

import pytest

from import_graph import ROOT, circles, edges, rooms

KERNELS = "blockbatch_kernels"
# Room of blockbatch_kernels -> those that it may import; ops.dispatch alone may import the backends.
SUPPORT = {"policy_params", "shapes", "structs", "tuning"}
MAY_IMPORT = {
    "shapes": set(),
    "structs": {"shapes"},
    "policy_params": set(),
    "tuning": {"shapes"},
    "contracts": {"shapes"},
    "operators": {"contracts", "policy_params", "structs", "tuning", "shapes"},
    "checks": {"contracts", "operators", "shapes"},
    "registered": {"contracts", "shapes", "structs"},
    "library": {"contracts", "operators", "ops", "registered", "shapes"},
    "ops": {"checks", *SUPPORT},
    "scaled_head": {"structs"},
    "reference": {"scaled_head", *SUPPORT},
    "triton": {"scaled_head", *SUPPORT},
    "cuda": {"scaled_head", *SUPPORT},
}
BACKENDS = {"reference", "triton", "cuda"}
MAY_INCLUDE = {
    "common": set(),
    "attention": {"common"},
    "layer": {"common"},
    "gemm": {"common", "layer"},
    "decode": {"common"},
    "bind": {"attention", "common", "decode", "gemm", "layer"},
}
MOST_LINES = 400
TEXT = {".py", ".md", ".cu", ".cuh", ".h", ".cpp", ".js", ".css", ".html", ".toml", ".txt", ""}


def room_of(name):
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("package", ["blockbatch", KERNELS])
def test_nothing_imports_in_a_circle(package):
    graph = edges(package)
    assert len(graph) > 40
    assert circles(graph) == [] and circles(rooms(graph)) == []


def test_rooms_of_the_operators_import_what_they_may():
    wrong = []
    for name, targets in edges(KERNELS).items():
        room = room_of(name)
        if not room:
            continue
        allowed = MAY_IMPORT[room] | {room, ""}
        if name == f"{KERNELS}.ops.dispatch":
            allowed |= BACKENDS
        wrong += [(name, target) for target in targets if room_of(target) not in allowed]
    assert wrong == []


def test_the_operators_know_nothing_of_the_decoder():
    for path in (ROOT / KERNELS).rglob("*.py"):
        assert not re.search(r"^\s*(from|import) blockbatch\b", path.read_text(), re.MULTILINE), path


def test_the_path_of_a_request_goes_one_way():
    graph = rooms(edges("blockbatch"))
    order = ["generation", "decoding", "models"]
    for place, room in enumerate(order):
        imported = {room_of(target) for target in graph[f"blockbatch.{room}"]}
        assert imported & set(order) == set(order[place + 1 :]), room


def test_only_its_commands_know_the_server():
    users = {
        name
        for name, targets in edges("blockbatch").items()
        if any(room_of(target) == "serving" for target in targets)
    }
    assert {name for name in users if room_of(name) != "serving"} == {
        "blockbatch.cli.dynamo",
        "blockbatch.cli.serve",
    }


def test_sources_of_the_extension_include_what_they_may():
    sources = sorted((ROOT / "csrc").rglob("*.*"))
    assert len(sources) > 50
    for path in sources:
        room = path.parent.name
        for included in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
            assert (ROOT / "csrc" / included).exists(), (path, included)
            assert included.split("/")[0] in MAY_INCLUDE[room] | {room}, (path, included)


def test_the_extension_is_free_of_torch():
    for path in (ROOT / "csrc").rglob("*.*"):
        assert not re.search(r"#include <(torch|ATen|c10)/", path.read_text()), path


def tracked_files():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_files_are_read_in_one_sitting():
    long = {}
    for path in tracked_files():
        inside = path.relative_to(ROOT)
        if (
            path.suffix not in TEXT
            or "results" in inside.parts
            or "data" in inside.parts
            or not path.exists()
        ):
            continue
        if inside.name == "LICENSE":
            continue
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MOST_LINES:
            long[str(inside)] = lines
    assert long == {}


def test_every_room_is_on_the_page():
    page = (ROOT / "docs" / "layout.md").read_text()
    for folder in ("csrc", KERNELS, "python/blockbatch"):
        for room in (ROOT / folder).iterdir():
            if room.is_dir() and room.name != "__pycache__":
                assert f"`{room.name}/`" in page, f"{folder}/{room.name}"
    for module in (ROOT / "python" / "blockbatch").glob("*.py"):
        if not module.name.startswith("__"):
            assert f"`{module.name}`" in page, module.name
