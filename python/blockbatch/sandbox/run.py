"""One program in a process of its own: which walls stand here, the limits, and how it ended."""

from __future__ import annotations

import functools
import math
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

WALLS = ("namespaces", "seccomp", "landlock")
OUTPUT_LIMIT = 1 << 20
FILE_LIMIT = 4 << 20
_VERDICT_LIMIT = 1 << 12
_START_SECONDS = 60.0
_JAIL = str(Path(__file__).with_name("jail"))

# What each wall cuts off.
_CUTS = {
    "namespaces": ("network", "files", "processes"),
    "seccomp": ("network", "processes"),
    "landlock": ("files",),
}


class SandboxError(OSError):
    """The sandbox cannot be had as strong as it was asked for, or could not be started."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        ok: it ran to the end of its text.
        reason: "" if ok, or why not: the exception, the signal or the limit.
        stdout: what it printed, at most `OUTPUT_LIMIT` bytes of it.
    """

    ok: bool
    reason: str
    stdout: str


@dataclass(frozen=True)
class Isolation:
    """The walls that stand.

    Attributes:
        walls: names out of `WALLS`.
        refused: for each other wall, why it does not stand here.
    """

    walls: tuple[str, ...]
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def open(self) -> tuple[str, ...]:
        """What no wall cuts off: of "network", "files" and "processes"."""
        cut = {kind for wall in self.walls for kind in _CUTS[wall]}
        return tuple(kind for kind in _CUTS["namespaces"] if kind not in cut)

    def __str__(self) -> str:
        cut = [kind for kind in _CUTS["namespaces"] if kind not in self.open]
        text = (
            f"cut off: {', '.join(cut) or 'nothing'} (by {', '.join(self.walls) or 'resource limits alone'})"
        )
        if self.open:
            text += f"; NOT cut off: {', '.join(self.open)}"
        for wall, why in self.refused.items():
            text += f"; no {wall}: {why}"
        return text


def why_unavailable() -> str | None:
    """Why no program can be run here at all, not even behind limits alone; None if it can.

    Windows has neither the limits nor the ways to end a program with all that it started.
    """
    try:
        import resource  # noqa: F401
    except ImportError:
        return f"{sys.platform} has no limits on a process's memory and time (the module resource)"
    lacking = [
        f"{module.__name__}.{name}"
        for module, name in ((os, "fork"), (os, "killpg"), (select, "poll"), (signal, "SIGKILL"))
        if not hasattr(module, name)
    ]
    return f"{sys.platform} lacks {', '.join(lacking)}" if lacking else None


@functools.lru_cache(maxsize=1)
def isolation() -> Isolation:
    """The walls that stand on this system, tried out once by running an empty program behind each."""
    walls, refused = [], {}
    for wall in WALLS:
        if sys.platform != "linux" or why_unavailable():
            refused[wall] = f"not on {sys.platform}"
            continue
        try:
            outcome = _launch("import decimal, json", (wall,), seconds=20, memory_bytes=512 << 20, text="")
        except SandboxError as error:
            refused[wall] = str(error)
            continue
        if outcome.ok:
            walls.append(wall)
        else:
            refused[wall] = f"the standard library cannot be used behind it ({outcome.reason})"
    return Isolation(tuple(walls), refused)


def require(*, accept_weaker: bool = False) -> Isolation:
    """The isolation; raises SandboxError if it leaves something open, unless `accept_weaker`, and where no
    program can be run at all."""
    if lacking := why_unavailable():
        raise SandboxError(
            f"generated code cannot be run on this system: {lacking}. Run it on Linux, such as WSL, or leave "
            "such answers unjudged"
        )
    standing = isolation()
    if standing.open and not accept_weaker:
        raise SandboxError(
            f"generated code cannot be run safely here: no wall cuts off {', '.join(standing.open)} "
            f"({standing}). Run it in a virtual machine of its own and accept the weaker sandbox there "
            "(accept_weaker_sandbox=True, --accept-weaker-sandbox)"
        )
    return standing


