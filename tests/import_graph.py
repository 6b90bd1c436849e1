"""Which module of a package imports which, and where imports go round in a circle.

All import statements count: those inside functions and under TYPE_CHECKING too. They are read, never run.

    python tests/import_graph.py blockbatch
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"blockbatch": ROOT / "python" / "blockbatch", "blockbatch_kernels": ROOT / "blockbatch_kernels"}

Graph = dict[str, set[str]]


def modules(package: str) -> dict[str, Path]:
    """The package and all modules in it by dotted name, with their files."""
    found = {}
    for path in sorted(FOLDERS[package].rglob("*.py")):
        parts = path.relative_to(FOLDERS[package]).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join((package, *parts))] = path
    return found


def edges(package: str) -> Graph:
    """For each module those of the same package that it imports.

    Whoever imports `a.b.c` from outside of `a.b` imports `a.b` as well, whose `__init__` runs first.
    """
    files = modules(package)
    graph: Graph = {}
    for name, path in files.items():
        is_package = path.name == "__init__.py"
        targets = set()
        for wanted in _imports(ast.parse(path.read_text(encoding="utf-8")), name, is_package):
            while wanted and wanted not in files:  # `from module import name` names no module
                wanted = wanted.rpartition(".")[0]
            targets.update(part for part in _with_parents(wanted) if part == wanted or not _holds(part, name))
        graph[name] = {target for target in targets if target in files and target != name}
    return graph


def rooms(graph: Graph) -> Graph:
    """The same between the package's folders and the modules beside them: `a.b` for all of `a.b.c.d`.

    What the package's own `__init__` imports is left out: it stands above all rooms.
    """
    merged: Graph = {}
    for name, targets in graph.items():
        if name.count("."):
            merged.setdefault(_room(name), set()).update(map(_room, targets))
    return {room: targets - {room} for room, targets in merged.items()}


def circles(graph: Graph) -> list[list[str]]:
    """The groups of nodes that reach each other, by Tarjan's algorithm; nothing if there is no circle."""
    found, stack = [], []
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}

    def visit(node: str) -> None:
        number[node] = lowest[node] = len(number)
        stack.append(node)
        for target in sorted(graph.get(node, ())):
            if target not in number:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in stack:
                lowest[node] = min(lowest[node], number[target])
        if lowest[node] == number[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in number:
            visit(node)
    return sorted(found)


def _imports(tree: ast.Module, name: str, is_package: bool) -> Iterator[str]:
    """Dotted names that a module imports: of `from a import b` `a.b`, whether that is a module or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([base] if base else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def _holds(package: str, name: str) -> bool:
    return name == package or name.startswith(package + ".")


def _room(name: str) -> str:
    return ".".join(name.split(".")[:2])


def main() -> None:
    for package in sys.argv[1:] or FOLDERS:
        graph = edges(package)
        print(f"{package}: {len(graph)} modules, {sum(map(len, graph.values()))} imports of each other")
        for kind, found in (("modules", circles(graph)), ("rooms", circles(rooms(graph)))):
            print(f"  circles of {kind}: {len(found)}")
            for group in found:
                print(f"    {', '.join(group)}")


if __name__ == "__main__":
    main()
