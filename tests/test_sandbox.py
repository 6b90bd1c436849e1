"""Generated code behind the walls: every attack fails, and the same thing without its wall succeeds."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from blockbatch.sandbox import Isolation, SandboxError, run_python
from blockbatch.sandbox import run as sandbox

STANDING = sandbox.isolation()
# What suffices on its own, so that a system which has only one of them is safe, too.
SUFFICIENT = (("namespaces",), ("seccomp", "landlock"), STANDING.walls)
pytestmark = pytest.mark.skipif(bool(STANDING.open), reason=f"no full sandbox here: {STANDING}")


@pytest.fixture(params=SUFFICIENT, ids="+".join)
def walls(request, monkeypatch):
    if not set(request.param) <= set(STANDING.walls):
        pytest.skip(f"not all of them stand here: {STANDING}")
    monkeypatch.setattr(sandbox, "isolation", lambda: Isolation(request.param))
    return request.param


def run(source, *, seconds=10, memory_bytes=512 << 20, **options):
    return run_python(source, seconds=seconds, memory_bytes=memory_bytes, **options)


def without_walls(source):
    """The control: the same program in a plain subprocess with the same limits."""
    return sandbox._launch(source, (), seconds=10, memory_bytes=512 << 20, text="")


def test_a_program_runs_to_its_end(walls):
    outcome = run("import sys\nprint(input(), len(sys.stdin.read()))", stdin="two\nthree")
    assert (outcome.ok, outcome.reason, outcome.stdout) == (True, "", "two 5\n")
    source = (
        "import collections, dataclasses, decimal, hashlib, json, math, random, re, typing\nprint(__name__)"
    )
    outcome = run(source)
    assert (outcome.ok, outcome.stdout) == (True, "__main__\n")


@pytest.mark.parametrize(
    "source, reason",
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("assert 1 == 2, 'one\\x1b[31m'", "AssertionError: one [31m"),
        ("def f(:", "SyntaxError"),
        ("'\udcff' + 1", "UnicodeEncodeError"),
        ("import ctypes\nctypes.string_at(0)", "killed by signal 11"),
        ("import sys\nsys.exit(0)", "left before its end"),
        ("raise SystemExit", "left before its end"),
        ("import os\nos._exit(0)", "left before its end"),
        ("import os\nprint(1, flush=True)\nos.close(1)\nos.closerange(3, 64)", ""),
        (
            "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'0' * 32)\n    except OSError: pass",
            "",
        ),
    ],
)
def test_whatever_ends_early_or_wrongly_is_not_ok(source, reason):
    outcome = run(source)
    assert not outcome.ok and reason in outcome.reason


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import signal as s\nfor n in set(s.Signals) - {9, 19}: s.signal(n, s.SIG_IGN)\nwhile True: pass",
        "import os\nos.closerange(0, 64)\nwhile True: pass",
    ],
)
def test_time_ends(walls, source):
    begin = time.monotonic()
    outcome = run(source, seconds=0.5)
    assert not outcome.ok and outcome.reason in ("took longer than 0.5 s", "killed")
    assert time.monotonic() - begin < 5


def test_memory_ends(walls):
    source = "data = bytearray({} << 20)\nfor i in range(0, len(data), 4096): data[i] = 1\nprint(len(data))"
    assert run(source.format(64), memory_bytes=256 << 20).ok
    outcome = run(source.format(512), memory_bytes=256 << 20)
    assert (outcome.ok, outcome.reason) == (False, "MemoryError")
    threads = (
        "import threading, time\nfor _ in range({}): threading.Thread(target=time.sleep, args=(9,)).start()"
    )
    assert not run(threads.format(500), memory_bytes=1 << 30).ok
    assert run("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()").stdout == "\n"


def test_output_ends(walls):
    outcome = run("import sys\nwhile True: sys.stdout.write('x' * 9999)")
    assert not outcome.ok and outcome.reason.startswith("printed more than")
    assert outcome.stdout == "x" * sandbox.OUTPUT_LIMIT
    outcome = run("print('x' * 999_999)")
    assert outcome.ok and len(outcome.stdout) == 1_000_000


def test_files_outside_cannot_be_read(walls, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("opensesame")
    secret.chmod(0o644)
    reading = f"print(open({str(secret)!r}).read())"
    assert without_walls(reading).stdout == "opensesame\n"
    # The second and third lead out of a new root whose old one was left in place.
    places = ("/etc/passwd", "/../etc/passwd", "/tmp/../etc/passwd", str(secret), os.path.realpath(__file__))
    for place in (*places, "/proc/self/environ", "/proc/1/cmdline"):
        assert not run(f"open({place!r})").ok, place
    for place in (str(Path.home()), str(tmp_path), "/", "/etc", "/tmp/.."):
        assert not run(f"import os\nassert {secret.name!r} in os.listdir({place!r})").ok, place
    assert run(f"import os\nassert 'def ' in open(os.__file__).read() and {str(secret)!r}").ok


def test_files_outside_cannot_be_written(walls, tmp_path):
    tmp_path.chmod(0o777)
    target, kept = tmp_path / "new", tmp_path / "kept"
    kept.write_text("as it was")
    kept.chmod(0o666)
    writing = f"open({str(target)!r}, 'w').write('x')"
    assert without_walls(writing).ok and target.exists()
    target.unlink()
    for attack in (
        f"open({str(target)!r}, 'w')",
        f"open({str(kept)!r}, 'a')",
        f"os.remove({str(kept)!r})",
        f"os.truncate({str(kept)!r}, 0)",
        f"os.chmod({str(kept)!r}, 0)",
        f"os.rename({str(kept)!r}, {str(target)!r})",
        f"os.symlink('/', {str(target)!r})",
        f"os.mkdir({str(target)!r})",
        "open(os.__file__, 'a')",
        "open(os.path.join(os.path.dirname(os.__file__), 'new'), 'w')",
    ):
        assert not run(f"import os\n{attack}").ok, attack
    if "namespaces" in walls:  # whoever owns the standard library
        assert run("import os\nassert os.statvfs(os.__file__).f_flag & os.ST_RDONLY").ok
    assert not target.exists() and kept.read_text() == "as it was" and kept.stat().st_mode & 0o777 == 0o666


@pytest.mark.skipif(
    "namespaces" not in STANDING.walls, reason="files can be written in a file system of its own"
)
def test_the_own_folder_is_empty_private_and_small():
    source = (
        "import os\nassert os.listdir() == []\n"
        "for n in range({}):\n    with open(str(n), 'wb') as file: file.write(bytes({}))"
    )
    assert run(source.format(2, 1 << 20)).ok
    assert run(source.format(2, 1 << 20)).ok  # empty again
    assert "File too large" in run(source.format(1, 2 * sandbox.FILE_LIMIT)).reason
    assert "No space left" in run(source.format(6, sandbox.FILE_LIMIT)).reason
    assert not run(source.format(5000, 0)).ok


def test_no_network(walls):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)
        connecting = f"import socket\nsocket.create_connection({server.getsockname()!r}, 2)"
        assert without_walls(connecting).ok
        server.accept()[0].close()
        assert not run(connecting).ok
        lookup = "import socket\nsocket.getaddrinfo('example.org', 80)"
        datagram = (
            "import socket\ns = socket.socket(type=socket.SOCK_DGRAM)\ns.sendto(b'x', ('127.0.0.1', 9))"
        )
        assert not run(lookup).ok and not run(datagram).ok
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_socket_of_the_file_system(walls):
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        os.chmod(folder, 0o777)
        path = os.path.join(folder, "s")
        server.bind(path)
        os.chmod(path, 0o777)
        server.listen()
        connecting = f"import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect({path!r})"
        assert without_walls(connecting).ok and not run(connecting).ok


def processes_of(folder):
    """Processes whose command line names `folder`, as that of the sandbox names its temporary folder."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            pass
    return found


