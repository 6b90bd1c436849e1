"""Generated Python programs in a process of their own, cut off from network, files and other processes.

Each program runs in a fresh interpreter with an empty environment and limits on wall time, CPU time, memory,
output, file sizes, open files and processes. Around it stand the walls that the system offers:

- namespaces (Linux; as root, or as a user where user namespaces are allowed): no network devices, a file
  system in memory that holds an empty /tmp and a read-only view of the standard library and the shared
  libraries, and a process space that dies with the program
- seccomp (Linux on x86-64 and arm64): no sockets, no new processes or programs, no signals to others
- Landlock (Linux 6.2 or later): files can be read where the interpreter needs it and nowhere else

`isolation()` tells which of them stand here. Network, files and processes must each be cut off by one of
them, or nothing is run unless the caller accepts less. On macOS there are the limits alone.
On Windows nothing is run: `require` says so, and answers that would have to run stay unjudged.

Known limits: a program counts as finished when it wrote a random number that it was not told. Leaving early,
with whatever exit code, does not count. But program and tests share an interpreter: code that replaces what
its tests use, or digs through the interpreter's frames, can pretend to pass. Kernel bugs are not guarded
against; give code from people who mean harm a machine of its own.
"""

from blockbatch.sandbox.call import call_function
from blockbatch.sandbox.run import (
    FILE_LIMIT,
    OUTPUT_LIMIT,
    WALLS,
    Isolation,
    Outcome,
    SandboxError,
    isolation,
    require,
    run_python,
    why_unavailable,
)

__all__ = [
    "FILE_LIMIT",
    "OUTPUT_LIMIT",
    "WALLS",
    "Isolation",
    "Outcome",
    "SandboxError",
    "call_function",
    "isolation",
    "require",
    "run_python",
    "why_unavailable",
]
