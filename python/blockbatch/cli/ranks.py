"""The command line as several processes of torchrun that hold one model together: the first alone is heard.

All of them read the same arguments and decode the same, or follow the first, which serves; the others write
nothing.
"""

from __future__ import annotations

import argparse
import atexit
import io
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

# Commands that do nothing but decode and print, or whose other processes follow the first.
COMMANDS = ("generate", "compare", "serve")
# How long a process that fails waits for the first to say why, upon which torchrun ends it.
_GRACE_SECONDS = 5.0


def process() -> tuple[int, int]:
    """Rank of this process and their number, as torchrun says; (0, 1) elsewhere."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(os.environ.get(name, "").isdecimal() for name in names):
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def writes() -> bool:
    """Whether files are this process's to write."""
    return process()[0] == 0


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for a command that several processes cannot run together."""
    command = options.parser.prog.split()[1]
    size = process()[1]
    if size > 1 and command not in COMMANDS:
        raise ValueError(
            f"torchrun: expected one of the commands {', '.join(COMMANDS)} in {size} processes, got {command}"
        )


def run(main: Callable[[], int]) -> int:
    """The exit status of `main`, which only the first process lets be heard.

    An error that all of them find is said by the first, and torchrun ends the others; one that this process
    alone has found is said here after a while.
    """
    rank = process()[0]
    if rank == 0:
        return main()
    outputs, said = (sys.stdout, sys.stderr), io.BytesIO()
    with open(os.devnull, "w", encoding="utf-8") as nothing:
        sys.stdout, sys.stderr = nothing, io.TextIOWrapper(said, encoding="utf-8", write_through=True)
        try:
            status = main()
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        finally:
            sys.stdout, sys.stderr = outputs
    if status:
        time.sleep(_GRACE_SECONDS)
        print(f"rank {rank}: {said.getvalue().decode(errors='backslashreplace')}", end="", file=sys.stderr)
    return status


def end(status: int) -> NoReturn:
    """Ends this process.

    One of several does not wait for the interpreter to take everything down: threads of torch.distributed
    that are still there then can abort a process whose work is done, seen once in 32 runs on a busy machine.
    """
    if process()[1] == 1:
        sys.exit(status)
    atexit._run_exitfuncs()
    for output in (sys.stdout, sys.stderr):
        output.flush()
    os._exit(status)
