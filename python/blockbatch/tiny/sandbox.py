"""Run a model's Python function in a limited subprocess.

This keeps a small model's mistakes (endless loops, huge lists, stray calls) from doing harm. It is no defence
against a skilled attacker: do not feed it code from people you do not trust. POSIX only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

# Limits are set inside the child, before the text runs. The audit hook cannot be removed again; it refuses
# what resource limits cannot, which also covers users whom RLIMIT_NPROC does not bind.
_CHILD = r"""
import json, resource, sys
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
for limit, value in ((resource.RLIMIT_CPU, job["seconds"]), (resource.RLIMIT_AS, job["bytes"]),
                     (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_CORE, 0)):
    resource.setrlimit(limit, (value, value))
for name in ("os", "posix", "resource", "subprocess", "signal", "_signal", "socket", "ctypes"):
    sys.modules.pop(name, None)
del resource
sys.addaudithook(refuse)
space = {"__name__": "answer"}
exec(compile(job["text"], "answer", "exec"), space)
function = space[job["function"]]
values = [function(argument) for argument in job["arguments"]]
out.write(json.dumps(values))
out.flush()
"""
_IMPORTS = ("math", "re", "string", "itertools", "functools", "collections")
_OUTPUT_LIMIT = 1 << 20


def call_function(
    text: str,
    function: str,
    arguments: Sequence[Any],
    *,
    seconds: float = 2.0,
    memory: int = 256 << 20,
) -> list[Any] | None:
    """Run `text` and return `[function(argument) for argument in arguments]`, or None if anything went wrong.

    Arguments and results travel as JSON. The child is a fresh interpreter (`-I -S`) in an empty folder of its
    own, with `seconds` of wall time, `memory` bytes of address space, no file access, no child processes, no
    network, and only a few harmless modules of the standard library.
    """
    job = {
        "text": text,
        "function": function,
        "arguments": list(arguments),
        "imports": _IMPORTS,
        "seconds": max(1, round(seconds + 0.5)),
        "bytes": memory,
    }
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            output, _ = child.communicate(json.dumps(job).encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
    if child.returncode != 0 or len(output) > _OUTPUT_LIMIT:
        return None
    try:
        values = json.loads(output)
    except ValueError:
        return None
    return values if isinstance(values, list) else None