def test_processes_are_few_and_none_is_left(walls, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tmp_path.chmod(0o777)
    bomb = """
import os, time
count = 0
try:
    while count < 200:  # one child after another, so that even without a wall it is no bomb
        if not os.fork():
            try:
                os.setsid()
                if not os.fork():
                    time.sleep(20)
            finally:
                os._exit(0)
        count += 1
except OSError:
    pass
print(count, flush=True)
os._exit(0)
"""
    outcome = run(bomb)
    assert int(outcome.stdout) < 64 and not processes_of(tmp_path)
    if "seccomp" in walls:
        assert outcome.stdout == "0\n"


def test_nothing_outlives_a_caller_that_is_killed(tmp_path):
    tmp_path.chmod(0o777)
    source = (
        "from blockbatch.sandbox import isolation, run_python\n"
        "isolation()\nprint('ready', flush=True)\n"
        "run_python('while True: pass', seconds=60, memory_bytes=1 << 29)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", source], env=environment, stdout=subprocess.PIPE) as caller:
        assert caller.stdout.readline() == b"ready\n"
        assert until(lambda: len(processes_of(tmp_path)) == 2)  # one that waits, one that is the program
        caller.kill()
    assert until(lambda: not processes_of(tmp_path))


def until(condition):
    """Whether the condition comes true in 20 s."""
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_without_walls_a_child_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = "import os, time\nif not os.fork():\n    os.setsid()\n    if os.fork(): os._exit(0)\n"
    source += "    os.closerange(0, 64)\n    time.sleep(20)\n    os._exit(0)\nos.wait()"
    assert without_walls(source).ok
    left = processes_of(tmp_path)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert len(left) == 1


