"""The inner side of `sandbox`: puts up the walls around one program, runs it and reports how it ended.

A script of the standard library alone, started by `sandbox` in a fresh interpreter with an empty environment:

    jail FOLDER SECONDS MEMORY_BYTES FILE_BYTES WALL,WALL,...

Standard input carries the job: three decimal lengths on one line, then the nonce, the program's input and the
program. It stays open; when it closes, everything ends. Standard output is the program's. Standard error
carries the verdict: "+" once the walls stand, then the nonce once the program has run to its end, or "-" and
why it has not. What begins with anything else says why there are no walls.

Two processes: the outer one waits; the inner one, the first of its PID namespace where there is one, takes
the walls upon itself and runs the program.
"""

import ctypes
import os
import resource
import select
import sys

import landlock
import namespaces
import seccomp
from libc import call

_NOBODY = 65534


def _drop_privileges(change_user):
    """No rights beyond an ordinary user's, for good."""
    if change_user and os.geteuid() == 0 and os.stat(os.__file__).st_mode & 0o4:
        # Not root's files even if another wall had a hole, and limits on processes count.
        try:
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        except OSError:
            pass  # a user namespace with a single user; it has no rights outside
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS


def _limit(seconds, memory_bytes, file_bytes):
    """Resource limits; a lower one that stands already stays."""
    for kind, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_NPROC, 64),
        (resource.RLIMIT_AS, memory_bytes),
    ):
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):
            if sys.platform == "linux":  # other systems know the address space's limit but do not keep it
                raise


def _enclose(folder, walls, seconds, memory_bytes, file_bytes):
    """Everything that stands between the program and the machine; raises OSError if a wall will not stand."""
    os.chdir(folder)
    if "namespaces" in walls:
        namespaces.change_root(folder, file_bytes)
    if sys.platform == "linux":
        _drop_privileges("namespaces" in walls)
    if "landlock" in walls:
        landlock.restrict_files("namespaces" in walls)
    _limit(seconds, memory_bytes, file_bytes)
    if "seccomp" in walls:
        seccomp.filter_calls()


def _run(source, text, nonce, verdict, finish=os._exit, write=os.write):
    """Runs the program as `__main__`. Whoever leaves early, in whatever way, does not write the nonce."""
    import io

    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    sys.argv[:] = ["program"]
    sys.stdin = io.StringIO(text)
    try:
        exec(compile(source, "<program>", "exec", dont_inherit=True), module.__dict__)
        sys.stdout.flush()
    except BaseException as error:
        told = "" if isinstance(error, (SystemExit, MemoryError)) else f": {error}"
        write(verdict, f"-{type(error).__name__}{told}".encode("utf-8", "replace")[:300])
        finish(1)
    write(verdict, nonce)
    finish(0)


def _inner(job, verdict):
    """The process that becomes the program."""
    folder, seconds, memory_bytes, file_bytes, walls = job["limits"]
    os.environ.clear()
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 2)
    os.close(nothing)
    try:
        os.setsid()
        _enclose(folder, walls, seconds, memory_bytes, file_bytes)
    except BaseException as error:
        os.write(verdict, str(error).encode("utf-8", "replace")[:300])
        os._exit(3)
    os.write(verdict, b"+")
    _run(job["source"], job["text"], job["nonce"], verdict)


def _read_job():
    """The job from standard input and the command line."""

    def exactly(count):
        parts = b""
        while len(parts) < count:
            part = os.read(0, count - len(parts))
            if not part:
                os._exit(3)
            parts += part
        return parts

    line = b""
    while not line.endswith(b"\n"):
        line += exactly(1)
    nonce, text, source = (exactly(int(length)) for length in line.split())
    folder, walls = sys.argv[1], sys.argv[5].split(",")
    return {
        "limits": (folder, *map(int, sys.argv[2:5]), walls),
        "nonce": nonce,
        "text": text.decode("utf-8"),
        "source": source.decode("utf-8", "surrogatepass"),
    }


def main():
    del sys.path[0]  # this folder, which is no place for the program to import from
    job = _read_job()
    try:
        if "namespaces" in job["limits"][4]:
            namespaces.enter()
    except OSError as error:
        os.write(2, str(error).encode("utf-8", "replace")[:300])
        os._exit(3)
    alive, dying = os.pipe()
    verdict = os.dup(2)
    child = os.fork()
    if not child:
        try:
            os.close(alive)
            _inner(job, verdict)
        finally:
            os._exit(3)
    os.close(dying)
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(alive, select.POLLIN)
    poll.poll()  # the program has ended, or the caller wants it to, or the caller is gone
    for kill in (os.killpg, os.kill):  # its session, if it has come to have one
        try:
            kill(child, 9)
        except OSError:
            pass
    _, status = os.waitpid(child, 0)
    os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


if __name__ == "__main__":
    main()
