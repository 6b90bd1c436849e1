"""Every code block of README.md and docs/ runs, in the order of its page, or a comment says why it does not.

Languages: `python`; `sh`, which is what no language means, too; `text` and `json`, which do not run. A `text`
block right behind a `python` block is what that one prints. `<!-- not run: REASON -->` in front of a block
leaves it out.
"""

import contextlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from blockbatch.cli import main
from blockbatch.registry import registered_methods, unregister_method

ROOT = Path(__file__).parents[1]
# Its blocks run in test_docs.py, with tensors of every operator.
ELSEWHERE = {"operators.md"}
PAGES = [
    page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.name not in ELSEWHERE
]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_MARK = re.compile(r"<!-- not run: (\S[^>]*) -->\n\Z")


class Block(NamedTuple):
    """A block of a page: its language, its text, why it does not run (None: it does), and its line."""

    language: str
    text: str
    reason: str | None
    line: int
    follows: bool  # nothing but an empty line is between it and the block before


def blocks_of(text):
    found, end = [], -1
    for match in _FENCE.finditer(text):
        before = text[: match.start()]
        mark = _MARK.search(before)
        follows = end >= 0 and not text[end : match.start()].strip()
        line = before.count("\n") + 1
        found.append(Block(match[1] or "sh", match[2], mark[1] if mark else None, line, follows))
        end = match.end()
    return found


def commands_of(text):
    """Lists of words, joined over lines; "|" and "&&" are words of their own."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&")
        lexer.whitespace_split = True
        words = list(lexer)
        if words:
            yield words


def run_command(words, given=""):
    """Runs one line; the output of a part before "|" is the input of the next."""
    for mark in ("&&", "|"):
        if mark in words:
            at = words.index(mark)
            output = run_command(words[:at], given)
            return run_command(words[at + 1 :], output if mark == "|" else "")
    output, old = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True), (sys.stdin, sys.argv)
    sys.stdin = io.TextIOWrapper(io.BytesIO(given.encode()))
    try:
        with contextlib.redirect_stdout(output):
            if words[0] == "blockbatch":
                assert main(words[1:]) == 0, words
            elif words[0] == "echo":
                print(*words[1:])
            elif words[:2] == ["python", "-m"]:
                sys.argv = words[2:]
                runpy.run_module(words[2], run_name="__main__")
            elif words[0] == "python":
                sys.argv = words[1:]
                runpy.run_path(words[1], run_name="__main__")
            else:
                raise AssertionError(
                    f"a command that this test does not run and no comment explains: {words}"
                )
    finally:
        sys.stdin, sys.argv = old
    return output.buffer.getvalue().decode()


def run_page(blocks):
    scope, printed = {"__name__": "page"}, None
    for block in blocks:
        if block.language == "text":
            if block.follows and printed is not None:
                assert printed == block.text, block.line
        elif block.reason is None and block.language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(block.text, f"block in line {block.line}", "exec"), scope)
            printed = output.getvalue()
            continue
        elif block.reason is None and block.language != "json":
            assert block.language == "sh", f"line {block.line}: {block.language}"
            for words in commands_of(block.text):
                run_command(words)
        printed = None


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder beside which the examples lie, without a GPU's differences."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    kept = set(registered_methods())
    yield tmp_path
    for name in set(registered_methods()) - kept:
        unregister_method(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page, place):
    run_page(blocks_of(page.read_text()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_code_is_hidden_from_the_test(page):
    text = page.read_text()
    assert text.count("```") % 2 == 0
    assert len(blocks_of(text)) == len(re.findall(r"^```", text, re.MULTILINE)) // 2
    # Blocks by indentation have no language and take no comment.
    assert not re.search(r"^\n {4}(blockbatch|python|pip|lm_eval|make|torchrun) ", text, re.MULTILINE)


@pytest.mark.parametrize(
    "text, error",
    [
        ("```python\n1 / 0\n```\n", ZeroDivisionError),
        ("```sh\npip install x\n```\n", AssertionError),
        ("```\nblockbatch generate\n```\n", SystemExit),
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", AssertionError),
        ("```rust\nfn main() {}\n```\n", AssertionError),
    ],
)
def test_a_block_that_does_not_run_is_found(text, error, place):
    with pytest.raises((error, AssertionError)):
        run_page(blocks_of(text))


def test_a_comment_leaves_a_block_out():
    (block,) = blocks_of("<!-- not run: needs weights -->\n```sh\npip install x\n```\n")
    assert block.reason == "needs weights"
    run_page([block])
