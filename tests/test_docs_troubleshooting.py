"""docs/troubleshooting.md speaks of messages that exist, and of every class of error that is ours."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
SOURCES = [
    *(ROOT / "python" / "blockbatch").rglob("*.py"),
    *(ROOT / "blockbatch_kernels").rglob("*.py"),
    ROOT / "setup.py",
]


def texts():
    """The constant parts of all strings of the sources, one a line."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def classes():
    """Names of the errors that are declared, without those of one module alone."""
    return {
        node.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and re.fullmatch(r"[A-Z]\w*Error", node.name)
    }


def test_every_message_is_one_of_the_sources():
    source = texts()
    messages = re.findall(r"^\| `([^`]+)`", PAGE, re.MULTILINE)
    assert len(messages) > 40
    declared = classes()
    for message in messages:
        for part in message.split("…"):
            part = part.strip(" ,:")
            if part and part not in declared:
                assert part in source, message


def test_every_error_of_ours_is_on_the_page():
    # How the server carries a message to its answer, and how the build ends.
    hidden = {"ApiError", "BuildError"}
    assert len(classes()) > 6
    assert [name for name in sorted(classes() - hidden) if f"`{name}`" not in PAGE] == []