def test_other_processes_are_out_of_reach(walls):
    signalling = f"import os\nos.kill({os.getpid()}, 0)"  # signal 0 asks whether it may be sent
    assert without_walls(signalling).ok
    assert not run(signalling).ok
    if "seccomp" in walls:
        for attack in ("os.kill(os.getppid(), 0)", "os.kill(1, 0)", "os.execv('/bin/true', ['true'])"):
            assert "PermissionError" in run(f"import os\n{attack}").reason, attack
    assert not run("import subprocess\nsubprocess.run(['/bin/true'], check=True)").ok
    limits = f"import resource\nresource.prlimit({os.getpid()}, resource.RLIMIT_CORE)"
    assert without_walls(limits).ok and not run(limits).ok


def test_walls_cannot_be_taken_down():
    for call in (
        "mount(b'none', b'/tmp', b'tmpfs', 0, None)",
        "unshare(0x10000000)",
        "ptrace(16, 1, 0, 0)",
        "chroot(b'/')",
    ):
        source = (
            f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint(libc.{call}, ctypes.get_errno())"
        )
        assert run(source).stdout == "-1 1\n", call
    raising = "import resource as r\nr.setrlimit(r.RLIMIT_AS, (r.RLIM_INFINITY, r.RLIM_INFINITY))"
    assert not run(raising).ok


def test_nothing_of_the_parent_is_passed_on(walls, monkeypatch, tmp_path):
    monkeypatch.setenv("SECRET_TOKEN", "opensesame")
    secret = tmp_path / "secret"
    secret.write_text("opensesame")
    with secret.open() as file:
        os.set_inheritable(file.fileno(), True)
        found = run(
            "import os, sys\nprint(dict(os.environ), sys.argv)\nfor fd in range(3, 64):\n"
            "    try: print(os.pread(fd, 99, 0))\n    except OSError: pass"
        )
    assert (found.ok, found.stdout) == (True, "{} ['program']\n")


def test_sets_have_the_same_order_in_every_run():
    assert len({run("print(set('abcdefgh'))").stdout for _ in range(4)}) == 1


def test_a_system_without_walls_is_refused(monkeypatch):
    weak = Isolation(
        ("landlock",), {"namespaces": "unshare: Operation not permitted", "seccomp": "no filter"}
    )
    monkeypatch.setattr(sandbox, "isolation", lambda: weak)
    assert weak.open == ("network", "processes")
    with pytest.raises(
        SandboxError, match="no wall cuts off network, processes .*unshare.*accept_weaker_sandbox"
    ):
        run("print(1)")
    assert run("print(1)", accept_weaker=True).stdout == "1\n"
    assert "NOT cut off: network, processes" in str(weak)
    assert "resource limits alone" in str(Isolation(()))
    assert not Isolation(("namespaces",)).open and not Isolation(("seccomp", "landlock")).open


def test_walls_are_tried_out(monkeypatch):
    def launch(source, walls, **options):
        if walls == ("namespaces",):
            raise SandboxError("unshare: Operation not permitted")
        return sandbox.Outcome(walls != ("landlock",), "no", "")

    monkeypatch.setattr(sandbox, "_launch", launch)
    found = sandbox.isolation.__wrapped__()
    assert found.walls == ("seccomp",) and found.refused["namespaces"] == "unshare: Operation not permitted"
    assert "standard library" in found.refused["landlock"]
    monkeypatch.setattr(sys, "platform", "darwin")
    found = sandbox.isolation.__wrapped__()
    assert found.walls == () and found.refused["seccomp"] == "not on darwin"


def test_what_cannot_start_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr(sandbox, "_JAIL", "/nowhere")
    with pytest.raises(SandboxError, match="nowhere"):
        run("print(1)")


@pytest.mark.parametrize("limits", [{"seconds": 0}, {"seconds": float("nan")}, {"memory_bytes": 0}])
def test_bad_limits_are_named(limits):
    with pytest.raises(ValueError, match=next(iter(limits))):
        run("print(1)", **limits)
