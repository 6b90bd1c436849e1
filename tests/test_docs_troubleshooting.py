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


def constant(node):
    """A message with "\0" where something is filled in; None: it is made elsewhere."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp):
        return (constant(node.left) or "\0") + (constant(node.right) or "\0")
    return None


def messages(source):
    """(where, message) of what a file raises and warns of, with the texts that stand in the call itself."""
    # Reasons that stand inside of another message, and what Python itself asks for.
    inside = {"_BadTraceError", "AttributeError", "OSError", "PermissionError"}
    for node in ast.walk(ast.parse(source)):
        called = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(called, ast.Call) or ast.unparse(called.func) in inside:
            continue
        if not isinstance(node, ast.Raise) and ast.unparse(node.func) not in ("warnings.warn", "ApiError"):
            continue
        found = next(filter(None, map(constant, called.args[:2])), None)
        if found is not None:
            yield node.lineno, found


def is_told(message, listed):
    """Whether a message says itself what to change, hands on another one, or is on the page."""
    if re.search(r"\b(expected|must|needs?)\b", message) or len(re.findall(r"[a-z]{2,}", message)) < 3:
        return True
    split = ([part.strip(" ,:") for part in line.split("…")] for line in listed)
    return any(all(part in message for part in parts) for parts in split)


def test_every_message_says_what_to_change_or_is_on_the_page():
    listed, missing, seen = re.findall(r"^\| `([^`]+)`", PAGE, re.MULTILINE), [], 0
    listed.append("no argument gives")  # a row of operators.py that cannot be: whoever writes it meets that
    for path in SOURCES:
        for line, message in messages(path.read_text()):
            seen += 1
            if not is_told(message, listed):
                missing.append(f"{path.relative_to(ROOT)}:{line}: {message}")
    assert missing == []
    assert seen > 500


def test_a_message_that_is_not_told_is_found():
    source = 'if x:\n    raise ValueError(f"{x}: this is no good at all")\nraise ValueError(f"{x} must be 1")'
    found = list(messages(source))
    assert sorted(line for line, _ in found) == [2, 3]
    assert [is_told(message, ["expected a trace as …"]) for _, message in found] == [True, False]
    assert is_told(found[1][1], ["this is … at all"])


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