def run_python(
    source: str, *, seconds: float, memory_bytes: int, stdin: str | None = None, accept_weaker: bool = False
) -> Outcome:
    """Run a program in the sandbox.

    Args:
        source: its text. It runs as `__main__` and can import the standard library alone.
        seconds: wall time; CPU time, which includes the interpreter's start, is limited to as many whole
            seconds.
        memory_bytes: address space; an interpreter alone takes some 30 MiB of it.
        stdin: what the program can read from standard input.
        accept_weaker: run it behind whatever walls there are.

    Raises SandboxError where the walls do not stand, ValueError for limits that are not positive.
    """
    if not seconds > 0 or not math.isfinite(seconds):
        raise ValueError(f"seconds: expected a positive number, got {seconds!r}")
    if memory_bytes < 1:
        raise ValueError(f"memory_bytes: expected a positive number, got {memory_bytes!r}")
    standing = require(accept_weaker=accept_weaker)
    return _launch(source, standing.walls, seconds=seconds, memory_bytes=memory_bytes, text=stdin or "")


def _launch(source: str, walls: tuple[str, ...], *, seconds: float, memory_bytes: int, text: str) -> Outcome:
    nonce = secrets.token_hex(16).encode()
    parts = (nonce, text.encode("utf-8", "replace"), source.encode("utf-8", "surrogatepass"))
    job = b"%d %d %d\n" % tuple(map(len, parts)) + b"".join(parts)
    limits = (str(math.ceil(seconds)), str(memory_bytes), str(FILE_LIMIT), ",".join(walls))
    # An interpreter may need these two to start. A fixed hash seed gives sets, and verdicts, the same order
    # in every run.
    environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PYTHONHOME") if name in os.environ}
    with tempfile.TemporaryDirectory(prefix="blockbatch-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-s", "-S", _JAIL, folder, *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd="/",
            env={**environment, "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        try:
            output, verdict, stopped = _listen(process, job, seconds)
        finally:
            _end(process)
    if not verdict.startswith(b"+"):
        raise SandboxError(
            _readable(verdict) or stopped or f"the sandbox left with status {process.returncode}"
        )
    printed = output.decode("utf-8", "replace")
    if verdict == b"+" + nonce and not stopped:
        return Outcome(True, "", printed)
    return Outcome(False, stopped or _reason(verdict[1:], process.returncode), printed)


def _listen(process: subprocess.Popen[bytes], job: bytes, seconds: float) -> tuple[bytes, bytes, str]:
    """Hands the job over and collects output and verdict until both end or a limit is reached.

    The time runs from the moment in which the walls stand, so that a busy machine starts nobody too late.
    """
    try:
        process.stdin.write(job)
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it failed to start; what it said follows
    heard = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    output, verdict = heard.values()
    poll = select.poll()
    for number in heard:
        poll.register(number, select.POLLIN)
    waiting, started, stopped = 2, False, ""
    deadline = time.monotonic() + _START_SECONDS
    while waiting and not stopped:
        left = deadline - time.monotonic()
        ready = poll.poll(math.ceil(left * 1000)) if left > 0 else []
        for number, _ in ready:
            part = os.read(number, 1 << 16)
            heard[number] += part
            if not part:
                poll.unregister(number)
                waiting -= 1
        if verdict and not started:
            started, deadline = True, time.monotonic() + seconds
        elif not ready:
            stopped = f"took longer than {seconds:g} s" if started else "the sandbox did not start"
        elif len(output) > OUTPUT_LIMIT or len(verdict) > _VERDICT_LIMIT:
            stopped = f"printed more than {OUTPUT_LIMIT} bytes"
    return bytes(output[:OUTPUT_LIMIT]), bytes(verdict), stopped


def _end(process: subprocess.Popen[bytes]) -> None:
    """At the closed pipe the outer process of the jail kills the inner one, with all that it started."""
    try:
        process.stdin.close()
    except BrokenPipeError:
        pass
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process.stdout.close()
    process.stderr.close()


def _reason(verdict: bytes, status: int) -> str:
    if verdict.startswith(b"-SystemExit"):
        return "left before its end"
    if verdict.startswith(b"-"):
        return _readable(verdict[1:])
    if status == 128 + signal.SIGXCPU or status == 128 + signal.SIGKILL:
        return "killed"  # at its CPU time, or it closed the pipes that tell how it is
    if status > 128:
        return f"killed by signal {status - 128}"
    return "left before its end"


def _readable(text: bytes) -> str:
    return "".join(c if c.isprintable() else " " for c in text.decode("utf-8", "replace")).strip()
