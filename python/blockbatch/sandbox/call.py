"""Call a model's Python function in the sandbox, with a few harmless modules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from blockbatch.sandbox.run import run_python

# The audit hook cannot be removed again. It refuses files, processes and sockets on every system, also where
# the sandbox has no walls for them.
_DRIVER = r"""
import json, sys
job = json.load(sys.stdin)
out = sys.stdout
sys.stdout = sys.stderr = None
def refuse(event, arguments):
    if event == "import":
        allowed = arguments[0] in job["imports"]
    elif event == "open":
        allowed = False
    else:
        allowed = not event.startswith(("os.", "subprocess.", "socket.", "ctypes.", "shutil.", "pty.",
                                        "mmap.", "signal.", "resource.", "gc.", "fcntl.", "sys.set"))
    if not allowed:
        raise PermissionError("not allowed here: " + event)
for name in job["imports"]:
    __import__(name)
for name in ("os", "posix", "resource", "ctypes", "_ctypes"):
    sys.modules.pop(name, None)
sys.addaudithook(refuse)
space = {"__name__": "answer"}
exec(compile(job["text"], "answer", "exec"), space)
function = space[job["function"]]
values = [function(argument) for argument in job["arguments"]]
sys.stdout = out
out.write(json.dumps(values))
"""
_IMPORTS = ("math", "re", "string", "itertools", "functools", "collections")


def call_function(
    text: str,
    function: str,
    arguments: Sequence[Any],
    *,
    seconds: float = 2.0,
    memory: int = 256 << 20,
) -> list[Any] | None:
    """Run `text` and return `[function(argument) for argument in arguments]`, or None if anything went wrong.

    Arguments and results travel as JSON. The function has `seconds` of wall time, `memory` bytes of address
    space, no file access, no child processes, no network, and only a few harmless modules of the standard
    library. Where the system has no walls to keep it from the rest (see `run_python`), the interpreter alone
    refuses those: enough for a small model's mistakes, none against a skilled attacker.
    """
    job = {"text": text, "function": function, "arguments": list(arguments), "imports": _IMPORTS}
    outcome = run_python(
        _DRIVER, seconds=seconds, memory_bytes=memory, stdin=json.dumps(job), accept_weaker=True
    )
    try:
        values = json.loads(outcome.stdout) if outcome.ok else None
    except ValueError:
        return None
    return values if isinstance(values, list) else None
